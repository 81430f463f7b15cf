"""Peak memory of training fp16 weights, beside that of inference.

    python bench/fp16.py [--python INTERPRETER] [--shape xglm-564m] [--batch 1x8] [--models DIR] [--json FILE]

    imports    an interpreter that has imported PocketZO and onnxruntime
    running    loading, then two forwards
    training   loading, then two MeZO steps

Each runs in a process of its own, all three at once, with the given interpreter. That of the aarch64 test bed
(CONTRIBUTING.md) uses a phone's fp16 operators under qemu; every figure then includes qemu's own memory. The memory of
a forward is the peak of `running` less the peak of `imports` and the size of the weights. `--dtype float32` measures
fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import Run, peak_rss
from models import SHAPES, make_batch, make_bundle
from step import models_folder
from tables import fp16_table

WORK = ("imports", "running", "training")


def worker(work: str, shape: str, bundle: str, batch: str) -> None:
    """Do one kind of work; print the peak memory of this process and the platform as JSON."""
    import platform
    import warnings

    import onnxruntime

    import pocketzo as pz

    warnings.simplefilter("ignore")  # about fp16 being slow here
    if work != "imports":
        inputs = make_batch(shape, *map(int, batch.split("x")))
        model = pz.load(bundle, threads=1, prepack=False, verify="fast")
        optimizer = pz.MeZO(model, lr=1e-6)
        for _ in range(2):
            if work == "running":
                model.loss(inputs)
            else:
                optimizer.step(lambda model: model.loss(inputs))
    print(
        json.dumps(
            {
                "peak": peak_rss(),
                "architecture": platform.machine(),
                "computes_in_fp16": pz._core.has_fp16_arithmetic(),
                "onnxruntime": onnxruntime.__version__,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to measure (default: this one)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="xglm-564m")
    parser.add_argument("--batch", default="1x8", help="texts x tokens")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float16")
    parser.add_argument("--models", type=Path, help="keep the prepared models in this folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    run = Run()
    with models_folder(arguments.models) as folder:
        bundle = make_bundle(arguments.shape, folder, arguments.dtype)
        command = [arguments.python, __file__, "worker"]
        words = [arguments.shape, str(bundle), arguments.batch]
        # All at once: their memory is independent, and each takes minutes under an emulator.
        workers = {work: subprocess.Popen([*command, work, *words], stdout=subprocess.PIPE, text=True) for work in WORK}
        rows: dict[str, Any] = {}
        for work, process in workers.items():
            output, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{work}: failed, exit code {process.returncode}")
            rows[work] = json.loads(output)
            print(f"{work}: {rows[work]['peak'] / 1e6:,.0f} MB", file=sys.stderr, flush=True)
        weights = (bundle / "weights.safetensors").stat().st_size
    results = {
        "shape": arguments.shape,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "weights": weights,
        "rows": rows,
    }
    print("\n".join(fp16_table(run.finish(results, arguments.json))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
