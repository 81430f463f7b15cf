"""The commands that are disturbed, and what has to be on disk afterwards."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kills.lives import Life, Lives
from kills.storage import Storage, Tree, read_tree, write_tree
from pocketzo.errors import Error
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.journal import Journal
from pocketzo.formats.snapshot import snapshots

KILLED = -9
STEPS = 24


@dataclass
class Scenario:
    """A command that writes below ``root``.

    Attributes
    ----------
    words : list
        Its arguments.
    root : Path
    target : str
        What it writes, below the root.
    before : dict
        What is below the root before it.
    swaps : bool
        Whether the file system exchanges names.
    after : dict
        What is there after it; see :func:`lasting`.
    requests : int
        How many requests it makes of the file system.
    bytes : int
        How much it writes.
    seconds : float
        How long it takes.
    """

    name: str
    words: list[object]
    root: Path
    target: str
    before: Tree = field(default_factory=dict)
    swaps: bool = True
    after: dict[str, object] = field(default_factory=dict)
    requests: int = 0
    bytes: int = 0
    seconds: float = 0.0


class LossError(AssertionError):
    """Something was lost, changed or left behind."""


def lasting(tree: Tree) -> dict[str, object]:
    """Return what must not depend on interruptions: all names and bytes, but of what is for people.

    The line of a step may be missing, if the process was killed after it had appended the step to the journal; the time
    of a step is another one. So the picture differs, too.
    """
    found: dict[str, object] = dict(tree)
    for name, content in tree.items():
        if name.endswith(".png"):
            found[name] = "a picture"
        if name.endswith("metrics.jsonl") and content is not None:
            lines = [json.loads(line) for line in content.decode().splitlines()]
            found[name] = [line for line in lines if "eval" in line]
    return found


class Bench:
    """All scenarios, made in a folder, and what can happen to them."""

    def __init__(self, lives: Lives, folder: Path, model: Path, data: Path) -> None:
        self.lives = lives
        self.folder = folder
        self._record = folder / "record"
        base, old, run = folder / "base", folder / "old", folder / "run"
        prepare = ["prepare", model, "--labels", "red,green,blue", "-o"]
        self._good([*prepare, base], folder)
        self._good([*prepare, old, "--max-length", 5], folder)
        common = ["--data", data, "--eval", data, "--threads", 1, "--batch-size", 8, "--eval-every", 8, "-o"]
        self._good(["train", base, *common, run, "--steps", 12], folder)
        there: Tree = {"out": None, **{f"out/{name}": content for name, content in read_tree(old).items()}}
        root = folder / "root"
        replay = ["replay", run, "-o", root / "out", "--force"]
        again = [*prepare, root / "out", "--force"]
        train = ["train", base, *common, root / "out", "--steps", STEPS]
        self.scenarios = {
            scenario.name: scenario
            for scenario in (
                Scenario("prepare", again, root, "out"),
                Scenario("prepare, replacing", again, root, "out", there),
                Scenario(
                    "prepare, replacing by renames", [*prepare, root / "out", "--force"], root, "out", there, False
                ),
                Scenario("replay", replay, root, "out"),
                Scenario("replay, replacing", replay, root, "out", there),
                Scenario("train", [*train, "--snapshot-every", 10], root, "out"),
                Scenario("snapshots", [*train, "--snapshot-every", 1, "--method", "momentum"], root, "out"),
            )
        }
        for scenario in self.scenarios.values():
            self.reset(scenario)
            self._record.unlink(missing_ok=True)
            life = self._good(scenario.words, root, record=True, swaps=scenario.swaps)
            scenario.after = lasting(read_tree(root))
            lines = self._record.read_text().splitlines()
            scenario.requests = sum(not line.startswith("said") for line in lines)
            scenario.bytes = sum(len(line.split("\t")[3]) // 2 for line in lines if line.startswith("write"))
            scenario.seconds = life.seconds
            storage = Storage(root, scenario.before, self._record)
            self._expect(storage.tree() == read_tree(root), "the record is not that of all that was written")

    def reset(self, scenario: Scenario) -> None:
        shutil.rmtree(scenario.root, ignore_errors=True)
        scenario.root.mkdir()
        write_tree(scenario.before, scenario.root)

    # ---- killed ------------------------------------------------------------------------------------------------------

    def kill(self, scenario: Scenario, rng: np.random.Generator, events: list[str], record: Path | None = None) -> bool:
        """Run the command, killed at a random request or a random time; return whether that was before its end."""
        before = self._steps(scenario)
        run = functools.partial(self.lives.run, scenario.words, scenario.root, swaps=scenario.swaps, record=record)
        if rng.integers(2):
            at, part = int(rng.integers(1, scenario.requests + 1)), float(rng.random())
            events.append(f"killed at request {at}, with {part:.2f} of it")
            life = run(kill_at=at, part=part)
        else:
            delay = float(rng.uniform(0, scenario.seconds))
            events.append(f"killed after {delay:.3f} s")
            life = run(delay=delay)
        self._expect(life.code in (0, KILLED), f"exit code {life.code}: {life.err}")
        if not record:  # to read a bundle may bring it back, which would not be in the record
            self._check(scenario, before)
        return life.code == KILLED

    def kill_at(self, scenario: Scenario, request: int) -> None:
        """Run the command, killed at a request."""
        life = self.lives.run(scenario.words, scenario.root, kill_at=request, part=0.5, swaps=scenario.swaps)
        self._expect(life.code in (0, KILLED), f"exit code {life.code}: {life.err}")
        self._check(scenario, 0)

    def finish(self, scenario: Scenario) -> None:
        """Run the command undisturbed; everything must be as if it had never been disturbed."""
        life = self._good(scenario.words, scenario.root, swaps=scenario.swaps)
        self._expect("passed over" not in life.err, f"a snapshot could not be used: {life.err}")
        found = lasting(read_tree(scenario.root))
        wrong = [name for name in {*found, *scenario.after} if found.get(name, b"") != scenario.after.get(name, b"")]
        self._expect(not wrong, f"differ from those of the undisturbed command, are missing or left: {sorted(wrong)}")
        temporary = (path for path in self.lives.temporary.iterdir() if path.name != ".ses")  # onnxruntime's own
        left = [*temporary, *self.folder.glob(".*")]
        self._expect(not left, f"left behind: {left}")

    def _check(self, scenario: Scenario, steps: int) -> None:
        """Check what a killed process has left."""
        out = scenario.root / scenario.target
        if scenario.name in ("train", "snapshots"):
            now = self._steps(scenario)
            self._expect(now >= steps, f"{steps} steps were in the journal, {now} are left")
            return
        if out.exists() or scenario.before:
            Bundle.read(out)
            found = {name: content for name, content in read_tree(scenario.root).items() if name.startswith("out")}
            self._expect(found in (scenario.before, scenario.after), "neither the old bundle nor the new one")

    @staticmethod
    def _steps(scenario: Scenario) -> int:
        journal = scenario.root / scenario.target / "journal.pzj"
        return len(Journal.open(journal, write=False).entries) if journal.exists() else 0

    # ---- without power -----------------------------------------------------------------------------------------------

    def record(self, scenario: Scenario, rng: np.random.Generator, events: list[str]) -> Storage:
        """Run the command to its end, perhaps killed once before; return the record of all of it."""
        self.reset(scenario)
        self._record.unlink(missing_ok=True)
        if rng.integers(2):
            self.kill(scenario, rng, events, self._record)
        self._good(scenario.words, scenario.root, record=True, swaps=scenario.swaps)
        storage = Storage(scenario.root, scenario.before, self._record)
        self._expect(storage.tree() == read_tree(scenario.root), "the record is not that of all that was written")
        return storage

    def cut_power(self, scenario: Scenario, storage: Storage, rng: np.random.Generator, events: list[str]) -> None:
        """Cut the power after a random request. What was reported must be there, and the command must go on."""
        requests = int(rng.integers(storage.requests + 1))
        events.append(f"power cut after request {requests} of {storage.requests}")
        shutil.rmtree(scenario.root)
        scenario.root.mkdir()
        write_tree(storage.tree(requests, rng), scenario.root)
        steps = self._steps(scenario)
        for step, path in snapshots(scenario.root / scenario.target / "snapshots"):
            self._expect(step <= steps, f"{path} is there, and of its steps only {steps} are in the journal")
        self._check(scenario, 0)
        said = b"".join(text for number, text in storage.said if number < requests).decode()
        if said:  # all commands report at their end
            self._check_reported(scenario, said)
        self.finish(scenario)

    def _check_reported(self, scenario: Scenario, said: str) -> None:
        if scenario.name not in ("train", "snapshots"):
            Bundle.read(scenario.root / scenario.target)
        elif "steps, journal of" in said:
            steps = self._steps(scenario)
            self._expect(steps == STEPS, f"{steps} steps are left, reported were {STEPS}")

    # ---- with a full disk --------------------------------------------------------------------------------------------

    def fill_disk(self, scenario: Scenario, rng: np.random.Generator, events: list[str]) -> None:
        """Refuse to write after a random number of bytes."""
        self.reset(scenario)
        code = int(rng.choice([errno.ENOSPC, errno.EDQUOT, errno.EIO]))
        room = int(rng.integers(scenario.bytes))
        events.append(f"room for {room} of {scenario.bytes} bytes")
        life = self.lives.run(scenario.words, scenario.root, room=room, error=code, swaps=scenario.swaps)
        *_, line = life.err.splitlines() or [""]
        where = f"exit code {life.code}: {life.err}"
        self._expect(life.code == 1, where)
        self._expect(line.startswith(f"pocketzo: error: {scenario.root / scenario.target}/"), where)
        self._expect(line.endswith(f": {os.strerror(code)}") and "/." not in line, where)
        left = list(scenario.root.rglob(".*"))
        self._expect(not left, f"left behind: {left}")
        self._check(scenario, 0)
        self.finish(scenario)

    # ------------------------------------------------------------------------------------------------------------------

    def _good(self, words: list[object], root: Path, *, record: bool = False, swaps: bool = True) -> Life:
        life = self.lives.run(words, root, record=self._record if record else None, swaps=swaps)
        self._expect(life.code == 0, f"{words}: exit code {life.code}: {life.err}")
        return life

    @staticmethod
    def _expect(holds: bool, message: str) -> None:
        if not holds:
            raise LossError(message)


def kill_at_every_request(bench: Bench) -> Iterator[tuple[str, str]]:
    """Kill each command at each of its requests, a fresh start each time; yield as :func:`disturb`."""
    for scenario in bench.scenarios.values():
        for at in range(1, scenario.requests + 1):
            bench.reset(scenario)
            try:
                bench.kill_at(scenario, at)
                bench.finish(scenario)
            except (LossError, Error) as failure:
                raise LossError(f"{scenario.name}, killed at request {at}: {failure}") from None
            yield scenario.name, f"killed at request {at}"


def disturb(bench: Bench, kind: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Disturb the commands ``count`` times, and yield the name of the command and what was done, after each time.

    Parameters
    ----------
    bench : Bench
    kind : {"kill", "cut", "fill"}
    count, seed : int
        The n-th disturbance depends on both kind and seed, and on times that are measured, but not on ``count``.

    Raises
    ------
    LossError
        Something was lost, changed or left behind; says which disturbance it was.
    """
    rng = np.random.default_rng([seed, *kind.encode()])
    done = 0
    while done < count:
        scenario = bench.scenarios[str(rng.choice(list(bench.scenarios)))]
        events: list[str] = []
        try:
            if kind == "kill":
                bench.reset(scenario)
                while done < count and bench.kill(scenario, rng, events):
                    done += 1
                    yield scenario.name, events[-1]
                    if not rng.integers(4):
                        break
                bench.finish(scenario)
            elif kind == "cut":
                storage = bench.record(scenario, rng, events)
                for _ in range(min(10, count - done)):
                    bench.cut_power(scenario, storage, rng, events)
                    done += 1
                    yield scenario.name, events[-1]
            else:
                bench.fill_disk(scenario, rng, events)
                done += 1
                yield scenario.name, events[-1]
        except (LossError, Error) as failure:
            raise LossError(f"{scenario.name}, seed {seed}, {kind} {done}: {', '.join(events)}: {failure}") from None
