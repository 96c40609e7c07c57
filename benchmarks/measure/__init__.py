"""What the package costs and how exact it is: each command measures one thing and writes it to benchmarks/results/."""
