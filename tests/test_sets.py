"""Each set of ``--train``: it learns on each kind of decoder, and a run that was killed goes on to the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import MODELS
from test_decoders import FLOATS
from test_language_models import Sentences
from test_trainable import ADDED, DECODERS, words_of

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")

CHOSEN = ["norm", "bias", "last:1", "head", "lora:r=2,layers=1,train=B+norm"]
PARALLEL = "parallel-adapter:4"
FOREIGN = {"merged gpt2": "optimum's merged decoder", "genai": "onnxruntime-genai's model builder"}
STEPS = 9


def has(name: str, train: str) -> bool:
    """Whether a decoder has what a set is of."""
    if train == "prefix:3":
        return name not in FOREIGN
    return train != "bias" or name in ("gpt2", "qwen2", "merged gpt2")


CASES = [
    (name, train)
    for name in ("gpt2", "llama", "qwen2", "qwen3", *FOREIGN)
    for train in (*ADDED, "prefix:3", *CHOSEN)
    if has(name, train)
]


@pytest.mark.parametrize(("name", "train"), CASES)
def test_a_set_of_a_decoder_learns(name: str, train: str, tmp_path: Path) -> None:
    path = FLOATS[name](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train=train)
    model = pz.load(bundle, threads=1)
    batch = Sentences(path).batch(np.arange(8))
    before = model.loss(batch)
    optimizer = pz.Momentum(model, lr=2e-2, eps=1e-2, seed=3)
    for _ in range(60):
        optimizer.step(lambda model: model.loss(batch))
    assert model.loss(batch) < before - 1e-3


class Labelled:
    """The labelled rows of the tiny encoder."""

    fingerprint = "rows"

    def __init__(self) -> None:
        self.arrays, _ = words_of("bert-new")

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    def batch(self, indices: Any) -> pz.Batch:
        return pz.Batch({name: array[indices] for name, array in self.arrays.items()}, np.asarray(indices))


def data_of(folder: Path) -> Any:
    """Return the data for a bundle in a folder: a decoder's sentences, if its file is there."""
    return Sentences(folder / "m.onnx") if (folder / "m.onnx").exists() else Labelled()


# The process ends by SIGKILL while step 7 has the weights perturbed, after the snapshot of step 4.
WORKER = """
import os, signal, sys
from pathlib import Path
import pocketzo as pz
from test_sets import data_of
bundle, run, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

class Killing(pz.Momentum):
    def step(self, objective, *others, **options):
        def killed(model):
            if self.step_number == 6 and killed.calls:
                os.kill(os.getpid(), signal.SIGKILL)
            killed.calls += 1
            return objective(model)
        killed.calls = 0
        return super().step(killed, *others, **options)

model = pz.load(bundle, threads=1)
optimizer = Killing(model, lr=1e-2, eps=1e-2)
data = data_of(bundle.parent)
pz.Trainer(model, optimizer, data, run=run, steps=steps, batch_size=4, snapshot_every=4).fit()
"""


@pytest.mark.parametrize(
    ("name", "train"),
    [
        *(("gpt2" if train == "bias" else "llama, int4", train) for train in (*ADDED, "prefix:3", *CHOSEN)),
        *(("bert", train) for train in (*ADDED, *CHOSEN, PARALLEL)),
    ],
)
def test_a_killed_run_of_a_set_goes_on_to_the_same_bits(name: str, train: str, tmp_path: Path) -> None:
    if name == "bert":
        options: Any = {"labels": ["a", "b", "c"]} if train == PARALLEL else {}
        bundle = pz.prepare(MODELS / "bert-new.onnx", tmp_path / "base", train=train, **options)
    else:
        path = DECODERS[name](tmp_path / "m.onnx")
        bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train=train)
    data = data_of(tmp_path)
    model = pz.load(bundle, threads=1)
    optimizer = pz.Momentum(model, lr=1e-2, eps=1e-2)
    pz.Trainer(model, optimizer, data, run=tmp_path / "whole", steps=STEPS, batch_size=4, snapshot_every=4).fit()
    model.save(tmp_path / "tuned")

    command = [sys.executable, "-W", "ignore", "-c", WORKER, bundle.path, tmp_path / "run", STEPS]
    done = subprocess.run([*map(str, command)], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert pz.Run(tmp_path / "run").steps == 6
    trainer = pz.Trainer.resume(tmp_path / "run", data)
    assert trainer.optimizer.step_number == 6
    trainer.fit()
    trainer.model.save(tmp_path / "resumed")
    pz.Run(tmp_path / "run").replay(tmp_path / "replayed")
    names = ("tuned", "resumed", "replayed")
    assert len({file_sha256(pz.Bundle.read(tmp_path / name).trained_path) for name in names}) == 1
    assert file_sha256(pz.Bundle.read(tmp_path / "tuned").trained_path) != file_sha256(bundle.trained_path)
