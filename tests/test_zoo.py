"""Foreign models: some of ONNX's backend tests, and what the trial of `python -m zoo` has to see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import MODELS, linear, model_of, node, weight
from zoo import trial
from zoo.cases import DATA, Case, inputs_beside, of_files, of_nodes

import pocketzo as pz

TESTS = Path(__file__).parent
FILES = {
    "pytorch-converted/test_Conv1d_groups": "ok",
    "pytorch-converted/test_Conv3d_dilated": "ok",
    "pytorch-converted/test_ConvTranspose2d": "ok",
    "pytorch-converted/test_Embedding": "ok",
    "pytorch-converted/test_Linear": "onnxruntime cannot run it",
    "pytorch-converted/test_Softmax": "no float32 or float16 weights",
    "pytorch-operator/test_operator_addmm": "no float32 or float16 weights",
    "simple/test_strnorm_model_nostopwords_nochangecase": "no float32 or float16 weights",
}
NODES = {
    "batchnorm_epsilon[0]": "ok",
    "conv_with_strides_and_asymmetric_padding[0]": "ok",
    "gemm_default_vector_bias[0]": "ok",
    "gru_with_initial_bias[0]": "ok",
    "layer_normalization_4d_axis1[0]": "ok",
    "lstm_with_peepholes[0]": "ok",
    "matmul_2d[1]": "ok",
    "mul[0]": "no float32 or float16 weights",
    "prelu_broadcast[0]": "ok",
    "rnn_seq_length[0]": "ok",
}


@pytest.fixture(scope="session")
def operators() -> dict[str, Case]:
    return {case.name: case for case in of_nodes() if case.name in NODES}


def check(source: Path, folder: Path, batch: trial.Batch | None, expected: str) -> None:
    result = trial.attempt(source, folder, batch)
    assert result.outcome == ("ok" if expected == "ok" else "refused"), result
    assert expected == "ok" or re.search(expected, result.reason)


@pytest.mark.parametrize(("name", "expected"), FILES.items())
def test_models_of_the_backend_tests(name: str, expected: str, tmp_path: Path) -> None:
    check(DATA / name / "model.onnx", tmp_path, inputs_beside(DATA / name / "model.onnx"), expected)


@pytest.mark.parametrize(("name", "expected"), NODES.items())
def test_operators_with_weights(name: str, expected: str, operators: dict[str, Case], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    check(operators[name].write(tmp_path / "source"), tmp_path, operators[name].batch, expected)


# ---- the trial sees what is wrong ------------------------------------------------------------------------------------


def other_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    prepare = pz.prepare
    other = model_of(
        folder / "other.onnx", [node("MatMul", "x fc.weight", "logits")], [weight("fc.weight", 4, 3, seed=1)]
    )
    monkeypatch.setattr(pz, "prepare", lambda source, out, **options: prepare(other, out, **options))


def no_replay(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(pz.MeZO, "replay", lambda optimizer, entries: None)


def no_update(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(pz.MeZO, "step", lambda optimizer, objective, record: None)


def stale_save(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    bundle = pz.prepare(linear(folder / "linear.onnx"), folder / "untrained")
    save = pz.load(bundle, threads=1).save
    monkeypatch.setattr(pz.Model, "save", lambda model, path: save(path))


def bug(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def load(*_: Any, **__: Any) -> pz.Model:
        raise np.exceptions.AxisError(3, 2)

    monkeypatch.setattr(pz, "load", load)


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        (other_model, "WRONG", "the bundle's outputs are not the source's"),
        (no_replay, "WRONG", "replay differs in fc.weight"),
        (no_update, "WRONG", "no step was taken"),
        (stale_save, "WRONG", "differs from plain onnxruntime on the saved bundle"),
        (bug, "TRACEBACK", "AxisError"),
    ],
)
def test_faults_are_seen(
    fault: Any, outcome: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = linear(tmp_path / "m.onnx")
    (tmp_path / "trial").mkdir()
    assert trial.attempt(source, tmp_path / "trial").outcome == "ok"
    (tmp_path / "again").mkdir()
    fault(monkeypatch, tmp_path)
    result = trial.attempt(source, tmp_path / "again")
    assert result.outcome == outcome
    assert reason in result.reason


def test_files_of_a_folder_become_a_table(tmp_path: Path) -> None:
    linear(tmp_path / "good.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"x")
    assert [case.name for case in of_files([tmp_path])] == [
        f"{tmp_path.name}/{name}.onnx" for name in ("broken", "good")
    ]
    command = [sys.executable, "-m", "zoo", str(tmp_path), str(MODELS / "gpt2-old.onnx")]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in done.stdout.splitlines() if line.startswith("|")}
    assert "| ok | 12 | 12 |" in rows[f"{tmp_path.name}/good.onnx"]
    assert "| refused | 0 | 0 | not an ONNX file" in rows[f"{tmp_path.name}/broken.onnx"]
    assert "| ok |" in rows["gpt2-old.onnx"]


KILLED = """
import os, time
from pathlib import Path
from zoo.__main__ import trials
from zoo.cases import Case

class Bad(Case):
    def write(self, folder):
        time.sleep(30) if self.name == "sleeps" else os.abort()

if __name__ == "__main__":
    for case, result, _ in trials([Bad("", name, Path()) for name in ("sleeps", "aborts")], 2, 2.0):
        print(case.name, result.outcome, result.reason)
"""


def test_a_crash_or_a_hang_ends_one_trial_only() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=TESTS, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == [
        "aborts CRASH the process ended with status -6",
        "sleeps TIMEOUT more than 2 s",
    ]
