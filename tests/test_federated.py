"""A federation in one process: what clients and server compute, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoders import llama_weights, write_llama
from test_language_models import Sentences

import pocketzo as pz
from pocketzo.data.order import Order
from pocketzo.errors import FederationError, JournalError
from pocketzo.federated.client import Client
from pocketzo.federated.draws import merge
from pocketzo.federated.plan import Plan, start_of_chain
from pocketzo.federated.protocol import Answer, Offer, Position, Reason, Refusal, decode_reply
from pocketzo.federated.server import RoundInfo, Server
from pocketzo.formats.journal import Entry, pack_entry
from pocketzo.formats.safetensors import file_sha256
from pocketzo.tasks.objective import Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of
from pocketzo.train.evaluator import Sample

NAMES = ("ann", "bob", "cid")
DOCUMENT = (Path(__file__).parents[1] / "docs" / "federated.md").read_text("utf-8")
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 16, "lr": 1e-2, "queries": 2, "seed": 5}


def shares(data: pz.Dataset, count: int, size: int | None = None) -> list[Sample]:
    """Split data by label, which is as unequal as shares can be."""
    labels = np.concatenate([data.batch(np.array([i]))["labels"] for i in range(len(data))])
    order = np.argsort(labels, kind="stable")
    parts = np.array_split(order, count) if size is None else [order[i * size : (i + 1) * size] for i in range(count)]
    return [Sample(data, part) for part in parts]


class Fleet:
    """A server and its clients, each with a model of its own."""

    def __init__(self, folder: Path, bundle: Path, data: Sequence[Any], **settings: Any) -> None:
        self.folder = folder
        self.bundle = bundle
        self.data = dict(zip((*NAMES, "dan"), data, strict=False))
        self.server = Server.begin(folder / "server", bundle, **{**SETTINGS, **settings})
        self.clients: dict[str, Client] = {}
        for name in self.data:
            self.start(name)

    def start(self, name: str, **options: Any) -> Client:
        """Start a client, or start it again: nothing is left of the one before but its folder."""
        if name in self.clients:
            self.clients[name].close()
        model = pz.load(self.bundle, threads=1)
        self.clients[name] = Client(self.folder / name, model, self.data[name], **options)
        return self.clients[name]

    def round(self, *names: str, spoil: Callable[[str, bytes], bytes | None] | None = None) -> RoundInfo:
        """Carry the messages of a round."""
        for name, offer in self.server.open(names or self.data).items():
            message: bytes | None = offer
            while message is not None:
                answer = self.clients[name].handle(message)
                changed = answer if spoil is None else spoil(name, answer)
                if changed is None:
                    break
                try:
                    message = self.server.receive(name, changed)
                except FederationError:
                    break
        return self.server.close_round()

    def close(self) -> None:
        self.server.close()
        for client in self.clients.values():
            client.close()


@pytest.fixture
def fleet_of(tmp_path: Path, tiny_bundle: Path, data: pz.Dataset) -> Iterator[Callable[..., Fleet]]:
    with ExitStack() as stack:

        def make(**settings: Any) -> Fleet:
            fleet = Fleet(tmp_path / "fleet", tiny_bundle, shares(data, 3), **settings)
            stack.callback(fleet.close)
            return fleet

        yield make


def same(fleet: Fleet) -> str:
    """Check that all have the same trained state, and the same bundle by replay; return its checksum."""
    states = {client.state for client in fleet.clients.values()} | {fleet.server.state}
    assert len(states) == 1
    files = set()
    for name in ("server", *fleet.clients):
        pz.Run(fleet.folder / name).replay(fleet.folder / f"tuned-{name}", bundle=fleet.bundle)
        files.add(file_sha256(pz.Bundle.read(fleet.folder / f"tuned-{name}").trained_path))
    assert len(files) == 1
    assert files != {file_sha256(pz.Bundle.read(fleet.bundle).trained_path)}
    return states.pop()


# ---- the same bits everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mezo", {"schedule": pz.Schedule("cosine", 4, 1), "weight_decay": 0.1}),
        ("mezo", {"subset": pz.Block(0.5), "groups": [pz.ParamGroup("classifier", lr=10, eps=3)]}),
        ("fzoo", {"queries": 4, "lr": 1e-3}),
        ("momentum", {}),
        ("lozo", {"rank": 3, "interval": 2}),
        ("mezo", {"shared_draws": True}),
        ("mezo", {"objective": "accuracy", "eps": 0.05}),
    ],
)
def test_all_devices_have_the_same_bits(fleet_of: Callable[..., Fleet], method: str, settings: dict[str, Any]) -> None:
    fleet = fleet_of(method=method, **settings)
    queries = settings.get("queries", 2)
    for step in range(4):
        info = fleet.round()
        assert info.step == step
        assert info.clients == NAMES
        assert info.entry is not None
        assert len(info.entry.coefficients) == queries * (1 if settings.get("shared_draws") else 3)
        assert not info.rejected
    assert fleet.server.is_done
    last = fleet.round()  # no step: it brings the last entry to everyone
    assert last.entry is None
    assert last.clients == NAMES
    same(fleet)


@pytest.mark.filterwarnings("ignore:.*prepacked, which is slower", "ignore:this processor does not compute in fp16")
@pytest.mark.parametrize("kind", ["float16", "bias", "lora on int4", "lora on float16"])
def test_every_trained_set_works(kind: str, tmp_path: Path, tiny_onnx: Path, data: pz.Dataset) -> None:
    given: list[Any] = shares(data, 3)
    options: dict[str, Any]
    if kind.startswith("lora"):
        write_llama(tmp_path / "llama.onnx", llama_weights(kv_heads=2), 2)
        given = [Sample(Sentences(tmp_path / "llama.onnx"), np.arange(i, 8, 3)) for i in range(3)]
        options = {"base": "int4"} if kind.endswith("int4") else {"dtype": "float16"}
        pz.prepare(tmp_path / "llama.onnx", tmp_path / "base", task="causal-lm", train="lora:r=2", **options)
    else:
        options = {"train": "bias"} if kind == "bias" else {"dtype": "float16"}
        pz.prepare(tiny_onnx, tmp_path / "base", labels=["red", "green", "blue"], max_length=16, **options)
    fleet = Fleet(tmp_path / "fleet", tmp_path / "base", given, eps=0.02, batch_size=2)
    for _ in range(5):
        fleet.round()
    same(fleet)
    fleet.close()


def test_pooled_data_on_one_device_gives_the_same_bits(
    tmp_path: Path, tiny_bundle: Path, data: pz.Dataset, model: pz.Model
) -> None:
    """One device takes plain steps of four directions, each on the data of a client.

    Four clients of equal size and an lr that is a power of two make the order of operations irrelevant.
    """
    parts = shares(data, 4, size=30)
    fleet = Fleet(tmp_path / "fleet", tiny_bundle, parts, queries=1, batch_size=30, lr=2**-6)
    for _ in range(5):
        fleet.round()
    same(fleet)
    alone = pz.MeZO(model, lr=2**-6, seed=5, queries=4, exact=True)
    objective = Objective(metric_objective("loss", model.bundle), task_of(model.bundle))
    entries: list[Entry] = []
    for step in range(4):
        batches = [part.batch(Order(seed=5, size=30, batch_size=30)(step)) for part in parts]
        calls = iter([batch for batch in batches for _ in "+-"])

        def on_the_next(model: pz.Model, calls: Iterator[Any] = calls) -> float:
            return OnBatch(objective, next(calls), 1)(model)

        alone.step(on_the_next, entries.append)
    assert entries == pz.Run(fleet.folder / "server").entries
    assert model.weights.sha256() == file_sha256(pz.Bundle.read(fleet.folder / "tuned-server").trained_path)
    fleet.close()


def test_devices_share_a_step_and_one_that_leaves_costs_its_share(
    tmp_path: Path, tiny_bundle: Path, data: pz.Dataset, model: pz.Model
) -> None:
    """Data parallel: the step of three devices along the same directions is that of one on all their examples."""
    parts = dict(zip(NAMES, shares(data, 3, size=30), strict=True))
    fleet = Fleet(tmp_path / "fleet", tiny_bundle, list(parts.values()), batch_size=30, shared_draws=True)
    everything = [NAMES, NAMES, (NAMES[0], NAMES[2]), NAMES]  # the second device is lost in the third step
    alone = pz.MeZO(model, lr=SETTINGS["lr"], seed=5, queries=2, exact=True)
    objective = Objective(metric_objective("loss", model.bundle), task_of(model.bundle))
    for step, names in enumerate(everything):
        info = fleet.round(spoil=lambda name, answer, names=names: answer if name in names else None)  # type: ignore[misc]
        assert info.entry is not None
        batches = [parts[name].batch(Order(seed=5, size=30, batch_size=30)(step)) for name in names]

        def mean(model: pz.Model, batches: Sequence[Any] = batches) -> float:
            return float(np.mean([OnBatch(objective, batch, 1)(model) for batch in batches]))

        expected = alone.step(mean)
        assert len(info.entry.coefficients) == 2
        for draw, value in expected.coefficients.items():
            assert info.entry.coefficients[draw] == pytest.approx(value, rel=1e-4, abs=1e-9)
    fleet.round()
    same(fleet)
    fleet.close()


def test_training_helps(fleet_of: Callable[..., Fleet], data: pz.Dataset) -> None:
    fleet = fleet_of(steps=60, lr=3e-2, queries=4, eval_every=30)
    fleet.start("ann", eval=data)
    losses = [fleet.round().loss for _ in range(60)]
    fleet.round()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    run = pz.Run(fleet.folder / "server")
    assert sorted(run.evaluations()) == [0, 30, 60]
    found = pz.evaluate(fleet.clients["bob"].model, data)["accuracy"]
    assert run.evaluations()[60]["accuracy"] == pytest.approx(found, abs=1e-6)
    assert found > 0.5


def test_a_step_weighs_by_examples_and_clips() -> None:
    answers = {"a": Answer(1, [1.0, -9.0], 30), "b": Answer(2, [2.0, 0.5], 10)}
    draws = {"a": range(4, 6), "b": range(6, 8)}
    entry = merge(answers, draws, lr=0.5, clip=4.0)
    assert entry == Entry(0.5, {4: 0.375, 5: -1.5, 6: 0.25, 7: 0.0625})
    shared = merge(answers, dict.fromkeys("ab", range(4, 6)), lr=0.5, clip=4.0)
    assert shared == Entry(0.5, {4: 0.625, 5: -1.4375})


def test_the_plan_bounds_the_examples_of_a_client(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of(most_examples=10)
    found = []

    def keep(_: str, answer: bytes) -> bytes:
        found.append(decode_reply(answer))
        return answer

    fleet.round(spoil=keep)
    assert [reply.examples for reply in found if isinstance(reply, Answer)] == [10, 10, 10]
    info = fleet.round(
        spoil=lambda name, answer: changed(answer, examples=11) if name == "bob" else answer,
    )
    assert info.clients == ("ann", "cid")
    assert "counts with 11 examples, expected 1 to 10" in info.rejected["bob"]


@pytest.mark.parametrize(("train", "queries"), [("all", 1), ("all", 4), ("lora:r=2", 1), ("lora:r=2", 16)])
def test_bytes_of_a_round(train: str, queries: int, tmp_path: Path) -> None:
    write_llama(tmp_path / "llama.onnx", llama_weights(kv_heads=2), 2)
    given = [Sample(Sentences(tmp_path / "llama.onnx"), np.arange(i, 8, 3)) for i in range(3)]
    bundle = pz.prepare(tmp_path / "llama.onnx", tmp_path / "bundle", task="causal-lm", train=train).path
    with closing(Fleet(tmp_path / "fleet", bundle, given, queries=queries, batch_size=2)) as fleet:
        fleet.round()  # with the plan
        info = fleet.round()
    line = re.search(rf"^\| {queries} \| (.+) B \| (.+) \| (.+) B \| (.+) \|$", DOCUMENT, re.MULTILINE)
    assert line
    down, each_down, up, each_up = (float(number.replace(",", "")) for number in line.groups())
    for name in NAMES:
        assert (info.down[name], info.up[name]) == (down, up)
        assert round(down / (3 * queries), 1) == each_down
        assert round(up / queries, 1) == each_up <= 200
        assert each_down <= 40 or queries == 1


# ---- clients that come, go and fail ----------------------------------------------------------------------------------


def changed(answer: bytes, **fields: Any) -> bytes:
    reply = decode_reply(answer)
    assert isinstance(reply, Answer)
    return dataclasses.replace(reply, **fields).encode()


def test_clients_come_late_are_killed_and_fail(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of(steps=6)
    assert fleet.round("ann", "bob").clients == ("ann", "bob")
    fleet.round("ann", "bob")
    assert not (fleet.folder / "cid").exists()
    before = fleet.clients["bob"]
    info = fleet.round(spoil=lambda name, answer: None if name == "bob" else answer)  # bob's answer is lost
    assert info.clients == ("ann", "cid")
    assert info.rejected == {"bob": "no answer in time"}
    assert fleet.start("bob") is not before
    assert fleet.clients["bob"].step == 2
    scalars = [math.nan, 1.0]
    info = fleet.round(spoil=lambda name, answer: changed(answer, scalars=scalars) if name == "ann" else answer)
    assert info.clients == ("bob", "cid")
    assert "ann sent the scalar nan" in info.rejected["ann"]
    info = fleet.round(spoil=lambda name, answer: changed(answer, scalars=[2e5, 0.0]) if name == "cid" else answer)
    assert "cid sent the scalar 200000.0, expected at most 100000" in info.rejected["cid"]
    fleet.server.close()
    fleet.server = Server.resume(fleet.folder / "server")
    assert fleet.server.step == 5
    assert fleet.round("ann").clients == ("ann",)
    assert fleet.round().clients == NAMES
    same(fleet)


def test_snapshots_make_no_difference(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of(method="momentum")
    fleet.server.close()
    fleet.server = Server.resume(fleet.folder / "server", snapshot_every=2)
    fleet.start("ann", snapshot_every=2)
    for _ in range(3):
        fleet.round()
    fleet.round("bob", "cid")
    fleet.server.close()
    fleet.server = Server.resume(fleet.folder / "server")
    fleet.start("ann")
    assert fleet.clients["ann"].step == 2
    assert [path.name for path in (fleet.folder / "ann" / "snapshots").iterdir()] == ["step-00000002"]
    assert [path.name for path in (fleet.folder / "server" / "snapshots").iterdir()] == ["step-00000004"]
    assert fleet.round().clients == NAMES
    same(fleet)


def test_a_round_without_answers_takes_no_step(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of()
    fleet.round()
    state = fleet.server.state
    old = fleet.server.open(NAMES)
    info = fleet.server.close_round()
    assert (info.entry, info.clients) == (None, ())
    assert fleet.server.state == state
    late = fleet.clients["ann"].handle(old["ann"])
    with pytest.raises(FederationError, match="came after its round"):
        fleet.server.receive("ann", late)
    fleet.server.open(NAMES)
    with pytest.raises(FederationError, match="belongs to no open offer: it is late"):
        fleet.server.receive("ann", late)
    fleet.server.close_round()


def test_nobody_answers_for_another_or_twice(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of()
    offers = fleet.server.open(NAMES)
    answer = fleet.clients["ann"].handle(offers["ann"])
    for name in "bob", "eve":
        with pytest.raises(FederationError, match="or of another client"):
            fleet.server.receive(name, answer)
    assert fleet.server.receive("ann", answer) is None
    with pytest.raises(FederationError, match="belongs to no open offer"):
        fleet.server.receive("ann", answer)
    assert fleet.server.close_round().clients == ("ann",)


def test_a_failing_client_says_so_and_keeps_its_weights(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of()
    fleet.round()
    client = fleet.clients["ann"]
    offers = fleet.server.open(NAMES)
    before = client.step, client.model.weights.sha256()
    client._train = Broken()
    refusal = client.reply(offers["ann"])
    assert decode_reply(refusal) == Refusal(Offer.decode(offers["ann"]).id, Reason.FAILURE)
    assert client.problem == "the disk of /home/ann is full"  # which stays with the client
    assert client.step == before[0] + 1
    with pytest.raises(FederationError, match="ann refused: failure"):
        fleet.server.receive("ann", refusal)
    assert fleet.server.close_round().rejected["ann"] == "ann refused: failure"
    assert client.state == fleet.server.state


class Broken:
    fingerprint = "broken"

    def __len__(self) -> int:
        return 40

    def batch(self, indices: Any) -> Any:
        raise OSError("the disk of /home/ann is full")


def test_noise_covers_the_scalars_and_nothing_else_leaves(fleet_of: Callable[..., Fleet], data: pz.Dataset) -> None:
    fleet = fleet_of(noise=0.5, clip=0.25, eval_every=1)
    fleet.start("ann", eval=data)
    found: list[Answer] = []

    def keep(_: str, answer: bytes) -> bytes:
        reply = decode_reply(answer)
        assert isinstance(reply, Answer)
        found.append(reply)
        return answer

    for _ in range(4):
        assert fleet.round(spoil=keep).clients == NAMES
    assert all(math.isnan(answer.loss) and not answer.evaluated for answer in found)
    scalars = np.array([answer.scalars for answer in found])
    expected = 0.5 * 2 * 0.25 * math.sqrt(2)
    assert 0.5 * expected < scalars.std() < 2 * expected  # 24 numbers
    assert fleet.clients["ann"].answers == 4
    assert fleet.start("ann").answers == 4
    fleet.round()
    same(fleet)


# ---- what a client refuses -------------------------------------------------------------------------------------------


def offer_of(fleet: Fleet, name: str = "ann") -> Offer:
    return Offer.decode(fleet.server.open(NAMES)[name])


def plan_with(fleet: Fleet, **fields: Any) -> bytes:
    plan = fleet.server.plan
    base = {key: value for key, value in fields.items() if hasattr(plan.base, key)}
    own = {key: value for key, value in fields.items() if key not in base}
    made = object.__new__(Plan)  # without its checks
    vars(made).update(vars(plan) | own | {"base": dataclasses.replace(plan.base, **base)})
    return made.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights_sha256": "0" * 64}, "not the base of the federation: weights_sha256 is"),
        ({"graph_sha256": "0" * 64}, "not the base of the federation: graph_sha256 is"),
        ({"task": {"name": "classification", "settings": {"labels": ["x", "y", "z"]}}}, "task is .*'red'"),
        ({"spec": 2}, "the noise specification has version 2 there and 1 here"),
        ({"version": 7}, "the protocol has version 7 there and 1 here"),
        ({"method": {"method": "adam", "exact": True, "queries": 2}}, "the plan's method cannot be followed"),
        ({"method": {"method": "mezo", "queries": 2}}, "needs a method with exact=True"),
        ({"clip": -1.0}, "clip must be"),
        ({"steps": 0}, "steps must be"),
        ({"objective": "joy"}, "'joy'"),
    ],
)
def test_a_client_does_not_join_by_a_wrong_plan(
    fleet_of: Callable[..., Fleet], fields: dict[str, Any], message: str
) -> None:
    fleet = fleet_of()
    plan = plan_with(fleet, **fields)
    offer = dataclasses.replace(offer_of(fleet), plan=plan, chain=start_of_chain(plan).digest())
    client = fleet.clients["ann"]
    with pytest.raises(FederationError, match=message):
        client.handle(offer.encode())
    assert client.plan is None
    assert not client.path.exists()
    assert client.handle(dataclasses.replace(offer, plan=fleet.server.plan.text, chain=honest_chain(fleet)).encode())


def honest_chain(fleet: Fleet, *entries: Entry) -> bytes:
    running = start_of_chain(fleet.server.plan.text)
    for entry in (*pz.Run(fleet.folder / "server").entries, *entries):
        running.update(pack_entry(entry))
    digest: bytes = running.digest()
    return digest


def test_a_client_has_limits_and_expectations(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of()
    offer = offer_of(fleet).encode()
    with pytest.raises(FederationError, match="2 directions a round, and this client evaluates at most 1"):
        fleet.start("ann", most_directions=1).handle(offer)
    with pytest.raises(FederationError, match="another plan than the one that this client expects"):
        fleet.start("ann", plan=plan_with(fleet, clip=3.0)).handle(offer)
    assert fleet.start("ann", plan=fleet.server.plan.text).handle(offer)


def test_a_client_refuses_what_does_not_follow(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of()
    fleet.round()
    fleet.round()
    honest = offer_of(fleet)
    client = fleet.clients["ann"]
    (entry,) = honest.entries
    draws = list(entry.coefficients)
    moved = Entry(entry.lr, {draw: 2 * value for draw, value in entry.coefficients.items()})
    used = Entry(entry.lr, {0: 1.0})
    fast = Entry(2 * entry.lr, dict(entry.coefficients))
    beyond = [entry, *(Entry(entry.lr, {draws[-1] + 1 + i: 0.0}) for i in range(3))]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"entries": [moved]}, "the hash chain of the journal breaks"),
        ({"entries": [entry], "chain": bytes(32)}, "the hash chain of the journal breaks"),
        ({"entries": [], "step": 0}, "the server is after step 0, and this client after step 1: .* lost steps"),
        ({"entries": [], "step": 1}, "the hash chain of the journal breaks"),
        ({"plan": plan_with(fleet, clip=1.0)}, "another plan than the one that this client's run began with"),
        ({"state": bytes(32)}, f"the trained state has SHA-256 {fleet.server.state} here and 0000"),
        ({"draws": range(draws[-1] + 1, draws[-1] + 4)}, "asks for 3 directions, the plan has 2"),
        ({"draws": range(draws[-1], draws[-1] + 2)}, rf"asks for draw {draws[-1]}, which a step before has used"),
    ]
    for entries, message in (
        ([used], "step 1 has draw 0, which a step before has used"),
        ([fast], "step 1 has lr 0.01999.*, the plan has 0.00999"),
        (beyond, "the server sent steps up to 5, the plan has 4"),
    ):
        running = start_of_chain(fleet.server.plan.text)
        for one in [pz.Run(fleet.folder / "server").entries[0], *entries]:
            running.update(pack_entry(one))
        cases.append(({"entries": entries, "chain": running.digest()}, message))
    before = client.step, client.state, (client.path / "journal.pzj").read_bytes()
    for fields, message in cases:
        with pytest.raises(FederationError, match=message):
            client.handle(dataclasses.replace(honest, **fields).encode())
        assert (client.step, client.state, (client.path / "journal.pzj").read_bytes()) == before
    fleet.server.receive("ann", client.handle(honest.encode()))
    assert fleet.server.close_round().clients == ("ann",)


def test_a_server_that_lost_steps_is_refused(fleet_of: Callable[..., Fleet], tmp_path: Path) -> None:
    fleet = fleet_of()
    fleet.round()
    shutil.copytree(fleet.folder / "server", tmp_path / "copy")
    fleet.round()
    fleet.round()
    fleet.server.close()
    fleet.server = Server.resume(tmp_path / "copy", fleet.bundle)
    with pytest.raises(FederationError, match="after step 1, and this client after step 2: the server has lost steps"):
        fleet.round()


def test_a_server_refuses_a_client_of_another_journal(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of()
    fleet.round()
    number = offer_of(fleet).id
    for position, message in (
        (Position(number, True, 1, bytes(32)), "ann has another journal, of 1 steps"),
        (Position(number, True, 2, bytes(32)), "ann is after step 2, and the server after step 1"),
    ):
        with pytest.raises(FederationError, match=message):
            fleet.server.receive("ann", position.encode())
    again = fleet.server.receive("ann", Position(number, False, 0, bytes(32)).encode())
    assert again is not None
    with pytest.raises(FederationError, match="ann asks again"):
        fleet.server.receive("ann", Position(Offer.decode(again).id, False, 0, bytes(32)).encode())


def test_folders_of_another_kind_are_refused(
    fleet_of: Callable[..., Fleet], tmp_path: Path, data: pz.Dataset, model: pz.Model
) -> None:
    fleet = fleet_of()
    fleet.round()
    pz.Trainer(model, pz.MeZO(model, lr=1e-3), data, steps=1, run=tmp_path / "own").fit()
    with pytest.raises(JournalError, match="own: a run of one device, and not of a federation"):
        Server.resume(tmp_path / "own")
    with pytest.raises(JournalError, match="a run of one device"):
        Client(tmp_path / "own", pz.load(fleet.bundle, threads=1), data)
    fleet.clients["ann"].close()
    with pytest.raises(FederationError, match=r"began with other data: expected 40 examples of .*, got 120"):
        Client(fleet.folder / "ann", pz.load(fleet.bundle, threads=1), Sample(data, np.arange(120)))
    with pytest.raises(JournalError, match="the train data is not that of the run"):
        pz.Trainer.resume(fleet.folder / "server", data)


def test_the_server_refuses_settings_that_clients_could_not_share(tmp_path: Path, tiny_bundle: Path) -> None:
    for settings, message in (
        ({"exact": False}, "exact=True"),
        ({"share": "batch"}, "share is for one device"),
        ({"pace": pz.Pace(0.1)}, "pace is for one device"),
        ({"candidates": 8}, "candidates is for one device"),
        ({"clip": math.inf}, "clip must be finite"),
        ({"clip": 1e38, "lr": 1e3}, "give steps beyond float32"),
        ({"objective": "joy"}, "joy"),
        ({"queries": 0}, "queries"),
    ):
        with pytest.raises(ValueError, match=message):
            Server.begin(tmp_path / "server", tiny_bundle, **{**SETTINGS, **settings})
        assert not (tmp_path / "server").exists()


# ---- malformed messages ----------------------------------------------------------------------------------------------


def mutated(rng: random.Random, message: bytes, others: Sequence[bytes]) -> bytes:
    """Return other bytes than the message; half of them with the right checksum, so that they are read to the end."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(6):
            case 0:
                del data[at:]
            case 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**20 + 1, 2**31, 2**32 - 1)))
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 4:
                del data[at : at + rng.randrange(1, 40)]
            case _:
                data[at:] = rng.choice(others)[at:]
    if rng.random() < 0.5:
        body = bytes(data[:-4])
        data = bytearray(body + struct.pack("<I", zlib.crc32(body)))
    return bytes(data)


def test_500_malformed_messages_change_nothing_on_the_server(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of()
    fleet.round()
    offers = fleet.server.open(NAMES)
    answers = {name: fleet.clients[name].handle(offers[name]) for name in NAMES}
    number = Offer.decode(offers["ann"]).id
    position = Position(number, True, 1, honest_chain(fleet)).encode()
    genuine = [answers["ann"], position, Refusal(number, Reason.FAILURE).encode(), offers["ann"]]
    rng, tried, state = random.Random(4), 0, fleet.server.state
    while tried < 500:
        message = mutated(rng, rng.choice(genuine), [*genuine, answers["bob"]])
        try:
            reply = decode_reply(message)
        except FederationError:
            pass
        else:  # a message as a client may send it: other scalars are no error that a server could see
            if isinstance(reply, Answer | Position) and reply.id == number:
                continue
        with pytest.raises(FederationError):
            fleet.server.receive("ann", message)
        tried += 1
        assert fleet.server.waits_for >= {"bob", "cid"}
        assert fleet.server.state == state
    for name in NAMES:
        assert fleet.server.receive(name, answers[name]) is None
    assert fleet.server.close_round().clients == NAMES


def test_500_malformed_messages_change_nothing_on_a_client(fleet_of: Callable[..., Fleet]) -> None:
    fleet = fleet_of()
    fleet.round()
    fleet.round()
    client = fleet.clients["ann"]
    offers = fleet.server.open(NAMES)
    rng, tried = random.Random(5), 0
    before = client.step, client.state, (client.path / "journal.pzj").read_bytes()
    while tried < 500:
        message = mutated(rng, offers["ann"], [*offers.values()])
        if could_be_honest(message, Offer.decode(offers["ann"]), client.step):
            continue
        with pytest.raises(FederationError):
            client.handle(message)
        tried += 1
        assert client.step == before[0]
    assert (client.step, client.state, (client.path / "journal.pzj").read_bytes()) == before
    for name in NAMES:
        fleet.server.receive(name, fleet.clients[name].handle(offers[name]))
    assert fleet.server.close_round().clients == NAMES


def could_be_honest(message: bytes, honest: Offer, step: int) -> bool:
    """Whether a server may send this: id, draws that are not used yet, and evaluations are its own to choose."""
    try:
        offer = Offer.decode(message)
    except FederationError:
        return False
    same = dataclasses.replace(offer, id=honest.id, draws=honest.draws, wants_evaluation=honest.wants_evaluation)
    free = not offer.draws or (len(offer.draws) == len(honest.draws) and offer.draws.start >= min(honest.draws))
    return offer.step > step or (same == honest and free)  # the first is answered by the client's position
