"""A night on the charger: accuracy on SST-2 against the number of forward passes, SmolLM2 with LoRA behind a cut.

    python bench/night.py RUN MODEL.onnx [SST2_FOLDER] [--forwards 20000] [--method mezo] [--json FILE] [--plot FILE]
                          [--beside learning.json]

Training is on 1,024 sentences, as in learning.py, with the learning rate of `--lr auto`. The run is kept in RUN, and
the same command goes on with it. What is held out is looked at when the run has ended: the journal is replayed to
steps on a logarithmic scale. The picture has the levels of AdamW, the side head and the linear probe on the same
sentences, from learning.py's JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from learning import BATCH, LAST_THIRD, METHODS, Task, decoder_tasks, load_behind_cut, sst2_files
from machine import Run, peer
from sst2 import SST2
from tables import night_table

import pocketzo as pz

POINTS = 12  # evaluations


def train(task: Task, arguments: argparse.Namespace, folder: Path) -> pz.Run:
    """Train until the last step, or go on with what is there."""

    def told(progress: pz.Progress) -> None:
        if progress.info.step % 100 == 0:
            print(f"step {progress.info.step}, loss {progress.info.loss}", file=sys.stderr, flush=True)

    bundle = task.bundle(LAST_THIRD, folder)
    examples = pz.load_dataset(task.train, bundle)
    if (arguments.run / "journal.pzj").exists():
        trainer = pz.Trainer.resume(arguments.run, examples, callback=told)
    else:
        steps = round(arguments.forwards / METHODS[arguments.method].evaluations())
        model = load_behind_cut(bundle, (examples,), arguments.forwards, arguments.threads)
        optimizer = METHODS[arguments.method](
            model, lr="auto", seed=arguments.seed, schedule=pz.Schedule("linear", steps)
        )
        trainer = pz.Trainer(
            model, optimizer, examples, batch_size=BATCH, steps=steps, run=arguments.run, group_by_length=True,
            callback=told,
        )  # fmt: skip
    if trainer.optimizer.step_number < trainer.loop.steps:
        trainer.fit()
    return pz.Run(arguments.run)


def points(run: pz.Run, task: Task, forwards: int, threads: int) -> list[dict[str, Any]]:
    """Evaluate the weights after some numbers of steps."""
    bundle = run.base()
    held_out = pz.load_dataset(task.held_out, bundle)
    model = load_behind_cut(bundle, (held_out,), POINTS * len(held_out) // BATCH, threads)
    least = max(1, round(100 / forwards))
    steps = sorted({0, *np.geomspace(least, run.steps, POINTS).round().astype(int).tolist()})
    found = []
    for step in steps:
        run.replay_onto(model, step=step)
        values = pz.evaluate(model, held_out)
        found.append(
            {"step": step, "forwards": step * forwards, **{name: values[name] for name in ("accuracy", "loss")}}
        )
        print(found[-1], file=sys.stderr, flush=True)
    return found


def levels(report: Path | None, task: Task) -> dict[str, float]:
    """Return the mean accuracy of what is beside, by name."""
    if report is None:
        return {}
    rows = json.loads(report.read_text())["results"]["rows"]
    names = {
        "AdamW on the same LoRA": f"{task.name} | {LAST_THIRD} | AdamW",
        "side head": f"{task.name} | side head",
        "linear probe": f"{task.name} | linear probe",
    }
    found = {name: [row["value"] for row in rows if row["name"].startswith(start)] for name, start in names.items()}
    return {name: statistics.mean(values) for name, values in found.items() if values}


def draw(results: dict[str, Any], path: Path) -> None:
    pyplot = peer("matplotlib.pyplot")
    if pyplot is None:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    rows = results["points"]
    axes.plot([max(1, row["forwards"]) for row in rows], [100 * row["accuracy"] for row in rows], marker="o")
    axes.set_xscale("symlog", linthresh=100)
    for style, (name, value) in zip(("--", "-.", ":"), results["levels"].items(), strict=False):
        axes.axhline(100 * value, color="0.4", linestyle=style, linewidth=1)
        axes.annotate(name, (1, 100 * value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_xlabel(f"forward passes of {BATCH} sentences")
    axes.set_ylabel("accuracy on SST-2's dev, %")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, which is made or gone on with")
    parser.add_argument("decoder", type=Path, help="an export of SmolLM2")
    parser.add_argument("data", nargs="?", type=Path, default=SST2, help="folder with train.tsv and dev.tsv")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the prepared model and the sentences are kept"
    )
    parser.add_argument("--forwards", type=int, default=20000)
    parser.add_argument("--method", choices=METHODS, default="fzoo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beside", type=Path, help="learning.py's JSON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="the picture; needs matplotlib")
    arguments = parser.parse_args()
    measured = Run()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    task, _ = decoder_tasks(arguments.decoder, *sst2_files(arguments.data, arguments.folder))
    run = train(task, arguments, arguments.folder)
    found = points(run, task, METHODS[arguments.method].evaluations(), arguments.threads)
    lines = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    results = {
        "points": found,
        "levels": levels(arguments.beside, task),
        "lr": run.recipe.method["lr"],
        "method": arguments.method,
        "seconds": sum(line.get("seconds", 0.0) for line in lines),
    }
    report = measured.finish(results, arguments.json)
    if arguments.plot is not None:
        draw(results, arguments.plot)
    print("\n".join(night_table(report)))


if __name__ == "__main__":
    main()
