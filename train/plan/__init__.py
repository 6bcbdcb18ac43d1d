"""Memory and cost of a training step on an absent GPU: `python -m train.plan`.

No such GPU is needed. Read `footprint` for memory, or `bill` for cost, first.
"""
