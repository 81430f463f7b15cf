"""Disturb train, prepare, replay and snapshots at random: ``python -m kills --count 1000 --seed 5``, in ``tests/``."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from conftest import write_tiny_data, write_tiny_onnx

from kills.lives import Lives
from kills.scenarios import Bench, disturb, kill_at_every_request


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kills", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="disturbances of each kind  [default: 100]")
    parser.add_argument("--seed", type=int, default=None, help="[default: a random one, which is printed]")
    parser.add_argument(
        "--kind", choices=("every", "kill", "cut", "fill"), action="append", help="[default: the last three]"
    )
    arguments = parser.parse_args()
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if arguments.seed is None else arguments.seed
    print(f"--seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tiny_onnx(folder / "tiny.onnx")
        write_tiny_data(folder / "tiny.npz")
        with Lives(folder / "lives") as lives:
            (folder / "bench").mkdir()
            bench = Bench(lives, folder / "bench", folder / "tiny.onnx", folder / "tiny.npz")
            for scenario in bench.scenarios.values():
                print(
                    f"{scenario.name}: {scenario.requests} requests, {scenario.bytes} bytes, {scenario.seconds:.2f} s"
                )
            for kind in arguments.kind or ("kill", "cut", "fill"):
                started = time.monotonic()
                done: Counter[str] = Counter()
                events = (
                    kill_at_every_request(bench) if kind == "every" else disturb(bench, kind, arguments.count, seed)
                )
                for name, line in events:
                    done[name] += 1
                    if sum(done.values()) % 50 == 0:
                        print(f"{kind} {sum(done.values())}: {line}", flush=True)
                print(f"{kind}: {dict(done)}, all well, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
