"""MiniLM cut to 1 of its 6 layers and 32 of its 384 columns, for emulators: 1.0 of 22.7 M parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import safetensors.numpy

from pocketzo.demo import minilm
from pocketzo.export.bert import Checkpoint

LAYERS = 1
COLUMNS = {384: 32, 1536: 64}  # of the hidden size and of the one between


def cut(folder: Path) -> Checkpoint:
    """Write it to a folder."""
    whole = minilm.find_checkpoint()
    kept = {
        name: np.ascontiguousarray(tensor[tuple(slice(COLUMNS.get(count, count)) for count in tensor.shape)])
        for name, tensor in safetensors.numpy.load_file(whole.weights).items()
        if not name.startswith(tuple(f"encoder.layer.{i}." for i in range(LAYERS, whole.layers)))
    }
    safetensors.numpy.save_file(kept, folder / "model.safetensors")
    return dataclasses.replace(
        whole, weights=folder / "model.safetensors", layers=LAYERS, heads=2, hidden_size=COLUMNS[whole.hidden_size]
    )
