"""Checkpoints as ONNX graphs."""
