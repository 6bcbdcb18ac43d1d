"""Labelled images: corpora, batches, and the reading and writing of pixels.

Read `corpora` first.
"""
