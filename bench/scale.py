"""Time and memory of a step against parameters, tokens and threads.

    python bench/scale.py [--models DIR] [--rounds 3] [--json FILE]

    parameters   MiniLM's, BERT-base's and RoBERTa-large's shape, 8 x 64 tokens, 2 threads
    tokens       BERT-base's shape, 1 x 16 to 16 x 128 tokens, 2 threads
    threads      BERT-base's shape, 8 x 64 tokens, 1 and 2 threads

Each point is a MeZO step, with the weight layout that the library chooses, beside two forwards by onnxruntime with its
default settings, measured as in step.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from machine import Run
from models import make_bundle
from step import measure, models_folder
from tables import scale_table

PARAMETERS = ("minilm", "bert-base", "roberta-large")
TOKENS = ("1x16", "1x64", "4x64", "8x64", "8x128", "16x128")
SHAPE, BATCH, THREADS = "bert-base", "8x64", 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, help="keep the prepared models in this folder (default: a temporary one)"
    )
    parser.add_argument("--against", nargs="+", choices=("parameters", "tokens", "threads"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()

    plan = {
        "parameters": [(shape, BATCH, THREADS) for shape in PARAMETERS],
        "tokens": [(SHAPE, batch, THREADS) for batch in TOKENS],
        "threads": [(SHAPE, BATCH, threads) for threads in (1, 2)],
    }
    against = arguments.against or list(plan)
    run = Run()
    cells = {}
    with models_folder(arguments.models) as folder:
        for point in dict.fromkeys(point for name in against for point in plan[name]):
            shape, batch, threads = point
            bundle = make_bundle(shape, folder)
            cells[point] = measure(
                shape, bundle, batch, ("forwards", "default"), threads=threads, rounds=arguments.rounds
            )
            print(f"{shape}, {batch}, {threads} threads: measured", file=sys.stderr, flush=True)
    results = {name: [cells[point] for point in plan[name]] for name in against}
    print("\n".join(scale_table(run.finish(results, arguments.json))))


if __name__ == "__main__":
    main()
