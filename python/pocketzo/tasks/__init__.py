"""From columns of data to inputs, loss and metrics."""
