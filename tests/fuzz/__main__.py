"""Fuzzing of every file that PocketZO reads: no traceback, no crash, no hang, whatever the file holds.

    cd tests && python -m fuzz --seconds 60             # all kinds in turn
    cd tests && python -m fuzz onnx --count 10000 --seed 1
    cd tests && python -m fuzz onnx --case 4711         # one case again, with its traceback; --keep DIR keeps its files

A case is a valid file, mutated by a random generator of (seed, kind, number), in a process of its own. It passes if
PocketZO uses the file, or raises an error of its own: a pocketzo.Error, ValueError or TypeError from its own code, with
a message of one line. Ends with status 1 if a case failed, and prints how to run it again.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import pkgutil
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

import pocketzo as pz
from fuzz.targets import TARGETS, is_own
from pocketzo.packages import EXTRAS
from pocketzo.runtime import image

LIMIT = 10.0  # seconds that a case may take
BUILD = "import pathlib, sys; from fuzz.files import build; build(pathlib.Path(sys.argv[1]))"
ENGINES = {*EXTRAS["federated"], *EXTRAS["pipeline"]}
SANITIZED = "ASAN_OPTIONS" in os.environ
MEMORY = 8 << 30  # bytes of address space beyond what the process has at its start


def mutated(kind: str, seed: int, number: int, source: Path, folder: Path) -> Path:
    """Write a copy of the files, one of them mutated; return its path."""
    rng = random.Random(f"{seed} {kind} {number}")
    target = TARGETS[kind]
    original = rng.choice(target.files(source))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / original.relative_to(source)
    path.write_bytes(rng.choice(target.mutators)(path.read_bytes(), rng))
    return path


def run_case(kind: str, path: Path, folder: Path) -> str:
    """Use a mutated file; return what happened, in a line."""
    warnings.simplefilter("ignore")
    try:
        TARGETS[kind].use(path, folder)
    except BaseException as error:
        if is_own(error):
            return f"refused {type(error).__name__}: {error}"
        traceback.print_exc()
        return f"TRACEBACK {type(error).__name__}: {error}"
    return "used"


def isolated(kind: str, path: Path, folder: Path, log: Path) -> str:
    """Run a case in a forked process with a limit on time and memory; return what happened, in a line."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if not SANITIZED:  # AddressSanitizer reserves terabytes of addresses
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        try:
            outcome = run_case(kind, path, folder)
            os.write(writer, outcome.encode("utf-8", "replace")[:2000])
            sys.stderr.flush()
        finally:
            os._exit(0)  # without the destructors, that would wait for threads which a fork does not copy
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], LIMIT)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    outcome = os.read(reader, 2000).decode("utf-8", "replace") if ready else f"HANG for {LIMIT:g} s"
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and ready:
        outcome = f"CRASH by {signal.Signals(os.WTERMSIG(status)).name}"
    elif os.WIFEXITED(status) and os.WEXITSTATUS(status):
        outcome = f"CRASH with status {os.WEXITSTATUS(status)}"
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=None, help="stop after this time")
    parser.add_argument("--count", type=int, default=None, help="cases of each kind (default: no limit)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, default=None, help="run this case alone, in this process")
    parser.add_argument("--keep", type=Path, default=None, help="with --case: write its files here, and leave them")
    arguments = parser.parse_args()
    kinds = arguments.kinds or list(TARGETS)
    if unknown := set(kinds) - set(TARGETS):
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if arguments.case is None and arguments.seconds is None and arguments.count is None:
        parser.error("give --seconds, --count or --case")

    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        source, work, log = Path(temporary, "source"), Path(temporary, "work"), Path(temporary, "log")
        source.mkdir()
        os.environ["OMP_NUM_THREADS"] = "1"
        for module in pkgutil.walk_packages(pz.__path__, "pocketzo."):  # here, and not again in each case
            # Those that need torch, or an engine that is not installed, read no file here.
            if "__main__" in module.name or ".export." in module.name:
                continue
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name not in ENGINES:
                    raise
        if SANITIZED:  # which watches the ends of what malloc returns, not those of mappings
            image._allocate = lambda size: np.zeros(size, np.uint8)
        # In a process of its own: a session's threads do not survive a fork.
        subprocess.run([sys.executable, "-c", BUILD, source], check=True)
        if arguments.case is not None:
            folder = arguments.keep or work
            for kind in kinds:
                print(kind, run_case(kind, mutated(kind, arguments.seed, arguments.case, source, folder), folder))
            return 0
        started, failures = time.monotonic(), 0
        counts: Counter[tuple[str, str]] = Counter()
        numbers = itertools.islice(itertools.count(arguments.first), arguments.count)
        for number, kind in ((number, kind) for number in numbers for kind in kinds):
            if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
                break
            path = mutated(kind, arguments.seed, number, source, work)
            outcome = isolated(kind, path, work, log)
            shutil.rmtree(work)
            word = outcome.partition(" ")[0]
            counts[kind, word] += 1
            if word not in ("used", "refused"):
                failures += 1
                print(log.read_text(errors="replace")[-4000:] if word == "CRASH" else "", end="")
                print(f"{outcome}\n  python -m fuzz {kind} --seed {arguments.seed} --case {number}", flush=True)
        for kind in kinds:
            print(f"{kind}:", ", ".join(f"{count} {word}" for (k, word), count in sorted(counts.items()) if k == kind))
        print(f"{sum(counts.values())} cases, {failures} failed, in {time.monotonic() - started:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
