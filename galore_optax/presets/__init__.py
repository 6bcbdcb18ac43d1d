"""Presets: complete optimizers, each named after a published method."""
