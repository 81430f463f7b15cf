"""Speed and memory of two commits of this repository, measured alternately in one run.

    python bench/compare.py REV [REV2] [--rounds 5] [--work DIR] [--json FILE]
    python bench/compare.py REV --quick     # shows in a few minutes that both commits build and run

Builds REV (A) and REV2 (B; HEAD by default), each in a git worktree with a virtual environment of its own, and then
runs each commit's own loop.py and step.py in turn: A B A B ... APIs may differ between the commits, since only the JSON
files that the scripts write are compared. torch is not installed, so that step.py skips its peer.

A row is slower or faster (larger or smaller) if every round of one commit is beyond every round of the other; with 5
rounds, chance alone gives that in one row of 126. Needs a C++ compiler and PyPI, as an installation from source does,
and 1.5 GB of disk for the models of each commit. `git worktree remove --force` removes a worktree that --work kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import Run, spread
from models import SHAPES
from tables import ROOT, caption, markdown

Values = dict[tuple[str, str], float]  # by row and by what was measured, a key of UNITS

SHAPES_COMPARED, BATCHES = ("minilm", "roberta-large"), ("1x16", "8x64")
QUICK = {"shapes": ["minilm"], "batches": ["1x16"], "rounds": 1, "steps": 300}
STEP_ROUNDS = 3  # inside each run of step.py
RENAMED = {"packed": "prepacked", "unpacked": "plain"}  # systems of step.py in earlier commits
UNITS = {"time": ("faster", "slower"), "forwards": ("faster", "slower"), "peak": ("smaller", "larger")}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


@dataclass
class Side:
    """One of the two commits, built."""

    name: str
    commit: str
    tree: Path

    def run(self, script: str, *arguments: str) -> dict[str, Any]:
        """Run one of this commit's scripts; return what it writes as JSON."""
        result = self.tree.with_name(f"{self.tree.name}.json")
        command: list[str | Path] = [self.tree / ".venv" / "bin" / "python", f"bench/{script}.py", *arguments]
        command += ["--models", self.tree.with_name(f"{self.tree.name}-models"), "--json", result]
        execute(self.tree, *command)
        report: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return report


def execute(folder: Path, *command: str | Path) -> None:
    """Run a command in a folder; end with its output if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{folder}: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def build(name: str, revision: str, work: Path) -> Side:
    """Check out and install a commit, unless an earlier run has done so in the same folder."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    side = Side(name, commit, work / f"{name}-{commit[:12]}")
    finished = side.tree / ".venv" / "installed"
    if not finished.exists():
        note(f"{name}: building {git('log', '-1', '--format=%h %s', commit)}")
        if not side.tree.exists():
            git("worktree", "add", "--detach", str(side.tree), commit)
        execute(side.tree, sys.executable, "-m", "venv", "--clear", ".venv")
        execute(side.tree, ".venv/bin/pip", "install", "-q", ".[demo]")
        finished.touch()
    return side


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """Yield the given folder, which is kept, or a temporary one, whose worktrees are removed."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with ExitStack() as stack:
        stack.callback(git, "worktree", "prune")  # after the folder is gone
        yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-")))


def of_loop(report: dict[str, Any]) -> Values:
    return {(f"loop, {row['method']}, {row['parts']}", "time"): row["median"] for row in report["results"]["rows"]}


def of_step(report: dict[str, Any]) -> Values:
    values: Values = {}
    for cell in report["results"]["cells"]:
        for row in cell["rows"]:
            name = f"{cell['shape']}, {cell['batch']}, {RENAMED.get(row['system'], row['system'])}"
            values[name, "time"] = row["median"]
            values[name, "peak"] = row["peak"]
            if "ratio" in row and row["system"] != "forwards":
                values[name, "forwards"] = row["ratio"]["median"]
    return values


def verdict(a: Sequence[float], b: Sequence[float], unit: str) -> str:
    less, more = UNITS[unit]
    if min(b) > max(a):
        return more
    if max(b) < min(a):
        return less
    return "within the spread"


def rows_of(rounds: Sequence[tuple[Values, Values]]) -> list[dict[str, Any]]:
    """Compare what both commits measured in all rounds."""
    names = [name for name in rounds[0][0] if all(name in values for pair in rounds for values in pair)]
    if lost := sorted({name for pair in rounds for values in pair for name, _ in values} - {name for name, _ in names}):
        note(f"skipped, since one commit alone measures them: {'; '.join(lost)}")
    result = []
    for name, unit in names:
        a, b = ([values[name, unit] for values in side] for side in zip(*rounds, strict=True))
        ratio = spread([mine / theirs for theirs, mine in zip(a, b, strict=True)])
        row = {"name": name, "unit": unit, "a": spread(a), "b": spread(b), "ratio": ratio}
        result.append({**row, "verdict": verdict(a, b, unit)})
    return result


def table(report: dict[str, Any]) -> list[str]:
    def shown(values: dict[str, Any], unit: str) -> str:
        if unit == "peak":
            return f"{values['median'] / 1e6:,.0f} MB"
        scale, sign = (1e3, " ms") if unit == "time" else (1, "")
        low, median, high = (f"{scale * values[key]:.4g}" for key in ("low", "median", "high"))
        return f"{median}{sign} ({low} to {high})"

    results = report["results"]
    body = [
        [
            row["name"] + {"time": "", "forwards": ", / two forwards", "peak": ", peak memory"}[row["unit"]],
            shown(row["a"], row["unit"]),
            shown(row["b"], row["unit"]),
            f"{row['ratio']['median']:.3f} ({row['ratio']['low']:.3f} to {row['ratio']['high']:.3f})",
            row["verdict"] if results["rounds"] > 1 else "",
        ]
        for row in results["rows"]
    ]
    return [
        caption(report),
        "",
        *(f"{name}: {results['commits'][name]}  " for name in ("A", "B")),
        f"Medians (and quartiles) of {results['rounds']} rounds; the ratio is the median of those of the rounds.",
        "",
        *markdown(["", "A", "B", "B / A", "B is"], body),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="REV", help="the commit to compare with")
    parser.add_argument("b", metavar="REV2", nargs="?", default="HEAD", help="the commit to judge (default: HEAD)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000, help="of loop.py")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES_COMPARED), help="of step.py")
    parser.add_argument("--batches", nargs="+", metavar="BxT", default=list(BATCHES), help="of step.py")
    parser.add_argument("--quick", action="store_true", help="smoke run: one round of the smallest shape")
    parser.add_argument("--work", type=Path, help="build in this folder, keep it, and reuse it in later runs")
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)

    jobs = [("loop", of_loop, ["--steps", str(arguments.steps)])]
    for shape in arguments.shapes:
        settings = ["--shapes", shape, "--batches", *arguments.batches, "--rounds", str(STEP_ROUNDS)]
        jobs.append(("step", of_step, settings))
    with work_folder(arguments.work) as work:
        sides = [build(name, revision, work) for name, revision in (("A", arguments.a), ("B", arguments.b))]
        run = Run()
        rounds: list[tuple[Values, Values]] = []
        versions = {}
        for number in range(arguments.rounds):
            rounds.append(({}, {}))
            for script, read, settings in jobs:
                for side, values in zip(sides, rounds[-1], strict=True):
                    report = side.run(script, *settings)
                    versions[side.name] = {**report["machine"]["versions"], "pocketzo": side.commit[:12]}
                    values |= read(report)
                    note(f"round {number + 1} of {arguments.rounds}, {side.name}: {script} {' '.join(settings)}")
    differ = {name for name in versions["A"] | versions["B"] if versions["A"].get(name) != versions["B"].get(name)}
    if differ - {"pocketzo"}:
        note(f"the environments differ: A has {versions['A']}, B has {versions['B']}")
    results = {
        "commits": {side.name: git("log", "-1", "--format=%h %s", side.commit) for side in sides},
        "versions": versions,
        "rounds": arguments.rounds,
        "rows": rows_of(rounds),
    }
    print("\n".join(table(run.finish(results, arguments.json))))


if __name__ == "__main__":
    main()
