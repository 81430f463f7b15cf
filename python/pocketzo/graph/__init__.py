"""ONNX graphs: read, rewrite, build and write them.

Graphs are held as ``onnx_ir`` has them: a value knows its producer and its readers, in inner graphs too, and keeps its
identity whatever it is called. Its modules need the packages ``onnx`` and ``onnx_ir``; the rest of PocketZO imports
them where a graph is prepared or exported, and nowhere else.
"""
