"""Puts foreign models to the trial, and prints what became of each.

    cd tests && python -m zoo                     # ONNX's backend models, and its operators with weights
    cd tests && python -m zoo --only 'conv|lstm'  # of these, those whose name matches
    cd tests && python -m zoo FILES-OR-FOLDERS    # any others

A model passes if it becomes a bundle of the same function, whose weights train, replay and reach plain onnxruntime
(tests/zoo/trial.py), or is refused. Ends with status 1 if one is computed wrongly, ends in a traceback or a crash.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.context
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pocketzo.graph.compare  # what prepare imports, here for all processes: sympy alone takes half a second
import pocketzo.graph.float16
import pocketzo.graph.frozen  # noqa: F401
from zoo.cases import Case, of_backend, of_files
from zoo.trial import Result, attempt

GOOD = ("ok", "refused")


def isolated(case: Case, connection: Connection) -> None:
    """Send the result of a case, in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    try:
        (folder / "source").mkdir()
        connection.send(attempt(case.write(folder / "source"), folder, case.batch))
    finally:
        shutil.rmtree(folder)


def trials(cases: Iterable[Case], jobs: int, limit: float) -> Iterator[tuple[Case, Result, float]]:
    """Try the cases, each in a process of its own, and yield their results as they end."""
    context = multiprocessing.get_context("fork")  # this process has no session, and so no threads
    running: dict[Connection, tuple[Case, multiprocessing.context.ForkProcess, float]] = {}
    cases = iter(cases)
    more = True
    while more or running:
        while more and len(running) < jobs:
            case = next(cases, None)
            if case is None:
                more = False
                break
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=isolated, args=(case, sender))
            process.start()
            sender.close()
            running[receiver] = case, process, time.monotonic()
        ready = wait(list(running), timeout=1.0)
        for connection in list(running):
            case, process, started = running[connection]
            seconds = time.monotonic() - started
            if connection in ready:
                try:
                    result = connection.recv()
                except EOFError:
                    process.join()
                    result = Result("CRASH", f"the process ended with status {process.exitcode}")
            elif seconds > limit:
                process.kill()
                result = Result("TIMEOUT", f"more than {limit:g} s")
            else:
                continue
            process.join()
            connection.close()
            del running[connection]
            yield case, result, seconds


def kind_of(reason: str) -> str:
    """Return a reason without the names and figures of its model."""
    reason = re.sub(r"'[^']*'|\([A-Z]\w+\)", "'...'", reason.strip().splitlines()[-1] if reason.strip() else "")
    return re.sub(r"-?\d[\d.]*(e[+-]?\d+)?", "n", reason)[:160]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zoo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="of ONNX's models, those whose group/name matches")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for one model")
    parser.add_argument("--log", type=Path, help="a file for all results, with tracebacks")
    options = parser.parse_args()
    cases = of_files(options.files) if options.files else of_backend()
    cases = (case for case in cases if re.search(options.only, f"{case.group}/{case.name}"))
    counts: Counter[tuple[str, str]] = Counter()
    reasons: dict[tuple[str, str], list[str]] = {}
    log = options.log.open("w") if options.log else None
    if options.files:
        print("| file | result | trained | of floats | reason, or options |\n|---|---|---|---|---|")
    for case, result, seconds in trials(cases, options.jobs, options.limit):
        counts[case.group, result.outcome] += 1
        reasons.setdefault((result.outcome, kind_of(result.reason)), []).append(f"{case.group}/{case.name}")
        last = result.reason.strip().splitlines()[-1] if result.reason else ""
        if options.files:
            numbers = f"{result.trained:,} | {result.floats:,}"
            print(f"| {case.name} | {result.outcome} | {numbers} | {last} |", flush=True)
        elif result.outcome not in GOOD:
            print(f"{result.outcome} {case.group}/{case.name}: {last}", flush=True)
        if log:
            print(
                *(result.outcome, f"{case.group}/{case.name}", f"{seconds:.1f} s"),
                *(f"{result.trained:,} of {result.floats:,}", result.reason),
                sep="\t",
                file=log,
                flush=True,
            )
    print()
    for (outcome, reason), names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(names):5} {outcome}: {reason or 'without options'}  e.g. {names[0]}")
    print()
    for (group, outcome), count in sorted(counts.items()):
        print(f"{group}: {count} {outcome}")
    return 0 if all(outcome in GOOD for _, outcome in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
