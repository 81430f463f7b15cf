"""AdamW beside the demo's notes: the same LoRA, trained by backpropagation on the same page.

    python bench/notes.py DEMO [--gguf FILE] [--lrs 3e-3 1e-2] [--steps 50] [--threads 2] [--json FILE]

DEMO is the folder that `pocketzo demo notes` has written, with `base` and `run`. transformers runs the same GGUF file,
in float32, with the bundle's LoRA on its projections: the same A, B from 0, the same notes, all in each step.
The learning rate is that with the lowest loss on the page after training; the questions are looked at once, with that
one. The trained B are then written into the bundle's weights, so that both rows of the table come from the same graph
and the same code. Seconds and peak memory are those of AdamW in a process of its own.

Needs the extra 'export'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lora_peers import add_lora
from machine import Run, peak_rss
from safetensors.numpy import load_file, save_file
from tables import notes_table

import pocketzo as pz
from pocketzo.demo import notes
from pocketzo.demo.smollm2 import find_gguf
from pocketzo.export.gguf import open_gguf
from pocketzo.train.run import METRICS


def adamw(path: Path, gguf: Path, lr: float, steps: int, threads: int, target: Path) -> dict[str, float]:
    """Train by AdamW, write the matrices B, and return the loss on the page, the seconds and the peak memory."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = open_gguf(gguf).model
    ups = add_lora(torch, model, pz.Bundle.read(path))
    page = pz.load_dataset(notes.PAGE, pz.Bundle.read(path))

    everything = page.batch(np.arange(len(page)))
    batch = {name: torch.from_numpy(np.asarray(value)).long() for name, value in everything.items()}

    def loss() -> Any:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch["positions"]], batch["targets"])

    optimizer = torch.optim.AdamW(ups.values(), lr=lr, weight_decay=0.0)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    peak = peak_rss()
    save_file({name: up.detach().numpy() for name, up in ups.items()}, target)
    with torch.inference_mode():
        return {"lr": lr, "loss": float(loss()), "seconds": seconds, "peak": peak}


def row_of(model: pz.Model, page: pz.Dataset, questions: pz.Dataset) -> dict[str, Any]:
    """Return what a model has learnt."""
    found = notes.examine(model, questions)
    return {"page": pz.evaluate(model, page)["perplexity"], "answers": found.perplexity, "right": found.right}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        path, gguf, lr, steps, threads, target = sys.argv[2:]
        print(json.dumps(adamw(Path(path), Path(gguf), float(lr), int(steps), int(threads), Path(target))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run, base, past = Run(), arguments.demo / "base", pz.Run(arguments.demo / "run")
    model = pz.load(base, threads=arguments.threads)
    page, questions = (pz.load_dataset(file, model.bundle) for file in (notes.PAGE, notes.QUESTIONS))
    rows: dict[str, Any] = {"base": row_of(model, page, questions)}
    past.replay_onto(model)
    lines = map(json.loads, (past.path / METRICS).read_text(encoding="utf-8").splitlines())
    seconds = sum(line.get("seconds", 0.0) for line in lines)
    rows["pocketzo"] = row_of(model, page, questions) | {"seconds": seconds, "steps": past.steps}

    with tempfile.TemporaryDirectory() as folder:
        tried = {}
        for number, lr in enumerate(arguments.lrs):
            up = Path(folder, f"{number}.safetensors")
            settings = base, find_gguf(arguments.gguf), lr, arguments.steps, arguments.threads, up
            command = [sys.executable, __file__, "--worker", *map(str, settings)]
            tried[up] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(tried[up], file=sys.stderr, flush=True)
        best = min(tried, key=lambda up: tried[up]["loss"])
        for name, values in load_file(best).items():
            model.weights[name] = values
    rows["adamw"] = tried[best] | row_of(model, page, questions) | {"steps": arguments.steps}
    results = {"rows": rows, "tried": list(tried.values()), "questions": len(questions), "train": notes.TRAIN}
    report = run.finish(results, arguments.json)
    print("\n".join(notes_table(report)))
    recorded = report["results"]["rows"]["adamw"]
    figures = ", ".join(f"{name}={recorded[name]}" for name in ("page", "answers", "right", "steps", "peak"))
    print(f"\nfor pocketzo/demo/notes.py: BACKPROPAGATION = Recorded({figures})")


if __name__ == "__main__":
    main()
