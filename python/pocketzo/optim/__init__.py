"""Zeroth-order optimizers."""
