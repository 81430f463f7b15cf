"""Convert an exported ONNX file to a bundle whose weights can be trained in place."""

from pocketzo.prepare.convert import prepare
from pocketzo.prepare.options import LOSSES, PER, TASKS

__all__ = ["LOSSES", "PER", "TASKS", "prepare"]
