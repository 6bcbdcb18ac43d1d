"""Steps and updates on a real card: `python -m tests.bench.card`."""
