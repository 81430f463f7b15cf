"""A bundle in onnxruntime: weights that the session reads where the kernels write."""
