"""Measurements of the trainer against the raw PyTorch loop. Each module writes a table into benchmarks/results/."""
