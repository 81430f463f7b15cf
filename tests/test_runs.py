"""Runs recorded on one architecture replay to the same bits on the other, and on every instruction set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs.generate import BASE, METHODS

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

ARCHITECTURES = ("x86_64", "aarch64")
FOLDERS = [BASE.parent, *map(Path, filter(None, [os.environ.get("POCKETZO_RUNS")]))]  # .ci/run records anew
RUNS = [
    folder / f"{architecture}-{method}"
    for folder, architecture, method in itertools.product(FOLDERS, ARCHITECTURES, METHODS)
]


@pytest.fixture(params=pz.kernels.available())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    pz.kernels.use(request.param)
    yield
    pz.kernels.use(pz.kernels.available()[0])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("run", RUNS, ids=[f"{run.parent.name}-{run.name}" for run in RUNS])
def test_the_record_alone_gives_the_weights_of_the_machine_that_trained(run: Path, tmp_path: Path) -> None:
    pz.Run(run).replay(tmp_path / "tuned", bundle=BASE)
    sha256 = file_sha256(tmp_path / "tuned" / "weights.safetensors")
    assert sha256 != file_sha256(BASE / "weights.safetensors")
    assert sha256 == (run / "weights.sha256").read_text().strip()
