"""ONNX graphs: read, rewrite, build and write them.

A graph is an ``onnx_ir`` graph: a value refers to its producer and its consumers, in subgraphs too, and renaming does
not change its identity. The modules of this package need ``onnx`` and ``onnx_ir``. The rest of PocketZO imports them
only where a graph is prepared or exported.
"""
