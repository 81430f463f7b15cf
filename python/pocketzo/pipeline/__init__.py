"""Devices pooled: a model that none of them holds alone is cut into stages, one for each."""
