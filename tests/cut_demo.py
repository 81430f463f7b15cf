"""The command line, where the demo's encoder is cut to 1 of its 6 layers and 32 of its 384 columns.

That is 1.0 of 22.7 M parameters. All else is as it ships. Under emulation a step of the whole one takes minutes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy

from pocketzo.__main__ import main
from pocketzo.demo import minilm, run

LAYERS = 1
COLUMNS = {384: 32, 1536: 64}  # of the hidden size and of the one between


def cut(folder: Path) -> minilm.Checkpoint:
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


with tempfile.TemporaryDirectory() as temporary:
    checkpoint = cut(Path(temporary))
    vars(run)["find_checkpoint"] = lambda directory: checkpoint
    main()
