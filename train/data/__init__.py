"""Data pipeline from text to batches: corpora, tokenizers and packing.

Read `corpus` first.
"""
