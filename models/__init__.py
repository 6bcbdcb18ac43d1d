"""Flax models that know no optimizer."""
