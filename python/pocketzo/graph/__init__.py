"""ONNX graphs: read, rewrite and write them.

Its modules need the package ``onnx``; the rest of the package imports them where it needs them.
"""
