"""How long activations take from one process to another and back: over Ray, and over Flower's messages.

    python bench/engines.py [--rounds 20] [--json FILE]

A message is an array of float32: the hidden state of SmolLM2 for 16 x 32 and 16 x 64 tokens, or a single number. Ray
carries it to an actor, which returns it. Flower carries it from a ServerApp through a SuperLink to the ClientApp of a
SuperNode, on this machine, without TLS, with the settings that make it quickest: a process is started for a message,
and a SuperNode asks for messages every 3 seconds. Needs the extras `federated` and `pipeline`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from machine import Run, spread

from pocketzo.federated.app import project_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "federated"))
from network import Network, wait_for

SHAPES: dict[str, tuple[int, ...]] = {"one number": (1,), "16x32": (16, 32, 576), "16x64": (16, 64, 576)}

_ECHO = """\
import json
import os
import time

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client_app = ClientApp()
server_app = ServerApp()


@client_app.query()
def echo(message, context):
    return Message(message.content, reply_to=message)


@server_app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    found = {}
    for name, shape in json.loads(context.run_config["shapes"]).items():
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        found[name] = []
        for _ in range(context.run_config["rounds"]):
            began = time.perf_counter()
            content = RecordDict({"state": ArrayRecord([values])})
            waiting = set(grid.push_messages([Message(content, nodes[0], "query")]))
            while not (replies := list(grid.pull_messages(waiting))):
                time.sleep(0.002)
            back = replies[0].content["state"].to_numpy_ndarrays()[0]
            found[name].append(time.perf_counter() - began)
            assert np.array_equal(back, values)
    output = context.run_config["output"]
    with open(output + ".new", "w") as file:
        json.dump(found, file)
    os.replace(output + ".new", output)
"""


class Echo:
    """Returns what it gets."""

    def echo(self, values: Any) -> Any:
        return values


def over_ray(rounds: int) -> dict[str, list[float]]:
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    actor: Any = ray.remote(Echo).remote()
    found: dict[str, list[float]] = {}
    for name, shape in SHAPES.items():
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        ray.get(actor.echo.remote(values))
        found[name] = []
        for _ in range(rounds):
            began = time.perf_counter()
            back = ray.get(actor.echo.remote(values))
            found[name].append(time.perf_counter() - began)
            assert np.array_equal(back, values)
    ray.shutdown()
    return found


def over_flower(rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        app, output = Path(folder, "app"), Path(folder, "seconds.json")
        app.mkdir()
        config: dict[str, str | int | float] = {"shapes": json.dumps(SHAPES), "rounds": rounds, "output": str(output)}
        project = project_of("engines", "Returns what it gets.", "echo", config)
        (app / "pyproject.toml").write_text(project)
        (app / "echo.py").write_text(_ECHO)
        network = Network(Path(folder, "network"), secure=False)
        try:
            network.superlink()
            network.supernode("one", Path(folder))
            network.run("flwr", "run", app, "here")
            wait_for(output.exists, 60 + 30 * rounds * len(SHAPES), "echoing")
            found: dict[str, list[float]] = json.loads(output.read_text())
        finally:
            network.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = Run()
    found = {"Ray": over_ray(arguments.rounds), "Flower": over_flower(arguments.rounds)}
    results = [
        {"engine": engine, "message": name, "bytes": 4 * int(np.prod(SHAPES[name])), **spread(seconds)}
        for engine, times in found.items()
        for name, seconds in times.items()
    ]
    run.finish(results, arguments.json)
    for row in results:
        print(f"{row['engine']}, {row['message']}: {row['median']:.4g} s ({row['low']:.4g} to {row['high']:.4g})")


if __name__ == "__main__":
    main()
