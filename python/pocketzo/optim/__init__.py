"""Zeroth-order methods."""
