"""Several directions in one forward pass: what an estimate takes, and its variance, against the number of directions.

    python bench/queries.py time fp32=BUNDLE int4=BUNDLE [--batches 1x4 16x64] [--queries 1 2 4 8] [--rounds 3]
    python bench/queries.py variance NAME=BUNDLE --gguf FILE --texts FILE [--queries 1 2 4 8] [--batches 12]

Both take ``--json FILE``.

Each BUNDLE is of SmolLM2-135M, exported from FILE and prepared with ``--task causal-lm --train lora:train=B``.

time: an estimate is a step of MeZO without its update, with Q directions: two losses for each. Tokens are random, and
logits are computed at one position in eight of the larger batches, at all of up to 16 tokens. Estimates one direction
after the other, and together with ``share`` "batch" and "split", take turns in one process over one session; times are
of the CPU, of one thread, so that other processes disturb them less, and medians of the rounds.

variance: of the estimate from a random batch of 16 texts, around the exact gradient of the mean loss of 128 texts,
which PyTorch computes by backpropagation from the GGUF file that the bundle was exported from. The figure is the mean
squared distance, divided by the squared length of the gradient.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from frozen import batch_of
from machine import Run
from numpy.typing import NDArray
from tables import queries_table, variance_table

import pocketzo as pz
from pocketzo.data.load import load_dataset
from pocketzo.optim.optimizer import Share
from pocketzo.tasks.objective import Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of

Report = dict[str, Any]
WAYS: dict[str, Share | None] = {"one by one": None, "batch": "batch", "split": "split"}
EPS, EXAMPLES, TEXTS = 1e-3, 16, 128


def objective_on(model: pz.Model, batch: Any, queries: int) -> OnBatch:
    """Return the loss of a batch as the trainer has it."""
    return OnBatch(Objective(metric_objective("loss", model.bundle), task_of(model.bundle)), batch, queries)


def optimizer_of(model: pz.Model, queries: int, share: Share | None, seed: int = 0) -> pz.MeZO:
    """Return MeZO with a learning rate of 0: what a step records are then differences of losses."""
    return pz.MeZO(model, lr=0.0, eps=EPS, queries=queries, share=share, exact=True, seed=seed)


# ---- time ------------------------------------------------------------------------------------------------------------


def times_of(path: str, examples: int, tokens: int, most: list[int], rounds: int) -> Iterator[Report]:
    """Yield the seconds of an estimate, for each number of directions."""
    model = pz.load(path, threads=1, queries=True)
    batch = batch_of(model.bundle, examples, tokens)
    for queries in most:
        ways = {name: share for name, share in WAYS.items() if share != "split" or queries <= examples}
        made = {name: optimizer_of(model, queries, share) for name, share in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):  # the first is to warm up
            for name, optimizer in made.items():
                started = time.process_time()
                optimizer.step(objective_on(model, batch, queries))
                seconds[name].append(time.process_time() - started)
        medians = {name: float(np.median(taken[1:])) for name, taken in seconds.items()}
        yield {"batch": f"{examples}x{tokens}", "queries": queries, "seconds": medians}


def measure_time(arguments: argparse.Namespace, run: Run) -> None:
    """Print a row for each base, batch and number of directions."""
    rows = []
    for name, path in (text.split("=", 1) for text in arguments.bundles):
        for batch in arguments.shapes:
            examples, tokens = map(int, batch.split("x"))
            for row in times_of(path, examples, tokens, arguments.queries, arguments.rounds):
                rows.append({"base": name, **row})
                report = run.finish({"rows": rows, "rounds": arguments.rounds}, arguments.json)
                print(queries_table(report)[-1], flush=True)
    print("\n".join(queries_table(report)))


# ---- variance --------------------------------------------------------------------------------------------------------


def exact_gradient(arguments: argparse.Namespace, tensors: dict[str, NDArray[Any]], data: Any) -> dict[str, Any]:
    """Return the gradient by the trained matrices, by name, and the loss, from PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.gguf.parent, gguf_file=arguments.gguf.name, dtype=torch.float32
    )
    model.requires_grad_(False)
    ups: dict[str, Any] = {}
    for name, value in tensors.items():
        if not name.endswith("lora_B"):
            continue
        layer = int(re.search(r"\d+", name)[0])  # type: ignore[index]
        role = "q_proj" if re.search(r"q_proj|attn_q", name) else "v_proj"
        down = torch.from_numpy(tensors[name[:-1] + "A"].copy())
        ups[name] = torch.from_numpy(value.copy()).requires_grad_()
        getattr(model.model.layers[layer].self_attn, role).register_forward_hook(_hook(down, ups[name]))
    losses, count = [], 0
    for start in range(0, len(data), EXAMPLES):
        batch = data.batch(np.arange(start, start + EXAMPLES))
        logits = model(
            torch.from_numpy(batch["input_ids"]), attention_mask=torch.from_numpy(batch["attention_mask"])
        ).logits.flatten(0, 1)[torch.from_numpy(batch["positions"])]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch["targets"]), reduction="sum")
        loss.backward()
        losses.append(float(loss.detach()))
        count += batch["targets"].size
    first = losses[0] / data.batch(np.arange(EXAMPLES))["targets"].size
    return {
        "loss": sum(losses) / count,
        "first": first,
        "gradient": {name: up.grad.numpy() / count for name, up in ups.items()},
    }


def _hook(down: Any, up: Any) -> Callable[[Any, Any, Any], Any]:
    return lambda _, inputs, output: output + 2.0 * (inputs[0] @ down @ up)  # alpha / r = 16 / 8


def flat(arrays: dict[str, NDArray[Any]], names: list[str]) -> NDArray[np.float64]:
    """Return arrays as one vector."""
    return np.concatenate([arrays[name].ravel() for name in names]).astype(np.float64)


def measure_variance(arguments: argparse.Namespace, run: Run) -> None:
    """Print a row for each number of directions."""
    base, path = arguments.bundle.split("=", 1)
    bundle = pz.Bundle.read(path)
    texts = [line.split("\t")[0] for line in arguments.texts.read_text().splitlines()]
    texts = [text for text in texts if 4 <= len(text.split()) <= 6][:TEXTS]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "texts.jsonl")
        kept.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
        data = load_dataset(kept, bundle)
    model = pz.load(bundle, threads=1, queries=True)
    names = [tensor.name for tensor in bundle.tensors if tensor.trainable]
    ids = {tensor.name: tensor.id for tensor in bundle.tensors}
    found = exact_gradient(arguments, {name: model.weights[name] for name in bundle_matrices(bundle)}, data)
    loss = objective_on(model, data.batch(np.arange(EXAMPLES)), 1)(model)
    gradient = flat(found["gradient"], names)
    squared = float(gradient @ gradient)
    print(
        f"loss of {len(data)} texts {found['loss']:.4f}; of the first {EXAMPLES} {found['first']:.4f}, here {loss:.4f}"
    )
    print(f"|g| {np.sqrt(squared):.4g} of {gradient.size:,} numbers", flush=True)
    rng = np.random.default_rng(0)
    distances: dict[tuple[str, int], list[float]] = {}
    shares: list[float] = []  # of the gradient in an estimate, 1 on average

    def direction(seed: int, draw: int) -> NDArray[np.float64]:
        sizes = {name: model.weights[name].size for name in names}
        return flat(
            {name: pz.kernels.noise(sizes[name], seed=seed, tensor=ids[name], draw=draw) for name in names}, names
        )

    most = max(arguments.queries)
    for number in range(arguments.batches):
        batch = data.batch(rng.choice(len(data), EXAMPLES, replace=False))
        for queries in arguments.queries:
            for share in ("batch", "split"):
                if (share == "batch" and queries != most) or (share == "split" and queries == 1):
                    continue  # these are some of the directions of the most
                for again in range(1 if share == "batch" else most // queries):
                    seed = number * 1000 + again * 100 + queries + (50 if share == "split" else 0)
                    info = optimizer_of(model, queries, share, seed).step(objective_on(model, batch, queries))
                    slope = (np.array(info.losses[::2]) - info.losses[1::2]) / (2 * EPS)
                    z = np.stack([direction(seed, draw) for draw in range(queries)])
                    if share == "split":
                        estimate = slope @ z / queries
                        distances.setdefault((share, queries), []).append(float(((estimate - gradient) ** 2).sum()))
                        continue
                    shares.append(float(slope @ (z @ gradient)) / queries / squared)
                    for count in arguments.queries:
                        for start in range(0, most - count + 1, count):
                            own = slice(start, start + count)
                            estimate = slope[own] @ z[own] / count
                            distances.setdefault((share, count), []).append(float(((estimate - gradient) ** 2).sum()))
        print(f"batch {number + 1} of {arguments.batches}", flush=True)
    print(f"the gradient's share of an estimate: {np.mean(shares):.2f} ± {np.std(shares) / np.sqrt(len(shares)):.2f}")
    rows = []
    for queries in arguments.queries:
        row: Report = {"queries": queries}
        for share in ("batch", "split"):
            values = np.array(distances[share if queries > 1 else "batch", queries]) / squared
            row[share] = {"mean": float(values.mean()), "error": float(values.std() / np.sqrt(values.size))}
        rows.append(row)
    about = {"base": base, "batches": arguments.batches, "texts": len(data)}
    result = {**about, "rows": rows, "parameters": gradient.size, "loss": found["loss"], "squared": squared}
    print("\n".join(variance_table(run.finish(result, arguments.json))))


def bundle_matrices(bundle: pz.Bundle) -> list[str]:
    """Return the names of the matrices of LoRA, trained or not."""
    return [tensor.name for tensor in bundle.tensors if re.search(r"\.lora_[AB]$", tensor.name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    timed = commands.add_parser("time")
    timed.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    timed.add_argument("--batches", dest="shapes", nargs="+", default=["1x4", "1x16", "4x16", "8x64", "16x64"])
    timed.add_argument("--rounds", type=int, default=3)
    timed.set_defaults(measure=measure_time)
    varying = commands.add_parser("variance")
    varying.add_argument("bundle", metavar="NAME=BUNDLE")
    varying.add_argument("--gguf", type=Path, required=True)
    varying.add_argument("--texts", type=Path, required=True, help="a text a line; what follows a tab is left out")
    varying.add_argument("--batches", type=int, default=12)
    varying.set_defaults(measure=measure_variance)
    for command in (timed, varying):
        command.add_argument("--queries", type=int, nargs="+", default=[1, 2, 4, 8])
        command.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.measure(arguments, Run())


if __name__ == "__main__":
    main()
