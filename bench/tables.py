"""Generates the tables of README.md and bench/README.md from the figures in bench/results/.

    python bench/tables.py            # rewrite the text between the markers <!-- table: NAME --> and <!-- end -->
    python bench/tables.py --check    # change nothing; fail if a table differs from its figures, or they are missing

The scripts that measure print their tables by the same functions.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "bench" / "README.md")
Report = dict[str, Any]

WORK = {
    "scale": "w *= s, in place",
    "add gaussian": "w += s z, Gaussian",
    "add rademacher": "w += s z, Rademacher",
    "step gaussian": "two z in one pass, Gaussian",
    "step rademacher": "two z in one pass, Rademacher",
    "add low rank": "w += s z, rank 2",
    "step low rank": "two z in one pass, rank 2",
}
# Fractions of the in-place scale's speed.
NOISE_TARGETS = {
    ("pocketzo, avx512", "add gaussian"): 0.62,
    ("pocketzo, avx2", "add gaussian"): 0.38,
    ("pocketzo, avx512", "add rademacher"): 0.9,
    ("pocketzo, avx2", "add rademacher"): 0.9,
}
TORCH_NOISE_TARGET = 20  # times torch.normal + add, 2 threads

# The cores of cycles.py; CYCLE_TARGETS are in this order, in cycles per element by llvm-mca.
CORES = {"cortex-a55": "Cortex-A55", "neoverse-n1": "Neoverse N1 (A76 to A78)", "neoverse-v1": "Neoverse V1 (X1)"}
OPERATIONS = {
    "gaussian1": "w += s z, Gaussian",
    "gaussian2": "two scales of one z, Gaussian",
    "gaussian3": "three scales of one z, Gaussian",
    "two": "two z in one pass, Gaussian",
    "gaussian0": "generate, Gaussian",
    "rademacher1": "w += s z, Rademacher",
    "rademacher2": "two scales of one z, Rademacher",
    "rademacher3": "three scales of one z, Rademacher",
    "rademacher0": "generate, Rademacher",
    "shrink": "w -= s w",
    "words": "raw words",
}
CYCLE_TARGETS = {"gaussian1": (13, 5.6, 2.7), "rademacher1": (1.7, 0.75, 0.31)}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def caption(*reports: Report) -> str:
    """Return machines, versions, dates and commands of some results, each distinct one once."""
    machines = [report["machine"] for report in reports]
    places = list(
        dict.fromkeys(f"{m['cpu']} ({m['isa']}), {m['cores']} cores, {m['memory'] / 2**30:.0f} GiB" for m in machines)
    )
    versions: dict[str, list[str]] = {}
    for m in machines:
        for name, version in m["versions"].items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    dates = sorted({m["date"] for m in machines})
    commands = dict.fromkeys(f"`{m['command']}`" for m in machines)
    busy = max(m["busy"] for m in machines)
    return (
        f"*{'; '.join(places)}{f', {busy:.0%} busy with other work' if busy > 0.05 else ''}; "
        + ", ".join(f"{name} {'/'.join(each)}" for name, each in versions.items())
        + f"; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. {', '.join(commands)}*"
    )


def verdict(value: float, target: float, *, at_most: bool, unit: str = "") -> str:
    """Return the target and whether it is met."""
    met = value <= target if at_most else value >= target
    return f"{'<=' if at_most else '>='} {target:g}{unit}: {'met' if met else 'not met'}"


def of_noise(report: Report) -> tuple[dict[tuple[str, str, int], Report], dict[int, Report]]:
    """Return the rows by system, work and threads, and the fastest in-place scale for each number of threads."""
    rows = {(row["system"], row["work"], row["threads"]): row for row in report["results"]["rows"]}
    bounds: dict[int, Report] = {}
    for (_, work, threads), row in rows.items():
        if work == "scale" and (threads not in bounds or row["median"] < bounds[threads]["median"]):
            bounds[threads] = row
    return rows, bounds


def noise_table(report: Report) -> list[str]:
    rows, bounds = of_noise(report)
    elements = max(row["elements"] for row in rows.values())
    threads = sorted(bounds)
    header = ["", ""]
    for n in threads:
        header += [f"{n} thread{'s' * (n > 1)}, ns per element", "of the bound"]
    body = []
    for system, work in dict.fromkeys((system, work) for system, work, _ in rows):
        target = NOISE_TARGETS.get((system, work))
        cells = []
        for n in threads:
            row = rows[system, work, n]
            low, median, high = (row[key] / row["elements"] * 1e9 for key in ("low", "median", "high"))
            fraction = bounds[n]["median"] / bounds[n]["elements"] * 1e9 / median
            cells += [f"{median:.3f} ({low:.3f} to {high:.3f})", f"{fraction:.2f}"]
            if target is not None:
                cells[-1] += ", met" if fraction >= target else ", not met"
        body.append([system, WORK[work], *cells, "" if target is None else f">= {target}"])
    lines = [
        caption(report),
        "",
        f"{elements * 4 / 2**30:g} GiB of float32; medians (and quartiles) of at least "
        f"{min(row['repeats'] for row in rows.values())} passes. The bound is the fastest in-place scale: "
        + ", ".join(f"{bounds[n]['system']} with {n} thread{'s' * (n > 1)}" for n in threads)
        + ".",
        "",
        *markdown([*header, "target"], body),
    ]
    if ("torch", "add gaussian", threads[-1]) in rows:
        first = next(iter(rows))[0]
        n = threads[-1]
        times = rows["torch", "add gaussian", n]["median"] / rows[first, "add gaussian", n]["median"]
        lines += [
            "",
            f"{first} is {times:.1f} times as fast as torch.normal, then add, with {n} threads; target "
            f"{verdict(times, TORCH_NOISE_TARGET, at_most=False)}.",
        ]
    return lines


SYSTEM = {
    "forwards": "two forwards, onnxruntime's defaults",
    "running": "two forwards, PocketZO's session",
    "prepacked": "**step, prepacked**",
    "plain": "**step, plain layout**",
    "torch": "step, PyTorch",
}


def size(value: float) -> str:
    """Bytes in powers of 10."""
    for unit, digits, name in ((1e9, 2, "GB"), (1e6, 1, "MB")):
        if value >= unit:
            return f"{value / unit:.{digits}f} {name}"
    return f"{value / 1e3:.1f} kB"


def seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def of_steps(report: Report) -> dict[tuple[str, str, str], Report]:
    """Return the rows by shape, batch and system."""
    return {
        (cell["shape"], cell["batch"], row["system"]): row
        for cell in report["results"]["cells"]
        for row in cell["rows"]
    }


def step_targets(report: Report) -> list[list[str]]:
    """Return a row for each target that was measured: what is compared, the value, the verdict."""
    rows = of_steps(report)
    result = []

    def add(what: str, value: float | None, target: float, *, at_most: bool = True, unit: str = "") -> None:
        if value is not None:
            result.append([what, f"{value:.3f}{unit}", verdict(value, target, at_most=at_most, unit=unit)])

    def best(shape: str, batch: str) -> Report | None:
        """Return the row of prepacked weights, which are the default where they are possible."""
        return rows.get((shape, batch, "prepacked"), rows.get((shape, batch, "plain")))

    for shape, batch, target in (
        ("roberta-large", "1x16", 2.7),
        ("roberta-large", "8x64", 1.15),
        ("roberta-large", "16x128", 1.06),
        ("opt-1.3b", "8x64", 1.15),
    ):
        ours = best(shape, batch)
        ratio = ours["ratio"]["median"] if ours and "ratio" in ours else None
        add(f"step / two default forwards, {shape}, {batch}", ratio, target)
    large, torch = ("roberta-large", "8x64"), rows.get(("roberta-large", "8x64", "torch"))
    ours = best(*large)
    if ours and torch:
        what = "MeZO in PyTorch, roberta-large, 8x64"
        add(f"times as fast as {what}", torch["median"] / ours["median"], 4, at_most=False)
        add(f"peak memory / {what}", ours["peak"] / torch["peak"], 0.6)
    for shape, system, target in (
        ("roberta-large", "prepacked", 1.75),
        ("roberta-large", "plain", 1.55),
        ("opt-1.3b", "prepacked", 6.2),
        ("opt-1.3b", "plain", 5.8),
    ):
        row = rows.get((shape, "8x64", system))
        add(f"peak memory, {shape}, 8x64, {system}", row["peak"] / 1e9 if row else None, target, unit=" GB")
    return result


def targets_table(targets: list[list[str]]) -> list[str]:
    return ["", *markdown(["", "", "target"], targets)] if targets else []


def step_table(report: Report) -> list[str]:
    body = []
    for cell in report["results"]["cells"]:
        title = f"{cell['shape']}, {cell['batch']}"
        for row in cell["rows"]:
            ratio = row.get("ratio")
            parts = [row["at_peak"][key] / 1e6 for key in ("RssAnon", "RssFile", "RssShmem")]
            body.append(
                [
                    title,
                    SYSTEM[row["system"]],
                    f"{seconds(row['median'])} ({seconds(row['low'])} to {seconds(row['high'])})",
                    f"{ratio['median']:.2f}" if ratio else "",
                    f"{row['peak'] / 1e6:,.0f}",
                    " + ".join(f"{part:,.0f}" for part in parts),
                    f"{row['loading']:.1f} s",
                ]
            )
            title = ""
        bound = 1.10 * (cell["weights"] + cell["activations"]) + 60e6
        body.append(["", "1.10 (weights + activations) + 60 MB", "", "", f"{bound / 1e6:,.0f}", "", ""])
    threads = " or ".join(dict.fromkeys(str(cell["threads"]) for cell in report["results"]["cells"]))
    return [
        caption(report),
        "",
        f"{threads} threads. Medians (and quartiles). All systems take turns in each round; the ratio is the median "
        "over the rounds. MB are 10^6 bytes; the peak is that of a fresh process, loading included. Its parts "
        "(anonymous memory, file mappings, shared memory) are those of the largest of samples taken every 10 ms.",
        "",
        *markdown(
            ["model, batch", "", "time", "/ two forwards", "peak MB", "anonymous + file + shared", "loading"], body
        ),
        *targets_table(step_targets(report)),
    ]


TITLES = {
    "minilm": "MiniLM",
    "bert-base": "BERT-base",
    "roberta-large": "RoBERTa-large",
    "xglm-564m": "XGLM-564M",
    "opt-1.3b": "OPT-1.3B",
}
TRAINING = {"default": "PocketZO (MeZO)", "torch": "MeZO in PyTorch", "adamw": "AdamW in PyTorch"}


def memory_table(report: Report) -> list[str]:
    results = report["results"]
    body = []
    for curve in results["curves"]:
        steps = [end - start for start, end in pairwise([curve["loaded"], *curve["steps"]])]
        body.append(
            [
                TRAINING[curve["system"]],
                f"{curve['peak'] / 1e6:,.0f}",
                f"{curve['peak'] / results['weights']:.2f}",
                f"{curve['loaded']:.1f} s",
                ", ".join(map(seconds, steps)),
            ]
        )
    return [
        caption(report),
        "",
        f"{TITLES[results['shape']]}'s shape, {results['batch']}, float32: {results['weights'] / 1e6:,.0f} MB of "
        f"weights; {results['threads']} threads. The peak is that of a fresh process, loading included; loading "
        "includes the interpreter's start and one forward.",
        "",
        *markdown(["", "peak MB", "/ weights", "loading", "steps"], body),
    ]


def of_accuracy(report: Report) -> dict[str, Report]:
    """Return the seconds per step of each system, and its mean seconds to the target if all its runs reached it."""
    result: dict[str, Report] = {}
    for name in dict.fromkeys(run["system"] for run in report["results"]["runs"]):
        ends = [run["curve"][-1] for run in report["results"]["runs"] if run["system"] == name]
        reached = all(end["accuracy"] >= report["results"]["target"] for end in ends)
        result[name] = {
            "step": sum(end["seconds"] for end in ends) / sum(end["step"] for end in ends),
            "steps": [end["step"] for end in ends],
            "accuracy": [end["accuracy"] for end in ends],
            "seconds": sum(end["seconds"] for end in ends) / len(ends) if reached else None,
        }
    return result


def accuracy_table(report: Report) -> list[str]:
    results = report["results"]
    body = []
    for name, row in of_accuracy(report).items():
        body.append(
            [
                {"pocketzo": "PocketZO", "torch": "MeZO in PyTorch"}[name],
                seconds(row["step"]),
                ", ".join(map(str, row["steps"])),
                ", ".join(f"{value:.1%}" for value in row["accuracy"]),
                "not reached" if row["seconds"] is None else f"{row['seconds']:.0f} s",
            ]
        )
    return [
        caption(report),
        "",
        f"MeZO, lr {results['lr']:g} and eps {results['eps']:g} (10 times these for the head), batches of 32, "
        f"{results['threads']} threads. A run ends at an accuracy of {results['target']:.0%} on dev, evaluated every "
        f"{results['every']} steps, or after {results['steps']} steps.",
        "",
        *markdown(["", "a step", "steps", "final dev accuracy", f"mean time to {results['target']:.0%}"], body),
    ]


# Mean time of a step over that of as many default forwards, by shape, batch and method.
METHOD_TARGETS = {("roberta-large", "1x16", "MeZO, block=0.25"): 1.5}


PAPER = {"roberta-large": 4.0, "opt-1.3b": 6.5}  # GB on a phone, arXiv 2407.01031


def paper_table(report: Report) -> list[str]:
    body = []
    for cell in report["results"]["cells"]:
        shape = cell["shape"]
        title = f"{TITLES[shape]}'s shape ({cell['parameters'] / 1e6:,.0f} M)"
        for row in cell["rows"]:
            ratio = row.get("ratio")
            body.append(
                [
                    title,
                    TRAINING.get(row["system"]) or SYSTEM[row["system"]],
                    f"{seconds(row['median'])} ({seconds(row['low'])} to {seconds(row['high'])})",
                    f"{ratio['median']:.2f}" if ratio else "",
                    f"{row['peak'] / 1e9:.2f} GB",
                ]
            )
            title = ""
        body.append(["", "PocketLLM, on a phone (its paper)", "", "", f"{PAPER[shape]:.1f} GB"])
    return [
        caption(report),
        "",
        "Exported from checkpoints by `pocketzo export` and prompted; all parameters, 8 x 64 tokens, 2 threads. "
        "Medians (and quartiles). The peak is that of a fresh process, loading included.",
        "",
        *markdown(["", "", "a step", "/ two forwards", "peak memory"], body),
    ]


STEP_TARGET, MEMORY_TARGET = 1.10, 250  # times two forwards; MB above the weights
GENERATION_TARGET = 0.8  # of the faster peer


def language_table(report: Report) -> list[str]:
    results = report["results"]
    names = {
        "forwards": "two forwards, onnxruntime's defaults",
        "prepacked": "step, logits of 32 MB at a time",
        "whole": "step, all logits at once (`--activation-memory 128M`)",
        "signs": "the same, `--distribution rademacher`",
        "plain": "step, plain layout",
    }
    body = []
    for threads, cells in results["threads"].items():
        for system, name in names.items():
            row = cells[system]
            ratio, more = f"{row['seconds_ratio']:.2f}", (row["peak"] - results["weights"]) / 1e6
            memory = f"weights + {more:.0f} MB"
            if system in ("prepacked", "whole"):
                ratio += f" ({verdict(row['seconds_ratio'], STEP_TARGET, at_most=True)})"
                memory += f" ({verdict(more, MEMORY_TARGET, at_most=True, unit=' MB')})"
            first = threads if system == "forwards" else ""
            body.append([first, name, seconds(row["seconds"]), ratio, f"{row['cpu_ratio']:.2f}", memory])
    return [
        caption(report),
        "",
        f"SmolLM2-135M, float32, all parameters, {results['batch'].replace('x', ' x ')} tokens, every one of which but "
        f"the first of a row counts; weights {results['weights'] / 1e6:.0f} MB. Medians of rounds.",
        "",
        *markdown(["threads", "", "seconds", "/ two forwards", "the same in CPU time", "peak memory"], body),
    ]


def bases_table(*reports: Report) -> list[str]:
    about = reports[0]["results"]["settings"]
    floats, *rows = reports[0]["results"]["rows"]
    there = {(row["base"], row["level"]) for row in rows}
    rows += [
        row
        for report in reports[1:]
        for row in report["results"]["rows"][1:]
        if (row["base"], row["level"]) not in there
    ]
    body = [
        [
            row["base"],
            "" if row["level"] is None else str(row["level"]),
            f"{row['size'] / 1e6:.0f} MB",
            f"{row['loss']:.3f}",
            f"{row['correlation']:.3f}",
            f"{row['noise']:.1e}",
            f"{row['time']:.2f}",
        ]
        for row in (floats, *rows)
    ]
    return [
        caption(*reports),
        "",
        f"SmolLM2-135M on {about['rows']} sentence{'s' * (about['rows'] > 1)} of SST-2's training data; "
        f"{about['directions']} directions of LoRA-B on queries and values, eps {about['eps']:g}."
        + (f" Under qemu as {about['emulated']}: the time is an emulator's." if "emulated" in about else ""),
        "",
        *markdown(["base", "accuracy level", "size", "loss", "slopes", "noise", "CPU time"], body),
    ]


def queries_table(report: Report) -> list[str]:
    rows, body = report["results"]["rows"], []
    single = {(row["base"], row["batch"]): row["seconds"]["one by one"] for row in rows if row["queries"] == 1}
    for row in rows:
        times, one = row["seconds"], single.get((row["base"], row["batch"]))
        body.append(
            [
                row["base"],
                row["batch"].replace("x", " x "),
                str(row["queries"]),
                f"{times['one by one']:.3f}",
                f"{times['batch'] / times['one by one']:.2f}",
                f"{times['split'] / one:.2f}" if "split" in times and one else "",
            ]
        )
    return [
        caption(report),
        "",
        "SmolLM2-135M with `lora:train=B` (184,320 numbers), one thread, CPU seconds of an estimate: two losses for "
        f"each of Q directions. Rounds: {report['results']['rounds']}, after one to warm up.",
        "",
        *markdown(["base", "batch", "Q", "one by one", "`batch` / one by one", "`split` / one direction"], body),
    ]


def variance_table(*reports: Report) -> list[str]:
    results = [report["results"] for report in reports]

    def cells(row: Report) -> list[str]:
        both = (f"{row[share]['mean']:,.0f} ± {row[share]['error']:,.0f}" for share in ("batch", "split"))
        return [text if row["queries"] > 1 or not place else "" for place, text in enumerate(both)]

    header = [f"{one['base']}, `{share}`" for one in results for share in ("batch", "split")]
    body = [
        [str(rows[0]["queries"]), *(cell for row in rows for cell in cells(row))]
        for rows in zip(*(one["rows"] for one in results), strict=True)
    ]
    return [
        caption(*reports),
        "",
        f"Over {results[0]['batches']} batches; ± one standard error.",
        "",
        *markdown(["Q", *header], body),
    ]


def second_moment_table(report: Report) -> list[str]:
    results = report["results"]
    found: dict[tuple[str, float], list[float]] = {}
    for row in results["rows"]:
        found.setdefault((row["way"], row["lr"]), []).append(row["loss"])
    body = [[way, f"{lr:g}", ", ".join(f"{loss:.3f}" for loss in losses)] for (way, lr), losses in found.items()]
    return [
        caption(report),
        "",
        f"SmolLM2-135M int4, `lora:train=B` ({results['numbers']:,} numbers), the demo's page of notes: loss "
        f"{results['start']:.3f} before, and after {2 * results['steps']} forward passes, by seed.",
        "",
        *markdown(["", "lr", "loss"], body),
    ]


def engines_table(report: Report) -> list[str]:
    body = [
        [
            row["engine"],
            row["message"],
            f"{row['bytes']:,}",
            f"{seconds(row['median'])} ({seconds(row['low'])} to {seconds(row['high'])})",
        ]
        for row in report["results"]
    ]
    return [caption(report), "", *markdown(["", "message", "bytes", "there and back"], body)]


def learning_table(report: Report) -> list[str]:
    groups: dict[str, list[Report]] = {}
    for row in report["results"]["rows"]:
        if row.get("value") is not None:
            groups.setdefault(re.sub(r" \| \d+$", "", row["name"]), []).append(row)
    body = []
    for name, rows in groups.items():
        task, *what = name.split(" | ")

        def mean(key: str, percent: bool, rows: list[Report] = rows) -> str:
            values = [(100 if percent else 1) * row[key] for row in rows if row.get(key) is not None]
            if not values:
                return ""
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.4g}{spread}" if percent else f"{statistics.mean(values):.3f}{spread}"

        accuracy = not task.endswith("page")  # otherwise perplexity
        rates = ", ".join(f"{row['lr']:g}" for row in rows if "lr" in row)
        values = mean("before", accuracy), mean("value", accuracy), mean("averaged", accuracy), mean("loss", False)
        seconds = [row["cpu_seconds"] for row in rows if "cpu_seconds" in row]
        body.append([task, ", ".join(what), rates, *values, f"{statistics.mean(seconds):.0f}" if seconds else ""])
    heads = ["task", "what, method, forward passes", "lr", "before", "after", "mean of the last quarter", "loss"]
    return [caption(report), "", *markdown([*heads, "CPU seconds"], body)]


def night_table(report: Report) -> list[str]:
    results = report["results"]
    body = [[f"{row['forwards']:,}", f"{100 * row['accuracy']:.1f}", f"{row['loss']:.3f}"] for row in results["points"]]
    beside = ", ".join(f"{name} {100 * value:.1f} %" for name, value in results["levels"].items())
    return [
        caption(report),
        "",
        f"`--method {results['method']}`, lr {results['lr']:g} found by `--lr auto`, "
        + f"{results['seconds'] / 60:.0f} minutes"
        + (f". Beside it, mean of the table's seeds: {beside}" if beside else ""),
        "",
        *markdown(["forward passes of 16 sentences", "accuracy, %", "loss"], body),
    ]


def levers_table(report: Report) -> list[str]:
    about, rows = report["results"]["settings"], report["results"]["rows"]
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]

        def mean(name: str, digits: str, own: list[Report] = own) -> str:
            values = [row[name] for row in own]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            return f"{statistics.mean(values):{digits}} ± {error:{digits}}"

        directions = statistics.mean(row["directions"] for row in own)
        losses = mean("training_loss", ".3f"), mean("loss", ".3f")
        milliseconds = 1e3 * statistics.mean(row["cpu_seconds"] for row in own) / about["forwards"]
        lr = f"{own[0]['lr']:.2g}"
        body.append([arm, lr, f"{directions:.1f}", *losses, mean("accuracy", ".1%"), f"{milliseconds:.2f} ms"])
    task = {"messages": "the demo's messages", "sst2": "SST-2, 1,024 sentences"}[about["task"]]
    heads = ["", "lr", "directions a step", "training loss", "held-out loss", "accuracy", "CPU time a forward"]
    return [
        caption(report),
        "",
        f"MiniLM on {task}, {about['train']} trained from a zero head ({report['results']['parameters']:,} numbers), "
        f"{about['forwards']:,} forward passes of 16; means and standard errors of {about['seeds']} seeds.",
        "",
        *markdown(heads, body),
    ]


def generation_table(report: Report) -> list[str]:
    rows = report["results"]["rows"]
    speed = {name: row["tokens a second"] for name, row in rows.items()}
    fastest = max((value for name, value in speed.items() if not name.startswith("pocketzo")), default=None)
    body = []
    for name, row in rows.items():
        ratio = f"{speed[name] / fastest:.2f}" if fastest else ""
        if fastest and name.startswith("pocketzo"):
            ratio += f" ({verdict(speed[name] / fastest, GENERATION_TARGET, at_most=False)})"
        same = "yes" if row["same tokens as pocketzo"] else "no"
        body.append([name, f"{row['prompt tokens a second']:.0f}", f"{speed[name]:.1f}", ratio, same])
    about = report["results"]
    return [
        caption(report),
        "",
        f"SmolLM2-135M, float32, {about['prompt_tokens']} tokens read and {about['tokens']} generated, "
        f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}. The best of several rounds.",
        "",
        *markdown(
            ["", "tokens read a second", "generated a second", "/ the fastest peer", "the same tokens"],
            body,
        ),
    ]


def notes_table(report: Report) -> list[str]:
    results = report["results"]
    names = {
        "base": "before",
        "pocketzo": "`pocketzo demo notes`, int4",
        "adamw": "AdamW by backpropagation, float32",
    }
    body = []
    for system, name in names.items():
        row = results["rows"][system]
        steps, time, peak = (
            str(row.get("steps", "")),
            f"{row['seconds']:.0f} s" if "seconds" in row else "",
            f"{row['peak'] / 1e9:.2f} GB" if "peak" in row else "",
        )
        right = f"{row['right']} of {results['questions']}"
        body.append([name, f"{row['page']:.1f}", f"{row['answers']:.1f}", right, steps, time, peak])
    return [
        caption(report),
        "",
        f"SmolLM2-135M-Instruct, `--train {results['train']}`, a page of made-up notes. The settings were chosen by "
        "the loss on the page; the questions are held out.",
        "",
        *markdown(
            ["", "perplexity of the page", "of the answers", "answers begun right", "steps", "training", "peak memory"],
            body,
        ),
    ]


def methods_table(report: Report) -> list[str]:
    cells = report["results"]["cells"]
    header, body, targets = ["", "forwards"], [], []
    for cell in cells:
        header += [f"{cell['batch']}: a step", "/ as many default forwards"]
    for rows in zip(*(cell["rows"] for cell in cells), strict=True):
        method, count = rows[0]["system"], rows[0]["forwards"]
        if method == "forwards":
            two = [row["mean"] for row in rows]
            continue
        line = [method, str(count)]
        for cell, row, both in zip(cells, rows, two, strict=True):
            ratio = row["mean"] / (both * count / 2)
            line += [seconds(row["mean"]), f"{ratio:.2f}"]
            where = (cell["shape"], cell["batch"], method)
            if target := METHOD_TARGETS.get(where):
                targets.append([", ".join(where), f"{ratio:.3f}", verdict(ratio, target, at_most=True)])
        body.append(line)
    return [
        caption(report),
        "",
        f"{TITLES[cells[0]['shape']]}'s shape, {cells[0]['threads']} threads. Means over at least "
        f"{min(row['repeats'] for cell in cells for row in cell['rows'])} steps.",
        "",
        *markdown(header, body),
        *targets_table(targets),
    ]


def session_table(report: Report) -> list[str]:
    cells = report["results"]["cells"]
    header = ["", *(f"{cell['batch']}: / two forwards, peak MB" for cell in cells)]
    rows = [
        [rows[0]["system"], *(f"{row['ratio']['median']:.2f}, {row['peak'] / 1e6:,.0f}" for row in rows)]
        for rows in zip(*(cell["rows"] for cell in cells), strict=True)
        if rows[0]["system"] != "forwards"
    ]
    lines = [
        caption(report),
        "",
        f"A MeZO step, {cells[0]['shape']}'s shape, {cells[0]['threads']} threads, beside two forwards by onnxruntime "
        "with its default settings, as in `step.py`. Each row changes one setting.",
        "",
        *markdown(header, rows),
    ]
    for row in report["results"]["overlap"]:
        alone = row["forward"] + row["pass"]
        lines += [
            "",
            f"At {row['batch']} a forward takes {seconds(row['forward'])}, a noise pass {seconds(row['pass'])}, and "
            f"both together {seconds(row['both'])}: {row['both'] / alone:.2f} of the time of one after the other.",
        ]
    return lines


def loop_table(report: Report) -> list[str]:
    rows = [
        [
            f"{row['method']}, {row['parts']}",
            f"{1e3 * row['median']:.3f} ({1e3 * row['low']:.3f} to {1e3 * row['high']:.3f})",
            verdict(1e3 * row["median"], 1, at_most=True, unit=" ms"),
        ]
        for row in report["results"]["rows"]
    ]
    return [caption(report), "", *markdown(["", "ms per step", "target"], rows)]


def cycles_table(report: Report) -> list[str]:
    body = []
    for row in report["results"]["rows"]:
        cycles = [row["cycles"][core] for core in CORES]
        cells = ["", ""]
        if targets := CYCLE_TARGETS.get(row["operation"]):
            worst = max(value / target for value, target in zip(cycles, targets, strict=True))
            cells = [
                " / ".join(f"{target:g}" for target in targets),
                f"{worst:.2f}, {verdict(worst, 1.25, at_most=True)}",
            ]
        numbers = (f"{value:.2f}" for value in (row["instructions"], *cycles))
        body.append([OPERATIONS[row["operation"]], *numbers, *cells])
    return [
        caption(report),
        "",
        "Per element, without the set-up of a call. Instruction counts are exact. Cycles are estimates by llvm-mca, "
        "which assumes first-level cache hits and correctly predicted branches; its model of the Cortex-A55 seems "
        "optimistic for 128-bit operations.",
        "",
        *markdown(["", "instructions", *CORES.values(), "targets", "worst / target"], body),
    ]


def scale_table(report: Report) -> list[str]:
    body = []
    for against, cells in report["results"].items():
        for number, cell in enumerate(cells):
            rows = {row["system"]: row for row in cell["rows"]}
            ours = rows["default"]
            value = {
                "parameters": f"{cell['parameters'] / 1e6:,.1f} M ({cell['shape']})",
                "tokens": cell["batch"],
                "threads": str(cell["threads"]),
            }[against]
            body.append(
                [
                    "" if number else against,
                    value,
                    f"{seconds(ours['median'])} ({seconds(ours['low'])} to {seconds(ours['high'])})",
                    seconds(rows["forwards"]["median"]),
                    f"{ours['ratio']['median']:.2f}",
                    f"{ours['peak'] / 1e6:,.0f}",
                    f"{rows['forwards']['peak'] / 1e6:,.0f}",
                ]
            )
    return [
        caption(report),
        "",
        "Unless a row says otherwise: bert-base, 8x64, 2 threads.",
        "",
        *markdown(["against", "", "step", "two forwards", "ratio", "peak MB", "of the forwards, MB"], body),
    ]


FP16_TARGET = 1.15  # times the memory of the weights and of a forward


def fp16_table(report: Report) -> list[str]:
    results = report["results"]
    peaks = {work: row["peak"] for work, row in results["rows"].items()}
    about = results["rows"]["training"]
    forward = peaks["running"] - peaks["imports"] - results["weights"]
    needed = results["weights"] + forward

    def row(what: str, size: float, times: str = "") -> list[str]:
        return [what, f"{size / 1e6:,.0f} MB", times]

    where = f"{about['architecture']}, {'computes' if about['computes_in_fp16'] else 'does not compute'} in fp16"
    ratio = peaks["training"] / needed
    return [
        caption(report),
        "",
        *markdown(
            [
                f"{results['shape']}'s shape, {results['dtype']}, {results['batch']} ({where})",
                "memory",
                "of the first two",
            ],
            [
                row("weights", results["weights"]),
                row("a forward", forward),
                row("peak of an interpreter that has imported the package", peaks["imports"]),
                row("peak of inference", peaks["running"], f"{peaks['running'] / needed:.2f}"),
                row(
                    "peak of training",
                    peaks["training"],
                    f"{ratio:.2f} ({verdict(ratio, FP16_TARGET, at_most=True)})",
                ),
                row(
                    "peak of training, less the imports",
                    peaks["training"] - peaks["imports"],
                    f"{(peaks['training'] - peaks['imports']) / needed:.2f}",
                ),
            ],
        ),
    ]


def mixed_table(report: Report) -> list[str]:
    body = []
    for row in report["results"]["rows"]:
        cores = (
            f"{row['fast']} fast, {row['slow']} slow by {row['slowness']:g}" if row["slow"] else f"{row['fast']} alike"
        )
        # The time if no core were ever idle, from the time of the fast ones alone.
        bound = row["alone"]["median"] * row["fast"] / (row["fast"] + row["slow"] / row["slowness"])
        medians = {name: row[name]["median"] for name in ("alone", "split", "units")}
        body.append(
            [
                cores,
                {"sleep": "asleep", "spin": "idling"}[row["how"]],
                *(seconds(medians[name]) for name in ("alone", "split")),
                f"{seconds(medians['units'])} ({seconds(row['units']['low'])} to {seconds(row['units']['high'])})",
                f"{medians['split'] / medians['units']:.2f}",
                f"{bound / medians['units']:.2f}",
            ]
        )
    header = ["cores", "simulated", "fast ones alone", "equal split", "small units (PocketZO)"]
    return [
        caption(report),
        "",
        "w += s z, Gaussian; medians (and quartiles). Asleep: a unit of 2^16 elements takes 1 ms on a fast core, most "
        "of which its thread sleeps; 352 units (MiniLM's 23 M weights). Idling: real cores, one of which idles after "
        "each kernel call; 1024 units. The bound is the sum of the cores' speeds.",
        "",
        *markdown([*header, "times as fast as the split", "of the bound"], body),
    ]


def summary_table(noise: Report, step: Report, accuracy: Report) -> list[str]:
    """Return the README's table: some rows of the others."""
    steps = of_steps(step)
    body = []
    for shape, title in (
        ("roberta-large", "RoBERTa-large's shape (355 M)"),
        ("opt-1.3b", "OPT-1.3B's shape (1,316 M)"),
    ):
        found = [steps.get((shape, "8x64", name)) for name in ("prepacked", "plain", "forwards", "torch")]
        if any(found):
            body.append([f"{title}, 8 x 64 tokens: a step", *(seconds(row["median"]) if row else "" for row in found)])
            body.append(
                ["its peak memory, loading included", *(f"{r['peak'] / 1e9:.2f} GB" if r else "" for r in found)]
            )
    rows, bounds = of_noise(noise)
    threads = max(bounds)

    def gibibyte(row: Report | None) -> str:
        return seconds(row["median"] / row["elements"] * 2**28) if row else ""

    ours = next(row for (_, work, n), row in rows.items() if work == "add gaussian" and n == threads)
    torch = rows.get(("torch", "add gaussian", threads))
    scale = f"{gibibyte(bounds[threads])} (w *= s)"
    body.append([f"w += s z over 1 GiB, {threads} threads", gibibyte(ours), "", scale, gibibyte(torch)])
    runs = of_accuracy(accuracy)
    times = {name: "not reached" if row["seconds"] is None else f"{row['seconds']:.0f} s" for name, row in runs.items()}
    target = f"{accuracy['results']['target']:.0%}"
    what = f"SST-2, MiniLM from a zero head, MeZO: {target} of dev"
    body.append([what, times.get("pocketzo", ""), "", "", times.get("torch", "")])
    header = ["", "PocketZO", "PocketZO, plain layout", "two forwards", "MeZO in PyTorch"]
    return [caption(noise, step, accuracy), "", *markdown(header, body)]


def ratios_table(step: Report, memory: Report, loop: Report) -> list[str]:
    """Return the ratios of the README's first screen: speed, memory and size of a journal, with their baselines."""

    def ratio(ours: float, theirs: float) -> str:
        if ours >= theirs:
            return f"{ours / theirs:.2f}"
        times = theirs / ours
        return f"1 / {times:.1f}" if times < 100 else f"1 / {float(f'{times:.2g}'):,.0f}"

    results = memory["results"]
    shape, batch, weights = results["shape"], results["batch"], results["weights"]
    peaks = {curve["system"]: curve["peak"] for curve in results["curves"]}
    steps = of_steps(step)
    times = {system: steps[shape, batch, system]["median"] for system in ("prepacked", "forwards", "torch")}
    journal = loop["results"]["journal"]
    body = []

    def add(what: str, ours: float, baseline: str, theirs: float, show: Callable[[float], str]) -> None:
        body.append([what, show(ours), f"{baseline}: {show(theirs)}", ratio(ours, theirs)])

    add("a MeZO step", times["prepacked"], "MeZO in PyTorch", times["torch"], seconds)
    add("", times["prepacked"], "two forwards alone", times["forwards"], seconds)
    add("peak memory, loading included", peaks["default"], "MeZO in PyTorch", peaks["torch"], size)
    add("", peaks["default"], "AdamW in PyTorch", peaks["adamw"], size)
    add("", peaks["default"], "the weights", weights, size)
    add(f"journal of {journal['steps']:,} MeZO steps", journal["bytes"], "the weights", weights, size)
    header = [f"{TITLES[shape]}'s shape, {batch.replace('x', ' x ')} tokens", "PocketZO", "baseline", "ratio"]
    return [*markdown(header, body), "", f"<sub>{caption(step, memory, loop).strip('*')}</sub>"]


def cut_table(report: Report) -> list[str]:
    body = []
    for row in report["results"]["rows"]:
        seconds, peaks = row["seconds"], row["peaks"]
        body.append(
            [
                row["bundle"],
                row["batch"].replace("x", " x "),
                row["against"] or "the same",
                f"{row['saved']:.0%}",
                f"{seconds['cut'] * 1e3:.3g} ms",
                f"{seconds['whole'] * 1e3:.4g} ms",
                f"{seconds['cut'] / seconds['whole']:.3f}",
                f"{peaks['cut'] / 1e6:.0f} MB",
                f"{peaks['whole'] / 1e6:.0f} MB",
            ]
        )
    header = ["model and what is trained", "tokens", "whole model", "before the cut", "step", "whole", "ratio"]
    return [caption(report), "", *markdown([*header, "peak", "whole"], body)]


TABLES: dict[str, tuple[tuple[str, ...], Callable[..., list[str]]]] = {
    "summary": (("noise", "step", "accuracy"), summary_table),
    "ratios": (("step", "memory", "loop"), ratios_table),
    "noise": (("noise",), noise_table),
    "step": (("step",), step_table),
    "memory": (("memory",), memory_table),
    "scale": (("scale",), scale_table),
    "methods": (("methods",), methods_table),
    "session": (("session",), session_table),
    "loop": (("loop",), loop_table),
    "mixed": (("mixed",), mixed_table),
    "accuracy": (("accuracy",), accuracy_table),
    "cycles": (("cycles",), cycles_table),
    "fp16": (("fp16",), fp16_table),
    "paper": (("paper",), paper_table),
    "language": (("language",), language_table),
    "bases": (("bases", "bases_int4", "bases_int8"), bases_table),
    "bases_arm": (("bases_arm", "bases_arm_int4", "bases_arm_int8"), bases_table),
    "queries": (("queries",), queries_table),
    "variance": (("queries_variance", "queries_variance_int4"), variance_table),
    "cut": (("cut",), cut_table),
    "engines": (("engines",), engines_table),
    "learning": (("learning",), learning_table),
    "night": (("night",), night_table),
    "second_moment": (("second_moment",), second_moment_table),
    "levers": (("levers",), levers_table),
    "generation": (("generation",), generation_table),
    "notes": (("notes",), notes_table),
}


def rewritten(text: str, where: Path) -> tuple[str, bool]:
    """Return a document with its tables made from the figures, and whether all the figures were there."""
    complete = True

    def table(match: re.Match[str]) -> str:
        nonlocal complete
        name = match[2]
        if name not in TABLES:
            sys.exit(f"{where}: no table is called {name!r}; expected one of {', '.join(TABLES)}")
        sources, make = TABLES[name]
        paths = [RESULTS / f"{source}.json" for source in sources]
        if missing := [path.name for path in paths if not path.exists()]:
            print(f"{where.relative_to(ROOT)}: table {name} is left as it is, without {', '.join(missing)}")
            complete = False
            return match[0]
        lines = make(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))
        return "\n".join([match[1], *lines, "<!-- end -->"])

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", table, text, flags=re.DOTALL), complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table differs")
    arguments = parser.parse_args()
    differ = False
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new, complete = rewritten(text, path)
        differ |= not complete
        if new == text:
            continue
        differ = True
        if arguments.check:
            name = str(path.relative_to(ROOT))
            sys.stdout.writelines(difflib.unified_diff(text.splitlines(True), new.splitlines(True), name, "figures"))
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: rewritten")
    if arguments.check and differ:
        sys.exit("a table differs from its figures, or figures are missing; run python bench/tables.py")


if __name__ == "__main__":
    main()
