"""How a quantised base is best quantised: size, loss, noise of loss differences, and time, by bits, block and so on.

    python bench/bases.py prepare MODEL.onnx BASES [--bits 4 8] [--blocks 16 32 64 128]
    python bench/bases.py measure BASES TEXTS [--only int4-32 float16] [--levels 0 1 4] [--json FILE]

MODEL.onnx is the float32 export of a decoder with its tokenizer beside it; TEXTS are examples for the task causal-lm.
Each base is quantised as ``pocketzo prepare --base`` does, or with an offset for each block, or made float16, and run
with the accuracy levels of MatMulNBits: of level 4, onnxruntime quantises activations to 8 bits. LoRA-B on queries and
values is moved from 0 by eps in some directions, the same for all bases:

    size     of the weights file
    loss     at 0, the mean over all tokens
    slopes   d = (L(+eps) - L(-eps)) / 2 eps: their correlation with those of the float32 base
    noise    root mean square of d(eps) - d(1.05 eps), as a share of that of d: what rounding adds to a slope
    time     CPU time of a forward pass as a share of that of the float32 base: passes of both take turns

``measure`` needs no onnx, so that it runs on Arm, also under qemu (.ci/aarch64-testbed). An emulator computes what the
processor would, bit for bit, and its time is not that of a processor.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import Run
from tables import bases_table

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256
from pocketzo.runtime.onnx_proto import INT, all_nodes, read_graph
from pocketzo.tasks.objective import Objective, metric_objective
from pocketzo.tasks.registry import task_of

TRAIN = "lora:train=B"


class Measured:
    """A bundle that is loaded, its trained weights at 0, and a batch."""

    def __init__(self, bundle: pz.Bundle, texts: Path, rows: int) -> None:
        self.batch = pz.load_dataset(texts, bundle).batch(np.arange(rows))
        # checked on this batch alone: an emulator takes seconds for a token in fp16
        self.model = pz.load(replace(bundle, probe=None), threads=1, batch=self.batch, verify="fast")
        self.objective = Objective(metric_objective("loss", bundle), task_of(bundle), None)
        self.trained = sorted(name for names in bundle.trainable.values() for name in names)

    def loss(self) -> float:
        return self.objective(self.model, self.batch)

    def seconds(self) -> float:
        began = time.process_time()
        self.loss()
        return time.process_time() - began

    def move(self, draw: int, eps: float) -> None:
        for number, name in enumerate(self.trained):
            shape = self.model.weights[name].shape
            z = pz.kernels.noise(int(np.prod(shape)), seed=0, tensor=number, draw=draw)
            self.model.weights[name] = np.float32(eps) * z.reshape(shape)

    def slope(self, draw: int, eps: float) -> float:
        losses = []
        for side in (eps, -eps):
            self.move(draw, side)
            losses.append(self.loss())
        return (losses[0] - losses[1]) / (2 * eps)

    def row(self, eps: float, directions: int, slopes: list[float] | None) -> dict[str, Any]:
        self.move(0, 0.0)
        start = self.loss()
        found = [self.slope(draw, eps) for draw in range(directions)]
        near = [self.slope(draw, 1.05 * eps) for draw in range(directions)]
        self.move(0, 0.0)
        size = float(np.sqrt(np.mean(np.square(found))))
        return {
            "size": self.model.bundle.weights_path.stat().st_size,
            "loss": start,
            "slopes": found,
            "correlation": 1.0 if slopes is None else float(np.corrcoef(found, slopes)[0, 1]),
            "noise": float(np.sqrt(np.mean(np.square(np.subtract(found, near))))) / size,
        }


# ---- prepare ---------------------------------------------------------------------------------------------------------


def prepare_bases(arguments: argparse.Namespace) -> None:
    """Write a bundle for each base."""
    from pocketzo.graph.blocks import Scheme
    from pocketzo.graph.matrices import Matrices
    from pocketzo.graph.nbits import quantise
    from pocketzo.graph.stored import store

    def write(name: str, source: Path, dtype: Any = None) -> None:
        tokenizer = arguments.model.parent / "tokenizer.json"
        out = arguments.bases / name
        pz.prepare(source, out, task="causal-lm", train=TRAIN, tokenizer=tokenizer, dtype=dtype, overwrite=True)
        print(out, file=sys.stderr, flush=True)

    arguments.bases.mkdir(parents=True, exist_ok=True)
    write("float32", arguments.model)
    write("float16", arguments.model, "float16")
    with tempfile.TemporaryDirectory(dir=arguments.bases) as folder:
        floats, blocks = Path(folder, "floats.onnx"), Path(folder, "blocks.onnx")
        store(arguments.model, floats)
        for bits in arguments.bits:
            for block in arguments.blocks:
                for symmetric in (True, False):
                    try:
                        quantise(floats, blocks, Matrices(Scheme(bits, block, symmetric)))
                    except ValueError as error:  # rows that are no whole blocks
                        print(f"skipped: {error}", file=sys.stderr, flush=True)
                        continue
                    write(f"int{bits}-{block}{'' if symmetric else '-offsets'}", blocks)


# ---- measure ---------------------------------------------------------------------------------------------------------


def with_level(bundle: pz.Bundle, level: int) -> pz.Bundle:
    """Set the accuracy level of all quantised products of a bundle's graph."""
    model = read_graph(bundle.model_path)
    for node in all_nodes(model.graph):
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.add(name="accuracy_level", i=level, type=INT)
    bundle.model_path.write_bytes(model.SerializeToString())
    replace(bundle, graph_sha256=file_sha256(bundle.model_path)).write_description()
    return pz.Bundle.read(bundle.path)


def measure_bases(arguments: argparse.Namespace) -> None:
    """Print a row for each base and accuracy level."""
    run = Run()
    settings = {name: getattr(arguments, name) for name in ("rows", "directions", "eps")} | {"train": TRAIN}
    if emulated := os.environ.get("QEMU_CPU"):
        settings["emulated"] = emulated
    base = Measured(pz.Bundle.read(arguments.bases / "float32"), arguments.texts, arguments.rows)
    first = base.row(arguments.eps, arguments.directions, None)
    rows: list[dict[str, Any]] = [{"base": "float32", "level": None, **first, "time": 1}]
    names = arguments.only or sorted(path.name for path in arguments.bases.iterdir() if path.name != "float32")
    for name in names:
        for level in arguments.levels if name.startswith("int") else [None]:
            bundle = pz.Bundle.read(arguments.bases / name)
            found = Measured(bundle if level is None else with_level(bundle, level), arguments.texts, arguments.rows)
            row = found.row(arguments.eps, arguments.directions, first["slopes"])
            pairs = [(found.seconds(), base.seconds()) for _ in range(arguments.rounds)]
            share = float(np.median([mine / theirs for mine, theirs in pairs]))
            rows.append({"base": name, "level": level, **row, "time": share})
            report = run.finish({"rows": rows, "settings": settings}, arguments.json)
            print(bases_table(report)[-1], file=sys.stderr, flush=True)
            del found
    print("\n".join(bases_table(report)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("model", type=Path)
    preparing.add_argument("bases", type=Path)
    preparing.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=[4, 8])
    preparing.add_argument("--blocks", nargs="+", type=int, default=[16, 32, 64, 128])
    preparing.set_defaults(do=prepare_bases)
    measuring = commands.add_parser("measure")
    measuring.add_argument("bases", type=Path)
    measuring.add_argument("texts", type=Path)
    measuring.add_argument("--only", nargs="+", help="names of bases, instead of all")
    measuring.add_argument("--levels", nargs="+", type=int, default=[0, 1, 4])
    measuring.add_argument("--rows", type=int, default=8)
    measuring.add_argument("--directions", type=int, default=8)
    measuring.add_argument("--eps", type=float, default=1e-2)
    measuring.add_argument("--rounds", type=int, default=5)
    measuring.add_argument("--json", type=Path)
    measuring.set_defaults(do=measure_bases)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
