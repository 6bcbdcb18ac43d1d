"""Arrays and optimizer state in few bits. Read `array`, then `state`."""
