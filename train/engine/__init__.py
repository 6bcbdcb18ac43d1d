"""The machinery that trains any task: loop, step, checkpoints and devices."""
