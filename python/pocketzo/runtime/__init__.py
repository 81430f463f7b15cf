"""A bundle in onnxruntime: the session reads weights from the memory that the kernels write."""
