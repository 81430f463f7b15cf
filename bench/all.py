"""Runs every benchmark whose figures make the tables, and then makes the tables; half an hour on a quiet machine.

    python bench/all.py [--models DIR] [--quick]

--quick is a smoke run: it takes a few minutes and writes nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from step import models_folder
from tables import RESULTS, ROOT

QUICK = {
    "noise": ["--mib", "64", "--rounds", "2"],
    "step": ["--shapes", "minilm", "--batches", "1x16", "8x64", "--rounds", "2"],
    "memory": ["--small"],
    "scale": ["--against", "threads", "--rounds", "2"],
    "methods": ["--shape", "minilm", "--batches", "1x16", "--rounds", "2"],
    "session": ["--shapes", "minilm", "--rounds", "2"],
    "loop": ["--steps", "300"],
    "mixed": ["--rounds", "2"],
    "accuracy": ["--target", "0.6", "--steps", "50", "--seeds", "0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, help="keep the prepared models in this folder (default: a temporary one)"
    )
    parser.add_argument("--quick", action="store_true", help="smoke run; write nothing")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with models_folder(arguments.models) as folder:
        for name, quick in QUICK.items():
            command = [sys.executable, f"bench/{name}.py"]
            if name not in ("noise", "mixed", "accuracy"):
                command += ["--models", str(folder)]
            if arguments.quick:
                command += quick
            else:
                command += ["--json", str((RESULTS / f"{name}.json").relative_to(ROOT))]
                if name in ("memory", "accuracy"):
                    command += ["--plot", f"bench/results/{name}.png"]
            started = time.perf_counter()
            print(f"$ python {' '.join(command[1:])}", flush=True)
            subprocess.run(command, cwd=ROOT, check=True)
            print(f"{name}: {time.perf_counter() - started:.0f} s\n", flush=True)
    if not arguments.quick:
        subprocess.run([sys.executable, "bench/tables.py"], cwd=ROOT, check=True)
    print(f"all: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
