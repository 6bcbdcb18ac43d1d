"""Data pipelines from texts and images to batches.

Read `corpus` first, and `images` for images.
"""
