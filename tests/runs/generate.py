"""Record the runs of this folder, on the machine that this is: cd tests && python -m runs.generate FOLDER.

FOLDER gets ``<architecture>-<method>``: a journal, and the SHA-256 of the weights that the training itself left.
All start from the bundle ``base`` beside this file, which is made only where it is missing.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from conftest import write_tiny_data, write_tiny_onnx

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

BASE = Path(__file__).parent / "base"
METHODS: dict[str, Callable[[pz.Model], pz.Optimizer]] = {
    "mezo": lambda model: pz.MeZO(model, lr=0.02, seed=3, weight_decay=0.1, schedule=pz.Schedule("linear", 40)),
    "fzoo": lambda model: pz.FZOO(model, lr=1e-3, seed=5, groups=[pz.ParamGroup("classifier", lr=10, eps=3)]),
}


def record(out: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if not BASE.exists():
            write_tiny_onnx(work / "tiny.onnx")
            pz.prepare(work / "tiny.onnx", BASE, labels=["red", "green", "blue"], max_length=16)
        shutil.copytree(BASE, work / "base")  # a record names the folder
        write_tiny_data(work / "tiny.npz")
        for name, make in METHODS.items():
            run = out / f"{platform.machine()}-{name}"
            shutil.rmtree(run, ignore_errors=True)
            model = pz.load(work / "base")
            data = pz.load_dataset(work / "tiny.npz", model.bundle)
            pz.Trainer(model, make(model), data, batch_size=8, steps=40, run=run).fit()
            model.save(work / name)
            (run / "metrics.jsonl").unlink()
            (run / "weights.sha256").write_text(file_sha256(work / name / "weights.safetensors") + "\n")
    packages = (f"{name} {importlib.metadata.version(name)}" for name in ("pocketzo", "numpy", "onnxruntime"))
    print(f"{platform.machine()}: {pz.kernels.isa()}, CPython {platform.python_version()}, {', '.join(packages)}")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
