from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256
from pocketzo.machine import cores
from pocketzo.runtime import threads as thread_choice

BATCH: dict[str, np.ndarray[Any, Any]] = {
    "input_ids": np.array([[3, 4, 5, 6], [7, 8, 9, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "labels": np.array([0, 2]),
}
# By core: capacity, highest frequency in kHz; None for a file that is missing.
PHONE = [(300, 2_000_000)] * 6 + [(1024, 2_400_000)] * 2  # 6 x A55, 2 x A78: the paper's
THREE_KINDS = [(250, 1_800_000)] * 4 + [(870, 2_420_000)] * 3 + [(1024, 2_840_000)]
ALIKE = [(1024, 3_000_000)] * 4
NEARLY_ALIKE = [(1024, 4_950_000), (1004, 4_850_000), (985, 4_750_000)]
Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Make this process see other cores, all of them or those that are named."""
    before = pz.kernels.threads()

    def install(kinds: list[tuple[int | None, int | None]], usable: set[int] | None = None) -> None:
        root = tmp_path / "cpu"
        for number, (capacity, frequency) in enumerate(kinds):
            (root / f"cpu{number}" / "cpufreq").mkdir(parents=True)
            if capacity is not None:
                (root / f"cpu{number}" / "cpu_capacity").write_text(f"{capacity}\n")
            if frequency is not None:
                (root / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq").write_text(f"{frequency}\n")
        monkeypatch.setattr(cores, "_CPUS", root)
        numbers = set(range(len(kinds))) if usable is None else usable
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: numbers, raising=False)
        pz.kernels.set_threads(len(numbers))

    yield install
    pz.kernels.set_threads(before)


def without(kinds: list[tuple[int, int]], *, capacity: bool = False, frequency: bool = False) -> list[Any]:
    return [(None if capacity else a, None if frequency else b) for a, b in kinds]


# ---- cores, as the system reports ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "usable", "fast", "counts"),
    [
        (PHONE, None, 2, [1, 2, 8]),
        (without(PHONE, capacity=True), None, 2, [1, 2, 8]),
        (without(PHONE, capacity=True, frequency=True), None, 8, [1, 2, 8]),
        (PHONE, {0, 1, 2, 3, 4, 5}, 6, [1, 2, 6]),  # in the background the big cores are gone
        (PHONE, {1, 2, 7}, 1, [1, 2, 3]),
        (PHONE, {7}, 1, [1]),
        (THREE_KINDS, None, 4, [1, 2, 4, 8]),
        (without(THREE_KINDS, capacity=True), None, 4, [1, 2, 4, 8]),
        (ALIKE, None, 4, [1, 2, 4]),
        (NEARLY_ALIKE, None, 3, [1, 2, 3]),
        # Not all capacities are reported, and they cannot be compared with frequencies.
        ([(None, 2_000_000), *PHONE[1:]], None, 2, [1, 2, 8]),
        ([(0, speed) for _, speed in PHONE], None, 2, [1, 2, 8]),  # nor is this a capacity
        ([(0, 0)] * 3, None, 3, [1, 2, 3]),
    ],
)
def test_fast_cores_and_numbers_of_threads(
    machine: Machine, kinds: list[Any], usable: set[int] | None, fast: int, counts: list[int]
) -> None:
    machine(kinds, usable)
    assert cores.usable() == sorted(range(len(kinds)) if usable is None else usable)
    assert cores.fast() == fast
    assert cores.thread_counts() == counts


def test_speeds_are_those_of_the_usable_cores(machine: Machine) -> None:
    machine(PHONE, {5, 6})
    assert cores.speeds() == [300, 1024]


@pytest.mark.parametrize("content", [b"", b"fast\n", b"\xff\xfe"])
def test_a_file_that_holds_no_number_is_ignored(machine: Machine, tmp_path: Path, content: bytes) -> None:
    machine(PHONE)
    (tmp_path / "cpu" / "cpu3" / "cpu_capacity").write_bytes(content)
    assert cores.speeds() == [2_000_000] * 6 + [2_400_000] * 2


def test_refusals_are_no_errors(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(PHONE)
    refused: list[str] = []

    def refuse(path: Path, *_: Any, **__: Any) -> str:
        refused.append(path.name)
        raise PermissionError(13, "Permission denied", str(path))

    def no_affinity(process: int) -> set[int]:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(os, "sched_getaffinity", no_affinity, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores.speeds() is None
    assert set(refused) == {"cpu_capacity", "cpuinfo_max_freq"}
    assert cores.usable() == [0, 1, 2, 3, 4]
    assert cores.fast() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.thread_counts() == [1]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.usable() == [0]


def test_no_more_threads_than_the_kernels_have(machine: Machine) -> None:
    machine(PHONE)
    pz.kernels.set_threads(3)
    assert cores.thread_counts() == [1, 2, 3]
    pz.kernels.set_threads(1)
    assert cores.thread_counts() == [1]


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "quickest"),
    [
        ({1: 4.0, 2: 2.0, 8: 3.0}, 2),
        ({1: 4.0, 2: 2.0, 8: 1.0}, 8),
        ({1: 1.0, 2: 1.2, 8: 4.0}, 1),
        ({1: 4.0, 2: 1.04, 8: 1.0}, 2),  # as good, and cooler
        ({1: 4.0, 2: 1.06, 8: 1.0}, 8),
    ],
)
def test_the_quickest_number_is_taken(seconds: dict[int, float], quickest: int) -> None:
    assert thread_choice.quickest(seconds) == quickest


class Sessions:
    """Lists the sessions that are made for timing, and sets the time that their forwards take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
        self.timed: list[int] = []
        self.at_once = 0
        self.clock = 0.0
        alive = 0
        run = pz.Model.run
        original = pz.Model.__init__

        def create(made: pz.Model, *arguments: Any, **options: Any) -> None:
            nonlocal alive
            original(made, *arguments, **options)
            if made.not_prepacked_because == "for timing":
                alive += 1
                self.at_once = max(self.at_once, alive)

        def gone(made: pz.Model) -> None:
            nonlocal alive
            alive -= getattr(made, "not_prepacked_because", None) == "for timing"

        def timed(made: pz.Model, *arguments: Any, **options: Any) -> Any:
            if made.not_prepacked_because == "for timing":
                self.timed.append(made.threads)
                session: Any = made._session
                assert session.get_session_options().intra_op_num_threads == made.threads
                self.clock += seconds[made.threads]
            return run(made, *arguments, **options)

        monkeypatch.setattr(pz.Model, "__init__", create)
        monkeypatch.setattr(pz.Model, "__del__", gone, raising=False)
        monkeypatch.setattr(pz.Model, "run", timed)
        monkeypatch.setattr(thread_choice, "time", SimpleNamespace(perf_counter=lambda: self.clock))


@pytest.mark.parametrize("prepack", [True, False])
def test_load_times_each_number_and_takes_the_quickest(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, prepack: bool
) -> None:
    machine(PHONE)
    sessions = Sessions(monkeypatch, {1: 1.5, 2: 0.4, 8: 0.125})
    loaded = pz.load(tiny_bundle, batch=BATCH, prepack=prepack)
    assert loaded.threads == 8
    session: Any = loaded._session
    assert session.get_session_options().intra_op_num_threads == 8
    assert loaded.forward_seconds == {1: 1.5, 2: 0.4, 8: 0.125}
    # As many as a second holds, but no more than five: one second is a long time beside a slow forward, too.
    assert sessions.timed == [1] + [2] * 3 + [8] * 5
    assert sessions.at_once == 1
    assert loaded.prepacked == prepack
    expected = pz.load(tiny_bundle, threads=1)
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(loaded.weights[name], weight)


@pytest.mark.parametrize(
    ("arguments", "kinds", "threads"),
    [
        ({"threads": 3, "batch": BATCH}, PHONE, 3),  # what is given counts
        ({}, PHONE, 2),
        ({}, ALIKE, 4),
        ({"batch": BATCH}, PHONE[:1], 1),  # one number alone
    ],
)
def test_nothing_is_timed_where_there_is_no_choice(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Path,
    arguments: dict[str, Any],
    kinds: list[Any],
    threads: int,
) -> None:
    machine(kinds)
    sessions = Sessions(monkeypatch, {})
    loaded = pz.load(tiny_bundle, **arguments)
    assert sessions.timed == []
    assert loaded.threads == threads
    assert loaded.forward_seconds == {}


def test_a_batch_without_labels_can_be_timed(machine: Machine, tiny_bundle: Path) -> None:
    machine(PHONE)
    loaded = pz.load(tiny_bundle, batch={name: array for name, array in BATCH.items() if name != "labels"})
    assert set(loaded.forward_seconds) == {1, 2, 8}


# ---- the journal -----------------------------------------------------------------------------------------------------


def test_the_journal_has_the_choice_and_a_resume_keeps_to_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tiny_data: Path, tmp_path: Path
) -> None:
    machine(ALIKE)
    data = pz.load_dataset(tiny_data, pz.Bundle.read(tiny_bundle))
    loaded = pz.load(tiny_bundle, batch=BATCH)
    loaded.threads, loaded.forward_seconds = 4, {1: 2.0, 4: 0.5, 10: 1.0}
    optimizer = pz.MeZO(loaded, lr=1e-3)
    trainer = pz.Trainer(loaded, optimizer, data, steps=3, run=tmp_path / "run", batch_size=4, snapshot_every=1)
    trainer.callback = lambda progress: setattr(trainer, "stop_requested", True)
    trainer.fit()
    recorded = pz.Run(tmp_path / "run").recipe.session
    assert recorded.threads == 4
    assert recorded.forward_seconds == {"1": 2.0, "4": 0.5, "10": 1.0}

    trainer = pz.Trainer.resume(tmp_path / "run", data)  # a warning would be an error, such as of the snapshot
    assert trainer.model.threads == 4
    trainer.callback = lambda progress: setattr(trainer, "stop_requested", True)
    trainer.fit()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    with pytest.warns(UserWarning, match=r"goes on with the 4 threads of its journal.* fewer cores to use \(1\)"):
        trainer = pz.Trainer.resume(tmp_path / "run", data)
    assert trainer.model.threads == 4
    trainer.fit()
    assert pz.Run(tmp_path / "run").steps == 3


def test_without_a_choice_the_journal_says_so(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    loaded = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, loaded.bundle)
    pz.Trainer(loaded, pz.MeZO(loaded, lr=1e-3), data, steps=1, run=tmp_path / "run").fit()
    recorded = pz.Run(tmp_path / "run").recipe.session
    assert (recorded.threads, recorded.forward_seconds) == (1, None)


def test_the_weights_follow_from_the_journal_whatever_the_threads(
    tiny_bundle: Path, tiny_data: Path, tmp_path: Path
) -> None:
    digests = set()
    for threads in (1, 3):
        loaded = pz.load(tiny_bundle, threads=threads)
        data = pz.load_dataset(tiny_data, loaded.bundle)
        run = tmp_path / f"run{threads}"
        pz.Trainer(loaded, pz.MeZO(loaded, lr=1e-3), data, steps=5, run=run).fit()
        loaded.save(tmp_path / f"tuned{threads}")
        pz.Run(run).replay(tmp_path / f"replayed{threads}")
        live, replayed = (
            file_sha256(tmp_path / f"{name}{threads}" / "weights.safetensors") for name in ("tuned", "replayed")
        )
        assert live == replayed
        digests.add(live)
    assert file_sha256(tiny_bundle / "weights.safetensors") not in digests
