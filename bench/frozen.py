"""What a step over a frozen base costs: its time as a share of two forward passes, and the peak of memory.

    python bench/frozen.py fp32=BUNDLE int4=BUNDLE [--batches 1x16 8x64] [--threads 1] [--rounds 9] [--json FILE]
    python bench/frozen.py --models DIR --make roberta-large opt-1.3b

Each BUNDLE is of a language model prepared with ``--task causal-lm`` or ``prompt`` and a small trainable set. The
tokens are random. Of causal-lm, logits are computed at one position in eight of the larger batches, at all of up to 16
tokens; of a prompt, at one in each row.

``--make`` writes bundles of PocketLLM's models to DIR, in float32 and int4, with LoRA, and their command lines: random
checkpoints as in paper.py. OPT takes 6 GB and some minutes.

Each row is measured in a fresh process. Two forward passes and a step of MeZO take turns; times are of the CPU, of all
threads, so that other processes disturb them less. The share is the median over the rounds; the peak is the kernel's
(VmHWM), from the start of the interpreter to the end of the last step. Beside it is the peak of a process that
only runs the same graph and batch in onnxruntime, with its own settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from machine import peak_rss, write

import pocketzo as pz


def batch_of(bundle: pz.Bundle, examples: int, tokens: int) -> dict[str, Any]:
    """Return random tokens, and the positions that count."""
    rng, size = np.random.default_rng(0), examples * tokens
    count = min(size, max(16, size // 8))
    arrays = {
        "input_ids": rng.integers(0, 1000, (examples, tokens)),
        "attention_mask": np.ones((examples, tokens)),
        "position_ids": np.tile(np.arange(tokens), (examples, 1)),
        "positions": np.sort(rng.permutation(size)[:count]),
        "targets": rng.integers(0, 1000, count),
    }
    if bundle.logits is not None:  # a prompt
        arrays["positions"] = tokens * np.arange(examples) + tokens // 2
        arrays["labels"] = rng.integers(0, len(bundle.labels or ()), examples)
    return {value.name: arrays[value.name].astype(value.dtype) for value in bundle.inputs}


def inference(path: str, examples: int, tokens: int, threads: int) -> dict[str, float]:
    """Run the graph as any program does."""
    bundle, options = pz.Bundle.read(path), ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(bundle.model_path, options, providers=["CPUExecutionProvider"])
    session.run([bundle.loss], batch_of(bundle, examples, tokens))
    return {"peak": peak_rss()}


def training(path: str, examples: int, tokens: int, threads: int, rounds: int) -> dict[str, float]:
    """Take steps and forward passes in turn."""
    model = pz.load(path, threads=threads)
    optimizer, batch = pz.MeZO(model, lr=1e-4), batch_of(model.bundle, examples, tokens)
    times: dict[str, list[float]] = {"step": [], "forwards": []}
    for _ in range(rounds + 1):  # the first is to warm up
        started = time.process_time()
        optimizer.step(lambda model: model.loss(batch))
        model.weights.flush()
        between = time.process_time()
        model.loss(batch)
        model.loss(batch)
        times["step"].append(between - started)
        times["forwards"].append(time.process_time() - between)
    steps, forwards = (np.array(taken[1:]) for taken in times.values())
    return {
        "parameters": optimizer.parameters,
        "step": float(np.median(steps)),
        "ratio": float(np.median(steps / forwards)),
        "peak": peak_rss(),
    }


def make(shape: str, folder: Path) -> list[str]:
    """Write a shape's bundles in float32 and int4, unless they exist; return them as arguments."""
    from paper import in_a_process, write_checkpoint

    arguments, checkpoint = [], folder / f"{shape}-checkpoint"
    if not checkpoint.exists():
        in_a_process(write_checkpoint, shape, checkpoint)
    for dtype in ("float32", "int4"):
        bundle, graph = folder / f"frozen-{shape}-{dtype}", folder / f"{shape}-{dtype}-onnx" / "model.onnx"
        if not bundle.exists():
            in_a_process(write_graph, checkpoint, dtype, graph)
            in_a_process(write_bundle, shape, graph, bundle)
            shutil.rmtree(graph.parent)
        arguments.append(f"{shape}-{dtype}={bundle}")
    return arguments


def write_graph(checkpoint: Path, dtype: Any, graph: Path) -> None:
    from pocketzo.export import export

    export(checkpoint, graph, dtype=dtype)


def write_bundle(shape: str, graph: Path, bundle: Path) -> None:
    from paper import WORDS

    settings: dict[str, Any] = {"task": "causal-lm"}
    if shape == "roberta-large":
        settings = {"task": "prompt", "template": "{text} It was {mask} .", "label_words": WORDS}
    pz.prepare(graph, bundle, train="lora", **settings)


WORKERS: dict[str, Callable[..., dict[str, float]]] = {"training": training, "inference": inference}


def measured(kind: str, *settings: str) -> dict[str, float]:
    """Return what one of the functions does in a fresh process."""
    command = [sys.executable, __file__, "--worker", kind, *settings]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, path, *numbers = sys.argv[2:]
        print(json.dumps(WORKERS[kind](path, *map(int, numbers))))
        return
    from paper import SHAPES  # not above: it would count in the peaks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="NAME=BUNDLE")
    parser.add_argument("--batches", nargs="+", default=["1x16", "8x64"])
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rounds", default="9")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", nargs="+", choices=SHAPES, default=[])
    parser.add_argument("--models", type=Path, default=Path())
    arguments = parser.parse_args()
    if arguments.make:
        for shape in arguments.make:
            print("python bench/frozen.py", *make(shape, arguments.models), flush=True)
        return
    rows = []
    print("| base | batch | trained numbers | step, CPU s | step / two forwards | peak, training | peak, inference |")
    print("|---|---|---|---|---|---|---|")
    for name, path in (text.split("=", 1) for text in arguments.bundles):
        for batch in arguments.batches:
            settings = path, *batch.split("x"), arguments.threads
            row = measured("training", *settings, arguments.rounds)
            row["inference"] = measured("inference", *settings)["peak"]
            rows.append({"base": name, "batch": batch, **row})
            print(
                f"| {name} | {batch.replace('x', ' x ')} | {row['parameters']:,} | {row['step']:.3f} "
                f"| {row['ratio']:.3f} | {row['peak'] / 1e6:.0f} MB | {row['inference'] / 1e6:.0f} MB |",
                flush=True,
            )
    write(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
