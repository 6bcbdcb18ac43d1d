"""The optimizers that a config can name, and additions to them."""
