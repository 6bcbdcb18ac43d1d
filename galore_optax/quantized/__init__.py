"""Arrays and optimizer state in 8 or 4 bits. Read `array`, then `state`."""
