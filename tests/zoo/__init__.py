"""Trials of foreign models: ONNX's backend tests, and any files; see ``python -m zoo --help``."""
