"""How a quantised base is best quantised: size, loss, noise of loss differences, and time, by bits, block and so on.

    python bench/bases.py MODEL.onnx TEXTS [--bits 4 8] [--blocks 16 32 64 128] [--levels 0 1 4] [--json FILE]

MODEL.onnx is the float32 export of a decoder with its tokenizer beside it; TEXTS are examples for the task causal-lm.
Each base is quantised as ``pocketzo prepare --base`` does, or with an offset for each block, and run with the accuracy
levels of MatMulNBits: of level 4, onnxruntime quantises activations to 8 bits. LoRA-B on queries and values is moved
from 0 by eps in some directions, the same for all bases:

    size     of the weights file
    loss     at 0, the mean over all tokens
    slopes   d = (L(+eps) - L(-eps)) / 2 eps: their correlation with those of the float32 base
    noise    root mean square of d(eps) - d(1.05 eps), as a share of that of d: what rounding adds to a slope
    time     CPU time of a forward pass as a share of that of the float32 base: passes of both take turns
"""

from __future__ import annotations

import argparse
import shutil
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
from pocketzo.graph.blocks import Scheme
from pocketzo.graph.matrices import Matrices
from pocketzo.graph.nbits import quantise
from pocketzo.graph.stored import store
from pocketzo.tasks.objective import Objective, metric_objective
from pocketzo.tasks.registry import task_of

TRAIN = "lora:train=B"


class Measured:
    """A bundle that is loaded, its trained weights at 0, and a batch."""

    def __init__(self, bundle: pz.Bundle, texts: Path, rows: int) -> None:
        self.model = pz.load(bundle, threads=1)
        self.objective = Objective(metric_objective("loss", bundle), task_of(bundle), None)
        self.batch = pz.load_dataset(texts, bundle).batch(np.arange(rows))
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


def prepared(source: Path, tokenizer: Path, out: Path) -> pz.Bundle:
    return pz.prepare(source, out, task="causal-lm", train=TRAIN, tokenizer=tokenizer, overwrite=True)


def with_level(bundle: pz.Bundle, level: int) -> pz.Bundle:
    """Set the accuracy level of all quantised products of a bundle's graph."""
    import onnx

    model = onnx.load(bundle.model_path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    bundle.model_path.write_bytes(model.SerializeToString())
    replace(bundle, graph_sha256=file_sha256(bundle.model_path)).write_description()
    return pz.Bundle.read(bundle.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=[4, 8])
    parser.add_argument("--blocks", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--levels", nargs="+", type=int, default=[0, 1, 4])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run, tokenizer = Run(), arguments.model.parent / "tokenizer.json"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "floats").mkdir()
        store(arguments.model, work / "floats" / "model.onnx")
        base = Measured(prepared(arguments.model, tokenizer, work / "base"), arguments.texts, arguments.rows)
        rows.append(
            {"base": "float32", "level": None, **base.row(arguments.eps, arguments.directions, None), "time": 1}
        )
        for bits in arguments.bits:
            for block in arguments.blocks:
                for symmetric in (True, False):
                    scheme = Scheme(bits, block, symmetric)
                    shutil.rmtree(work / "blocks", ignore_errors=True)
                    (work / "blocks").mkdir()
                    try:
                        quantise(work / "floats" / "model.onnx", work / "blocks" / "model.onnx", Matrices(scheme))
                    except ValueError as error:  # rows that are no whole blocks
                        print(f"skipped: {error}", file=sys.stderr, flush=True)
                        continue
                    bundle = prepared(work / "blocks" / "model.onnx", tokenizer, work / "bundle")
                    for level in arguments.levels:
                        found = Measured(with_level(bundle, level), arguments.texts, arguments.rows)
                        row = found.row(arguments.eps, arguments.directions, rows[0]["slopes"])
                        pairs = [(found.seconds(), base.seconds()) for _ in range(5)]
                        share = float(np.median([mine / theirs for mine, theirs in pairs]))
                        text = f"int{bits}, {block}{'' if symmetric else ', offsets'}"
                        rows.append({"base": text, "level": level, **row, "time": share})
                        report = run.finish({"rows": rows, "settings": settings(arguments)}, arguments.json)
                        print(bases_table(report)[-1], file=sys.stderr, flush=True)
                        del found
    print("\n".join(bases_table(report)))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("rows", "directions", "eps")} | {"train": TRAIN}


if __name__ == "__main__":
    main()
