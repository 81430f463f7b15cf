"""Time of a step of each method and its settings, relative to the forwards that it takes.

    python bench/methods.py [--models DIR] [--methods MeZO ...] [--batches 1x16 8x64] [--rounds 10] [--json FILE]

The methods take turns as in step.py, beside two forwards by onnxruntime with its default settings. A step of N queries
takes more forwards, so that each is compared with as many of these forwards as it takes itself. Times are means: with
block, each step moves tensors of another total size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from machine import Run
from models import SHAPES, make_bundle
from step import METHODS, measure, models_folder
from tables import methods_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="keep the prepared model in this folder (default: a temporary one)")
    parser.add_argument("--shape", choices=SHAPES, default="roberta-large")
    parser.add_argument("--batches", nargs="+", metavar="BxT", default=["1x16", "8x64"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()

    run = Run()
    cells = []
    with models_folder(arguments.models) as folder:
        bundle = make_bundle(arguments.shape, folder)
        for batch in arguments.batches:
            systems = ["forwards", *arguments.methods]
            plan = {"threads": arguments.threads, "rounds": arguments.rounds}
            cells.append(measure(arguments.shape, bundle, batch, systems, **plan))
            print(f"{arguments.shape}, {batch}: measured", file=sys.stderr, flush=True)
    print("\n".join(methods_table(run.finish({"cells": cells}, arguments.json))))


if __name__ == "__main__":
    main()
