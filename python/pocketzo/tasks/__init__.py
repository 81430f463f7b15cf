"""From columns of data to inputs, loss and metrics: a file for each kind of problem."""
