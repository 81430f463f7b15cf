"""Datasets: read a file, check every line, keep the examples as token ids, return them in padded batches."""
