"""Measures steps and updates on a GPU: `python -m tests.bench.card`."""
