"""Compares speed with PyTorch and optax: `python -m tests.bench.speed`."""
