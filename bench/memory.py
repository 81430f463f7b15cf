"""Peak memory of training against that of running: the same live session, ten MeZO steps or twenty forwards.

Each row is a process of its own. "activations" is the largest sum of intermediate tensors that the graph has alive at
once, by shape inference; the runtime's own buffers come on top of it.

    python bench/memory.py [--model bert-base] [--batch 8] [--tokens 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, write
from models import SHAPES, make_batch, make_bundle

import pocketzo as pz


def peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def worker(bundle: str, mode: str, batch: int, tokens: int, vocabulary: int, threads: int) -> None:
    pz.kernels.set_threads(threads)
    inputs = make_batch(batch, tokens, vocabulary=vocabulary)
    start = peak_rss()
    began = time.perf_counter()
    model = pz.load(bundle, threads=threads)
    loading = time.perf_counter() - began
    loaded = peak_rss()
    optimizer = pz.MeZO(model, lr=1e-6)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        if mode == "train":
            optimizer.step(lambda m: m.loss(inputs))
        else:
            model.loss(inputs)
            model.loss(inputs)
        times.append(time.perf_counter() - began)
    print(
        json.dumps(
            {
                "mode": mode,
                "start": start,
                "loaded": loaded,
                "peak": peak_rss(),
                "weights": model.weights.nbytes,
                "parameters": sum(view.size for view in model.weights.values()),
                "loading": loading,
                "seconds": float(np.median(times)),
            }
        )
    )


def activations(bundle: Path, batch: int, tokens: int) -> int:
    """Return the bytes of intermediate tensors alive at once, at most."""
    import onnx
    from onnx import shape_inference

    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.ClearField("dim_param")
            dim.dim_value = batch if axis == 0 else tokens
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {
        value.name: prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        * onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
        for value in [*inferred.value_info, *inferred.output]
    }
    last = {name: i for i, node in enumerate(inferred.node) for name in node.input}
    alive = most = 0
    for i, node in enumerate(inferred.node):
        alive += sum(sizes.get(name, 0) for name in node.output)
        most = max(most, alive)
        alive -= sum(sizes.get(name, 0) for name in {*node.input, *node.output} if last.get(name, i) == i)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="bert-base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    parser.add_argument("--worker", nargs=2, metavar=("BUNDLE", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.model]
    if args.worker:
        worker(args.worker[0], args.worker[1], args.batch, args.tokens, shape.vocabulary, args.threads)
        return
    results: dict[str, Any] = {"model": args.model, "batch": args.batch, "tokens": args.tokens}
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(shape, Path(folder))
        results["activations"] = activations(bundle, args.batch, args.tokens)
        for mode in ("forward", "train"):
            command = [sys.executable, __file__, "--worker", str(bundle), mode, *sys.argv[1:]]
            results[mode] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    forward, train = results["forward"], results["train"]
    bound = 1.10 * (forward["weights"] + results["activations"]) + 60e6
    print(f"{machine()['cpu']}, {args.threads} threads; {args.model}, {forward['parameters'] / 1e6:.1f} M parameters,")
    print(f"batch {args.batch} x {args.tokens} tokens\n")
    rows = [
        ("weights", forward["weights"]),
        ("activations alive at once", results["activations"]),
        ("interpreter and libraries, before loading", forward["start"]),
        ("peak after loading", forward["loaded"]),
        ("peak of 20 forwards", forward["peak"]),
        ("peak of 10 MeZO steps", train["peak"]),
    ]
    for name, value in rows:
        print(f"{name:45}{value / 1e6:10.1f} MB")
    print(f"\n{'training / running':45}{train['peak'] / forward['peak']:10.3f}     target <= 1.05")
    print(f"{'running / (1.10 (weights + act.) + 60 MB)':45}{forward['peak'] / bound:10.3f}     target <= 1")
    print(f"{'seconds a step / two forwards':45}{train['seconds']:10.3f} / {forward['seconds']:.3f}")
    write(args.json, results)


if __name__ == "__main__":
    main()
