"""A training step that updates each weight as its gradient appears."""
