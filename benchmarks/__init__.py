"""Trainings, measurements and the pages they are shown on: `python -m benchmarks --help` lists the commands."""
