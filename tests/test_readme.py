"""The README's code runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import VOCABULARY, write_tiny_onnx

import pocketzo as pz

pytest.importorskip("tokenizers", reason="the data is text")
README = Path(__file__).parents[1] / "README.md"


def test_the_code_block_trains_and_saves(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    write_tiny_onnx(tmp_path / "model.onnx", classes=2)
    words = {"[PAD]": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(1)
    for name, count in ("train.tsv", 60), ("dev.tsv", 30):
        ids = rng.integers(3, VOCABULARY, (count, 5))
        labels = rng.integers(0, 2, count)
        ids[:, 2] = labels + 1
        lines = [
            " ".join(f"w{i}" for i in row) + "\t" + ("negative", "positive")[label]
            for row, label in zip(ids, labels, strict=True)
        ]
        (tmp_path / name).write_text("text\tlabel\n" + "\n".join(lines) + "\n")

    subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=tmp_path, check=True)

    run = pz.Run(tmp_path / "runs" / "first")
    assert run.steps == 1000
    bundle = pz.Bundle.read(tmp_path / "bundle")
    dev = pz.load_dataset(tmp_path / "dev.tsv", bundle)
    before, after = (pz.evaluate(pz.load(tmp_path / name, threads=1), dev)["loss"] for name in ("bundle", "tuned"))
    assert after < 0.9 * before
    session = ort.InferenceSession(tmp_path / "tuned" / "model.onnx", providers=["CPUExecutionProvider"])
    batch = dev.batch(np.arange(len(dev)))
    (logits,) = session.run(["logits"], {value.name: batch[value.name] for value in session.get_inputs()})
    assert logits.shape == (30, 2)
