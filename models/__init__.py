"""Flax models and their checkpoints. Nothing here depends on an optimizer."""
