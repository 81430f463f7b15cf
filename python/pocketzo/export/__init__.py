"""Checkpoints as ONNX graphs."""

from pocketzo.export.convert import DTYPES, Dtype, export
from pocketzo.export.families import FAMILIES, Kind

__all__ = ["DTYPES", "FAMILIES", "Dtype", "Kind", "export"]
