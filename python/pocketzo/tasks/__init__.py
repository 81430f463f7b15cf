"""Tasks: turn data columns into model inputs, and model outputs into loss and metrics. One file per task."""
