"""The training program: config, data, step, loop, checkpoint and metrics."""
