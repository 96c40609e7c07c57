"""Trainings and measurements, and the page that shows them: `python -m benchmarks --help` lists the commands."""
