"""The core where nothing but numpy and onnxruntime is installed, as on a phone, and in other versions than here.

POCKETZO_CORE_PYTHON names the Python of such an installation; `.ci/run termux` makes one with Termux's versions.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_packaging import OPTIONAL

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

PYTHON = os.environ.get("POCKETZO_CORE_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="POCKETZO_CORE_PYTHON names no other installation")

SCRIPT = """
import sys
from importlib.util import find_spec
import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256
assert not any(map(find_spec, {optional})), [name for name in {optional} if find_spec(name)]
bundle, data, run, tuned = sys.argv[1:]
train = pz.load_dataset(data, pz.Bundle.read(bundle))
model = pz.load(bundle, threads=1, prepack=True, max_memory=2_000_000_000)
trainer = pz.Trainer(model, pz.FZOO(model, lr=0.003), train, eval=train, run=run, steps=40, eval_every=10)
def stop(progress):
    trainer.stop_requested = progress.info.step == 16
trainer.callback = stop
trainer.fit()
assert pz.Run(run).steps == 17
resumed = pz.Trainer.resume(run, train, eval=train)
resumed.fit()
pz.Run(run).replay(tuned)
assert resumed.model.weights.sha256() == file_sha256(pz.Bundle.read(tuned).weights_path)
print(pz.evaluate(resumed.model, train)["accuracy"])
"""


def test_the_core_alone_trains_resumes_and_replays(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    command = [str(PYTHON), "-W", "error", "-c", SCRIPT.format(optional=OPTIONAL)]
    command += [str(path) for path in (tiny_bundle, tiny_data, tmp_path / "run", tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) <= 1
    pz.Run(tmp_path / "run").replay(tmp_path / "here")
    there, here = (file_sha256(tmp_path / name / "weights.safetensors") for name in ("there", "here"))
    assert there == here
