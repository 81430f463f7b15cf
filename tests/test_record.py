"""The record of a run over a frozen base: its size, and that it rebuilds an adapter on each instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from decoders import llama_weights, write_llama
from sizes import full_or_small

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

STEPS = full_or_small(1000, 100)
BATCH = np.random.default_rng(9).integers(1, 40, (2, 4))


class Tokens:
    """Two sentences of four tokens."""

    fingerprint = "tokens"

    def __len__(self) -> int:
        return len(BATCH)

    def batch(self, indices: np.ndarray) -> pz.Batch:
        ids = BATCH[indices]
        places = np.arange(ids.size).reshape(ids.shape)
        arrays = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
            "positions": places[:, :-1].ravel(),
            "targets": ids[:, 1:].ravel(),
        }
        return pz.Batch(arrays, indices)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run over it, and the bundle that the run itself has left."""
    folder = tmp_path_factory.mktemp("record")
    write_llama(folder / "m.onnx", llama_weights(kv_heads=2), 2)
    bundle = pz.prepare(folder / "m.onnx", folder / "base", task="causal-lm", train="lora")
    model = pz.load(bundle, threads=1)
    optimizer = pz.MeZO(model, lr=1e-2, eps=1e-2, seed=2)
    pz.Trainer(model, optimizer, Tokens(), run=folder / "run", steps=STEPS, batch_size=2).fit()
    model.save(folder / "tuned")
    return folder


def test_1000_steps_take_less_than_32_kilobytes(trained: Path) -> None:
    size = (trained / "run" / "journal.pzj").stat().st_size
    assert size < 32_000 * STEPS / 1000 + (0 if STEPS == 1000 else 8_000)  # the header does not shrink


@pytest.mark.parametrize("isa", pz.kernels.available())
def test_the_record_and_the_base_rebuild_the_adapter(trained: Path, isa: str, tmp_path: Path) -> None:
    before = pz.kernels.isa()
    pz.kernels.use(isa)
    try:
        pz.Run(trained / "run").replay(tmp_path / "rebuilt")
    finally:
        pz.kernels.use(before)
    base, tuned, rebuilt = (
        pz.Bundle.read(path).trained_path for path in (trained / "base", trained / "tuned", tmp_path / "rebuilt")
    )
    assert file_sha256(rebuilt) == file_sha256(tuned) != file_sha256(base)
