"""What is left on disk of commands that are killed, whose power is cut, or whose disk is full."""
