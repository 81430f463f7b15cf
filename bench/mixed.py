"""A noise pass on fast and slow cores together; the cores are simulated.

    python bench/mixed.py [--rounds 9] [--json FILE]

Builds and runs mixed.cpp (`cmake --preset release`), which describes the simulation. Slow cores are 2.8 times as slow
as fast ones: by the kernels' targets, a Gaussian takes 13 cycles on a Cortex-A55 at 2.0 GHz and 5.6 on a Cortex-A78 at
2.4 GHz.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from machine import Run, spread
from tables import ROOT, mixed_table

SLOWNESS = 2.8
CASES = ((2, 6, SLOWNESS, "sleep"), (4, 4, SLOWNESS, "sleep"), (8, 0, 1.0, "sleep"), (1, 1, SLOWNESS, "spin"))
SYSTEMS = ("alone", "split", "units")


def build() -> Path:
    for command in (["cmake", "--preset", "release"], ["cmake", "--build", "--preset", "release", "--target", "mixed"]):
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return ROOT / "build" / "release" / "bench" / "mixed"


def measure(program: Path, fast: int, slow: int, slowness: float, how: str, rounds: int) -> dict[str, Any]:
    command = [str(program), *map(str, (fast, slow, slowness, how, rounds))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    columns = np.array([line.split() for line in lines], float).T.tolist()
    times = {name: spread(seconds) for name, seconds in zip(SYSTEMS, columns, strict=True)}
    return {"fast": fast, "slow": slow, "slowness": slowness, "how": how, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()
    program = build()
    run = Run()
    rows = [measure(program, *case, arguments.rounds) for case in CASES]
    print("\n".join(mixed_table(run.finish({"rows": rows}, arguments.json))))


if __name__ == "__main__":
    main()
