"""``pocketzo federate``: server and clients as processes, which exchange files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_trainable import words_of

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.federated.mailbox import ANSWER, OFFER, Mailboxes, exchange, put, take
from pocketzo.federated.protocol import Answer, Reason, Refusal, decode_reply
from pocketzo.federated.server import Server


def federate(*arguments: Any, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["federate", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def files(tmp_path: Path, tiny_bundle: Path, tiny_data: Path) -> Path:
    """A folder with a bundle, a share of the data for each of two clients, and a server's run."""
    with np.load(tiny_data) as file:
        ids, labels = file["input_ids"], file["labels"]
    for name, kept in (("ann", labels < 2), ("bob", labels > 0)):
        np.savez(tmp_path / f"{name}.npz", input_ids=ids[kept], labels=labels[kept])
    (tmp_path / "base").symlink_to(tiny_bundle)
    federate("begin", tmp_path / "base", "-o", tmp_path / "server", "--lr", 0.01, "--steps", 6, "--queries", 2)
    return tmp_path


@pytest.fixture
def started(files: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def client(files: Path, name: str, *more: Any) -> list[str]:
    command = ["federate", "client", files / "base", "--data", files / f"{name}.npz", "-o", files / name, *more]
    return list(map(str, command))


def test_processes_train_together_over_folders(files: Path, started: list[subprocess.Popen[str]]) -> None:
    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pocketzo", *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    def ann_and_bob(name: str) -> subprocess.Popen[str]:
        (files / "mail" / name).mkdir(parents=True, exist_ok=True)
        return start(*client(files, name, "--mailbox", str(files / "mail" / name), "--threads", "1"))

    ann, bob = ann_and_bob("ann"), ann_and_bob("bob")
    serve = ("federate", "serve", str(files / "server"), "--mailbox", str(files / "mail"), "--round-seconds", "60")
    server = start(*serve)
    journal = files / "bob" / "journal.pzj"
    while not journal.exists() or not pz.Run(files / "bob").steps:
        assert server.poll() is None, server.communicate()
        time.sleep(0.01)
    bob.kill()  # in the middle of a step, perhaps; the next one goes on with its journal
    bob.wait()
    bob = ann_and_bob("bob")
    said, _ = server.communicate(timeout=200)
    assert server.returncode == 0, said
    state = said.split("6 steps, trained state ")[1].split()[0]
    for one in (ann, bob):
        one.terminate()
        said, _ = one.communicate(timeout=60)
        assert one.returncode == 128 + 15, said
        assert f"trained state {state}" in said
    files_of = [pz.Run(files / name).entries for name in ("server", "ann", "bob")]
    assert files_of[0] == files_of[1] == files_of[2]
    assert len(files_of[0]) == 6
    for command in (
        ["replay", str(files / "bob"), "-o", str(files / "tuned")],
        ["eval", str(files / "server"), "--data", str(files / "ann.npz")],
        ["info", str(files / "server")],
        ["info", str(files / "ann")],
    ):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(cli, ["train", "--resume", str(files / "server"), "--data", str(files / "ann.npz")])
    assert refused.exit_code == 1
    assert "expected of the clients of a federation" in refused.output


def test_one_offer_is_answered_by_a_file(files: Path) -> None:
    with Server.resume(files / "server") as server:
        offer = server.open(["ann"])["ann"]
        (files / "in").mkdir()
        (files / "in" / OFFER).write_bytes(offer)
        said = federate("client", *client(files, "ann", "--once", "--mailbox", files / "in")[2:])
        assert "examples, after step 0; offers come to" in said
        assert server.receive("ann", (files / "in" / ANSWER).read_bytes()) is None
        assert server.close_round().clients == ("ann",)
    assert not (files / "in" / OFFER).exists()
    (files / "in" / OFFER).write_bytes(b"PZO1 and more")
    said = federate("client", *client(files, "ann", "--once", "--mailbox", files / "in")[2:])
    assert "note: refused: a malformed offer: 13 bytes, expected at least" in said
    assert decode_reply((files / "in" / ANSWER).read_bytes()) == Refusal(0, Reason.MALFORMED)


def test_the_plan_is_printed_and_expected(files: Path) -> None:
    text = federate("plan", files / "server")
    assert json.loads(text)["method"]["queries"] == 2
    assert json.loads(federate("plan", files / "server", "--pretty")) == json.loads(text)
    (files / "plan.json").write_text(text.replace('"clip":100.0', '"clip":50.0'))
    with Server.resume(files / "server") as server:
        put(files / OFFER, server.open(["ann"])["ann"])
        more = ("--once", "--mailbox", files, "--plan", files / "plan.json")
        said = federate("client", *client(files, "ann", *more)[2:])
    assert "refused: the server has another plan than the one that this client expects" in said
    (files / "plan.json").write_text(text)
    with Server.resume(files / "server") as server:
        put(files / OFFER, server.open(["ann"])["ann"])
        assert "bytes up" in federate("client", *client(files, "ann", *more)[2:])


def test_the_app_for_flower_names_the_run(files: Path) -> None:
    import tomllib

    project = tomllib.loads((files / "server" / "app" / "pyproject.toml").read_text())
    expected = {"run": str(files / "server"), "round-seconds": 60.0, "least-clients": 2, "clients": 0}
    assert project["tool"]["flwr"]["app"]["config"] == expected
    (module, _) = project["tool"]["flwr"]["app"]["components"]["serverapp"].split(":")
    assert (files / "server" / "app" / f"{module}.py").exists()


def test_wrong_use(files: Path) -> None:
    assert "already exists" in federate("begin", files / "base", "-o", files / "server", "--lr", 1, code=1)
    pz.Trainer(
        model := pz.load(files / "base", threads=1),
        pz.MeZO(model, lr=1e-3),
        pz.load_dataset(files / "ann.npz", model.bundle),
        steps=1,
        run=files / "own",
    ).fit()
    said = federate("serve", files / "own", "--mailbox", files / "mail", code=1)
    assert "own: a run of one device, and not of a federation" in said


def test_a_mailbox_drops_what_is_not_for_it(tmp_path: Path, files: Path) -> None:
    (tmp_path / "mail" / "ann").mkdir(parents=True)
    put(tmp_path / "mail" / "ann" / ANSWER, b"old")
    boxes = Mailboxes(tmp_path / "mail")
    assert boxes.clients() == ["ann"]
    assert list(boxes.receive()) == []
    boxes.send({"ann": b"offer", "gone": b"offer"})
    assert take(tmp_path / "mail" / "ann" / OFFER) == b"offer"
    assert take(tmp_path / "mail" / "ann" / OFFER) is None
    with Server.resume(files / "server") as server:
        assert exchange(tmp_path / "mail" / "ann", server.open(["ann"])["ann"], 0.1) is None
    assert list((tmp_path / "mail" / "ann").iterdir()) == []  # no client took it


def test_a_client_keeps_what_comes_before_what_is_trained(tmp_path: Path, files: Path) -> None:
    base, cache, data = tmp_path / "last", tmp_path / "cache", tmp_path / "words.npz"
    feed, source = words_of("bert-old")
    pz.prepare(source, base, train="last:1+head")
    np.savez(data, **feed)  # type: ignore[arg-type]
    federate("begin", base, "-o", tmp_path / "run", "--lr", 0.01, "--steps", 2, "--shared-draws")
    answers = []
    with Server.resume(tmp_path / "run") as server:
        offer = server.open(["ann"])["ann"]
        for number, more in enumerate(((), ("--cache", cache))):
            (tmp_path / f"in-{number}").mkdir()
            put(tmp_path / f"in-{number}" / OFFER, offer)
            to = ("-o", tmp_path / f"client-{number}", "--mailbox", tmp_path / f"in-{number}", "--once", *more)
            said = federate("client", base, "--data", data, *to)
            answers.append(decode_reply((tmp_path / f"in-{number}" / ANSWER).read_bytes()))
    assert "of a forward pass come before what is trained" in said
    assert any(cache.iterdir())
    scalars = [list(answer.scalars) for answer in answers if isinstance(answer, Answer)]
    np.testing.assert_allclose(scalars[0], scalars[1], rtol=1e-3)
    refused = federate("client", *client(files, "ann", "--cache", cache)[2:], code=1)
    assert "too little is computed before the first trained tensor" in refused
