"""Resident memory over time of loading and a few training steps: PocketZO, MeZO in PyTorch, AdamW in PyTorch.

    python bench/memory.py [--models DIR] [--steps 3] [--json FILE] [--plot PNG]    # measure and draw
    python bench/memory.py --draw                                                   # redraw from the JSON file
    python bench/memory.py --small                                                  # smoke run; writes nothing

    default    MeZO by PocketZO, with the weights' layout that it chooses
    torch      MeZO in PyTorch, as its paper's code does it (torch_peers.py)
    adamw      AdamW in PyTorch, by backpropagation (torch_peers.py)

All three train the same random float32 weights in RoBERTa-large's shape on the same batch of 8 x 64 tokens. Each runs
alone in a fresh process, whose resident set (/proc/PID/statm) this process samples every 10 ms, from the start of the
interpreter to the end of the last step. The peak is the kernel's own figure (VmHWM). The file leaves out the samples
that linear interpolation between the others restores to within 0.5% of the highest peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import Run, peak_rss, peer
from models import make_bundle, parameters
from step import SAME_LOSS, models_folder, start, usable
from tables import RESULTS, TITLES, TRAINING, memory_table

Curve = dict[str, Any]

INTERVAL = 0.01  # seconds between samples
TOLERANCE = 0.005  # of the highest peak
COLORS = {"default": "#0550ae", "torch": "#bc4c00", "adamw": "#6e40c9"}
INK, FAINT = "#1f2328", "#656d76"


def worker(system: str, shape: str, bundle: str, batch: str, threads: str, steps: str) -> None:
    """Load a system and take the steps; print the loss before them, the end of each phase in seconds, and the peak."""
    step, loss, _ = start(system, shape, Path(bundle), batch, int(threads))
    ends = [time.monotonic()]
    for _ in range(int(steps)):
        step()
        ends.append(time.monotonic())
    print(json.dumps({"loss": loss, "ends": ends, "peak": peak_rss()}))


def measure(system: str, *settings: str) -> Curve:
    """Run one worker and sample its resident set; seconds count from the start of its process."""
    samples: list[tuple[float, int]] = []
    began = time.monotonic()
    command = [sys.executable, __file__, "--worker", system, *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        statm, page = Path(f"/proc/{process.pid}/statm"), os.sysconf("SC_PAGE_SIZE")
        while process.poll() is None:
            samples.append((time.monotonic() - began, int(statm.read_text().split()[1]) * page))
            time.sleep(INTERVAL)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        sys.exit(f"the process of {system} ended with exit code {process.returncode}")
    answer = json.loads(output)
    loaded, *steps = (end - began for end in answer["ends"])
    kept = [sample for sample in samples if sample[0] <= steps[-1]]  # later ones see the process exit
    return {"system": system, "loss": answer["loss"], "peak": answer["peak"], "loaded": loaded, "steps": steps} | dict(
        zip(("seconds", "bytes"), map(list, zip(*kept, strict=True)), strict=True)
    )


def thin(curve: Curve, tolerance: float) -> None:
    """Leave out samples that linear interpolation between the others restores to within ``tolerance`` bytes."""
    x, y = np.array(curve["seconds"]), np.array(curve["bytes"], float)
    keep = {0, len(x) - 1}
    spans = [(0, len(x) - 1)]
    while spans:  # Ramer, Douglas and Peucker
        first, last = spans.pop()
        inner = slice(first + 1, last)
        if inner.start >= inner.stop:
            continue
        error = np.abs(y[inner] - np.interp(x[inner], x[[first, last]], y[[first, last]]))
        if error.max() > tolerance:
            middle = inner.start + int(error.argmax())
            keep.add(middle)
            spans += [(first, middle), (middle, last)]
    for name in ("seconds", "bytes"):
        curve[name] = [curve[name][index] for index in sorted(keep)]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the curves for a width of 900 pixels, at twice that resolution."""
    pyplot = peer("matplotlib.pyplot")
    if pyplot is None:
        return
    results = report["results"]
    curves, weights = results["curves"], results["weights"] / 1e9
    figure = pyplot.figure(figsize=(9, 4.3))
    axes = figure.add_axes((0.045, 0.12, 0.935, 0.73))
    halo = [peer("matplotlib.patheffects").withStroke(linewidth=4, foreground="white")]

    def label(text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> Any:
        style |= {"textcoords": "offset points", "path_effects": halo, "annotation_clip": False}
        return axes.annotate(text, at, offset, **style)

    right = 0.0  # where the longest curve with its label ends
    for curve in curves:
        color = COLORS[curve["system"]]
        x, y = np.array(curve["seconds"]), np.array(curve["bytes"]) / 1e9
        axes.plot(x, y, color=color, linewidth=1.8, solid_joinstyle="round")
        axes.plot(curve["steps"], np.interp(curve["steps"], x, y), "o", color=color, markersize=5.5)
        end = (x[-1], y[-1])
        label(f"peak {curve['peak'] / 1e9:.1f} GB", end, (9, -2), va="bottom", color=color, size=10)
        name = label(TRAINING[curve["system"]], end, (9, 12), va="bottom", color=color, size=11, weight="bold")
        share = (name.get_window_extent().width + 30) / axes.get_window_extent().width
        right = max(right, x[-1] / (1 - share))
    axes.set(xlim=(0, right), ylim=(0, 1.08 * max(curve["peak"] for curve in curves) / 1e9))
    axes.axhline(weights, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    label(f"weights alone {weights:.1f} GB", (right, weights), (-2, -4), ha="right", va="top", color=FAINT, size=10)
    axes.set_xlabel("seconds from the start of the process", color=FAINT)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.tick_params(length=0, colors=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd2")

    title = f"Resident memory, GB: loading and {len(curves[0]['steps'])} training steps"
    figure.text(0.012, 0.945, title, color=INK, size=13, weight="bold")
    size = f"{TITLES[results['shape']]}'s shape ({results['parameters'] / 1e6:,.0f} M parameters, float32)"
    about = f"{size}, batches of {results['batch'].replace('x', ' x ')} tokens; a dot is the end of a step"
    figure.text(0.012, 0.89, about, color=FAINT, size=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, pil_kwargs={"optimize": True})


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="keep the prepared model in this folder (default: a temporary one)")
    parser.add_argument("--systems", nargs="+", choices=TRAINING, default=list(TRAINING))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="MiniLM's shape; writes only the files that are named")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw what the JSON file holds")
    parser.add_argument("--json", type=Path, help="the figures, with the machine (default: bench/results/memory.json)")
    parser.add_argument("--plot", type=Path, help="the picture; needs matplotlib (default: bench/results/memory.png)")
    arguments = parser.parse_args()
    if not arguments.small:
        arguments.json = arguments.json or RESULTS / "memory.json"
        arguments.plot = arguments.plot or RESULTS / "memory.png"

    if arguments.draw:
        report = json.loads(arguments.json.read_text(encoding="utf-8"))
    else:
        shape, batch = "minilm" if arguments.small else "roberta-large", "8x64"
        run = Run()
        with models_folder(arguments.models) as folder:
            bundle = make_bundle(shape, folder)
            weights = 4 * parameters(bundle)
            settings = (shape, str(bundle), batch, str(arguments.threads), str(arguments.steps))
            curves = []
            for system in usable(arguments.systems):
                curves.append(measure(system, *settings))
                print(f"{system}: {curves[-1]['peak'] / 1e9:.3f} GB", file=sys.stderr, flush=True)
        for curve in curves:
            if abs(curve["loss"] - curves[0]["loss"]) > SAME_LOSS * abs(curves[0]["loss"]):
                sys.exit(f"{curve['system']} starts at a loss of {curve['loss']}, the others at {curves[0]['loss']}")
            thin(curve, TOLERANCE * max(each["peak"] for each in curves))
        results = {"shape": shape, "batch": batch, "threads": arguments.threads, "parameters": weights // 4}
        results |= {"weights": weights, "curves": curves}
        report = run.finish(results, arguments.json)
    print("\n".join(memory_table(report)))
    if arguments.plot is not None:
        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
