"""The stages of a pipeline as processes of Ray on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_decoders import FLOATS
from test_language_models import Sentences
from test_queries import on

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.errors import BundleError, Error
from pocketzo.formats.journal import Entry
from pocketzo.pipeline.actors import Actors
from pocketzo.pipeline.chain import chain_of, pooled_model
from pocketzo.pipeline.optimizer import pooled_method
from pocketzo.pipeline.split import split

pytestmark = pytest.mark.filterwarnings(  # Ray's own
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node with the files of three stages, started as docs/federated.md says; its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--include-dashboard=false"]
    command += [f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    command += ["--num-cpus=3", '--resources={"stage-0": 1, "stage-1": 1, "stage-2": 1}', "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("ray") / "log"
    os.environ["RAY_AUTH_TOKEN"] = "0123456789abcdef" * 4  # not that of the user
    with log.open("w") as file:
        busy = {"RAY_raylet_start_wait_time_s": "300"}
        node = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | busy)
    deadline = time.monotonic() + 300
    while "Ray runtime started" not in log.read_text():
        assert node.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    yield address
    node.terminate()
    node.wait(60)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pz.Bundle:
    folder = tmp_path_factory.mktemp("base")
    return pz.prepare(FLOATS["llama"](folder / "m.onnx"), folder / "base", task="causal-lm", train="all")


@pytest.fixture(params=[2, 3])
def workers(request: pytest.FixtureRequest, base: pz.Bundle, cluster: str, tmp_path: Path) -> Iterator[Actors]:
    count = request.param
    split(base, tmp_path / "stages", count)
    with Actors(tmp_path / "stages", count, address=cluster, threads=[1] * count) as actors:
        yield actors


def test_processes_learn_what_one_process_does(base: pz.Bundle, workers: Actors) -> None:
    batch = dict(Sentences(base.path.parent / "m.onnx").batch(np.arange(7)))
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "seed": 3, "queries": 3}
    model, whole = pooled_model(base, workers), pz.load(base, threads=1)
    for name, values in whole.run(batch).items():
        np.testing.assert_array_equal(model.run(batch)[name], values)
    entries: list[Entry] = []
    others: list[Entry] = []
    optimizer, single = pooled_method("mezo")(model, **settings), pz.MeZO(whole, **settings)
    for _ in range(4):
        optimizer.step(on(base, batch, 1), entries.append)
        single.step(on(base, batch, 1), others.append)
    assert entries == others
    seen = set()
    for call in chain_of(model).every("trained"):
        for name, values in chain_of(model).result(call).items():
            np.testing.assert_array_equal(values, whole.weights[name])
            seen.add(name)
    assert seen == set(single.names)
    pids = [chain_of(model).result(call) for call in chain_of(model).every("process")]
    assert len({*pids, os.getpid()}) == workers.count + 1
    with pytest.raises(Error, match="the stage cannot be run on this batch"):
        model.run({**batch, "input_ids": batch["input_ids"] + 10_000})
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(Error, match=r"stage 1 of the pipeline has ended: .* then the same command"):
        model.run(batch)


def test_what_is_missing_is_named(base: pz.Bundle, cluster: str, tmp_path: Path) -> None:
    split(base, tmp_path / "stages", 2)
    with pytest.raises(Error, match=r"has no device for stage-3: start one there with ray start --address"):
        Actors(tmp_path / "stages", 4, address=cluster)
    with pytest.raises(BundleError, match=r"stage-2: no such bundle"):
        Actors(tmp_path / "stages", 3, address=cluster, threads=[1] * 3)


@pytest.mark.filterwarnings("ignore:.*an incomplete entry and were dropped")
def test_the_command_trains_and_goes_on(cluster: str, tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:

    def command(*arguments: Any) -> str:
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    shown = command("pipeline", "split", tiny_bundle, "-o", tmp_path / "stages", "--stages", 2)
    assert "stage-1" in shown
    settings = ("--data", tiny_data, "--lr", 1e-3, "--threads", 1, "--batch-size", 8, "--method", "mezo")
    train = ("pipeline", "run", tiny_bundle, tmp_path / "stages", *settings)
    shown = command(*train, "-o", tmp_path / "run", "--steps", 4)
    assert "stage 1: " in shown
    command("train", tiny_bundle, *settings, "--steps", 4, "-o", tmp_path / "one")
    assert pz.Run(tmp_path / "run").entries == pz.Run(tmp_path / "one").entries
    os.truncate(tmp_path / "run" / "journal.pzj", (tmp_path / "run" / "journal.pzj").stat().st_size - 1)  # in a step
    command(*train, "-o", tmp_path / "run", "--steps", 4, "--address", cluster)
    assert pz.Run(tmp_path / "run").entries == pz.Run(tmp_path / "one").entries
    for name in ("run", "one"):
        command("replay", tmp_path / name, "-o", tmp_path / f"tuned-{name}")
    weights = [(tmp_path / f"tuned-{name}" / "weights.safetensors").read_bytes() for name in ("run", "one")]
    assert weights[0] == weights[1]
    done = CliRunner().invoke(
        cli, [*map(str, train), "-o", str(tmp_path / "one"), "--steps", "5", "--address", cluster]
    )
    assert done.exit_code == 1
    assert "holds a run with other settings: steps is 4 there and 5 here" in done.output
