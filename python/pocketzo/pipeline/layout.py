"""Which layout fits on some devices, what memory it takes on each, and how long a step takes: arithmetic alone."""

from __future__ import annotations

import contextlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pocketzo.arguments import check_number
from pocketzo.errors import DataError, MemoryLimitError, NotCuttableError
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.memory import megabytes, parse_size
from pocketzo.optim.methods import METHODS
from pocketzo.runtime.loader import room_to_load
from pocketzo.runtime.stages import MeasuredGraph, StagePlan, measured, plan_stages, stored_bytes

Kind = Literal["one device", "data parallel", "pipeline"]

PROCESS: Final = 65_000_000
"""Bytes of a process that has loaded Python, numpy and onnxruntime, and no model: 62 MB on x86-64."""


class Engine(NamedTuple):
    """The memory of what carries the activations of a pipeline.

    Attributes
    ----------
    process : int
        Bytes that it takes more in the process of a stage, and in that which leads the run.
    device : int
        Bytes of its own processes on each device.
    first : int
        Bytes of those that run on one device of the cluster only, the first.
    """

    process: int
    device: int
    first: int

    def on(self, number: int) -> int:
        """Return the bytes on the device of a stage; the first device also leads the run."""
        return self.process + self.device + (0 if number else self.first + PROCESS + self.process)


RAY: Final = Engine(process=60_000_000, device=165_000_000, first=145_000_000)
"""Ray 2.60 on x86-64 Linux. An actor that had imported a stage's modules had 121 MB resident, a process without Ray 63.
The others are proportional set sizes after ``ray start``: the raylet, the log monitor and two agents had 163 MB, and on
the first device the control store, the autoscaler's monitor and the dashboard 145 more."""
_PACKED: Final = {"MatMul", "Gemm"}
_LEAST: Final = 1e-6  # share of a stage that should be as small as it can


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes
    ----------
    name : str
    memory : int
        Bytes that the model's process may take.
    speed : float
        Multiply-adds a second, of matrix products with all threads.
    noise : float
        Seconds in which a weight is perturbed.
    """

    name: str
    memory: int
    speed: float
    noise: float = 0.0


@dataclass(frozen=True)
class Network:
    """What connects the devices.

    Attributes
    ----------
    bandwidth : float
        Bytes a second.
    latency : float
        Seconds of a message that holds nothing.
    """

    bandwidth: float = 12.5e6
    latency: float = 0.003

    def seconds(self, nbytes: int) -> float:
        """Return how long a message takes."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Batch:
    """A step's batch, and its passes.

    Attributes
    ----------
    rows, tokens, positions : int
        Of the batch; positions are those whose logits count.
    passes : int
        Evaluations of the batch in a step.
    """

    rows: int
    tokens: int
    positions: int
    passes: int


@dataclass(frozen=True)
class Share:
    """What a device does in a layout.

    Attributes
    ----------
    device : Device
    rows : int
        Of the batch.
    weights : int
        Bytes of weights on its disk.
    resident : int
        Bytes of weights in its memory.
    memory : int
        Bytes that this takes at most.
    engine : int
        Bytes of these that are the engine's of a pipeline.
    seconds : float
        Of one pass, without waiting.
    """

    device: Device
    rows: int
    weights: int
    resident: int
    memory: int
    engine: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.memory <= self.device.memory


@dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes
    ----------
    kind : {"one device", "data parallel", "pipeline"}
    shares : tuple of Share
        By stage, or in the order of the devices.
    cuts : tuple of tuple of str
        What crosses each cut of a pipeline.
    seconds : float
        Of a step.
    parts : tuple of float
        The shares by which :func:`pocketzo.pipeline.split.split` makes the stages of a pipeline.
    ending : int
        Bytes of weights in the memory of the last stage of any pipeline at least: those behind the last place where the
        graph can be cut, such as the output projection.
    """

    kind: Kind
    shares: tuple[Share, ...]
    cuts: tuple[tuple[str, ...], ...]
    seconds: float
    parts: tuple[float, ...] = ()
    ending: int = 0

    @property
    def fits(self) -> bool:
        """Whether each device has the memory."""
        return all(share.fits for share in self.shares)

    def described(self) -> dict[str, Any]:
        """Return the layout as JSON."""
        pipeline = {"shares": list(self.parts), "last_stage_at_least": self.ending} if self.parts else {}
        return {
            "layout": self.kind,
            "fits": self.fits,
            "seconds": round(self.seconds, 6),
            "devices": [
                {
                    "name": share.device.name,
                    "rows": share.rows,
                    "weights": share.weights,
                    "weights_in_memory": share.resident,
                    "memory": share.memory,
                    "engine": share.engine,
                    "available": share.device.memory,
                    "seconds_a_pass": round(share.seconds, 6),
                }
                for share in self.shares
            ],
            "cuts": [list(cut) for cut in self.cuts],
            **pipeline,
        }


def step_seconds(stages: Sequence[float], sends: Sequence[float], passes: int) -> float:
    """Return the seconds of a step of a pipeline.

    The first pass goes through all stages; each later one ends as long after the pass before it as the slowest part
    takes, a stage or a connection.

    Parameters
    ----------
    stages : sequence of float
        Seconds of a pass in each stage.
    sends : sequence of float
        Seconds in which the values of a pass go from each stage but the last to the next one.
    passes : int
    """
    return math.fsum([*stages, *sends, (passes - 1) * max([*stages, *sends])])


def rows_by_speed(rows: int, speeds: Sequence[float]) -> list[int]:
    """Return how many rows of a batch each of some devices takes, in proportion to its speed; the sum is ``rows``."""
    ideal = [rows * speed / math.fsum(speeds) for speed in speeds]
    found = [int(share) for share in ideal]
    for index in sorted(range(len(speeds)), key=lambda index: found[index] - ideal[index])[: rows - sum(found)]:
        found[index] += 1
    return found


def layouts(
    bundle: Bundle, devices: Sequence[Device], batch: Batch, network: Network | None = None, engine: Engine = RAY
) -> list[Layout]:
    """Return the layouts of a bundle on some devices, those that fit first, and of these the quickest first.

    Considered are each device alone, all that hold the whole model at once (data parallel), and pipelines of the first
    2, 3 and so on. Their stages have shares of the weights in memory in proportion to speed. If that does not fit, the
    stages fill the memory of their devices to the same share, by weights and activations.

    Parameters
    ----------
    bundle : Bundle
        With a probing batch.
    devices : sequence of Device
    batch : Batch
    network : Network, optional
        100 Mbit/s and 3 ms by default.
    engine : Engine
        Of pipelines.

    Raises
    ------
    NotCuttableError
        The graph cannot be measured.
    """
    network = network or Network()
    graph = measured(bundle)
    (whole,) = plan_stages(bundle, 1, graph=graph)
    found = [_of("one device", bundle, [whole], [device], [batch.rows], batch, network) for device in devices]
    able = [layout.shares[0].device for layout in found if layout.fits]
    if len(able) > 1:
        rows = rows_by_speed(batch.rows, [device.speed for device in able])
        found.append(_of("data parallel", bundle, [whole] * len(able), able, rows, batch, network))
    for count in range(2, len(devices) + 1):
        with contextlib.suppress(NotCuttableError):
            found += _pipelines(bundle, devices[:count], batch, network, engine, graph)
    return sorted(found, key=lambda layout: (not layout.fits, layout.seconds))


def _pipelines(
    bundle: Bundle, devices: Sequence[Device], batch: Batch, network: Network, engine: Engine, graph: MeasuredGraph
) -> list[Layout]:
    """Return the pipeline by speed, and if it does not fit the one by memory."""

    def layout(shares: Sequence[float]) -> Layout:
        parts = tuple(float(f"{share / min(shares):.4g}") for share in shares)
        plans = plan_stages(bundle, len(devices), parts, graph=graph)  # as `pipeline split` does
        made = _of("pipeline", bundle, plans, devices, [batch.rows] * len(plans), batch, network, engine)
        return replace(made, parts=parts, ending=ending)

    ending = plan_stages(bundle, 2, [1.0, _LEAST], graph=graph)[-1].resident
    found = [layout([device.speed for device in devices])]
    if not found[0].fits:
        used = [PROCESS + engine.on(number) for number in range(len(devices))]
        room = [max(device.memory - own, _LEAST * device.memory) for device, own in zip(devices, used, strict=True)]
        values = (batch.rows, batch.tokens, batch.positions)
        full = plan_stages(bundle, len(devices), room, graph=graph, batch=values)
        found.append(layout([max(plan.resident, 1) for plan in full]))
    return found


def _of(
    kind: Kind,
    bundle: Bundle,
    plans: Sequence[StagePlan],
    devices: Sequence[Device],
    rows: Sequence[int],
    batch: Batch,
    network: Network,
    engine: Engine | None = None,
) -> Layout:
    trained = {tensor.name: math.prod(tensor.shape) for tensor in bundle.tensors if tensor.trainable}
    shares = []
    sent = [plan.sent(batch.rows, batch.tokens) for plan in plans]
    for number, (plan, device, own) in enumerate(zip(plans, devices, rows, strict=True)):
        positions = batch.positions * own / batch.rows
        moved = sum(trained.get(name, 0) for name in plan.tensors)
        seconds = plan.work(own, batch.tokens, positions) / device.speed + moved * device.noise
        memory = stage_memory(bundle, plan, own, batch.tokens, positions)
        # all passes of a step are under way at once: what a stage has given waits for the next one
        carried = engine.on(number) + batch.passes * sum(sent[max(number - 1, 0) : number + 1]) if engine else 0
        shares.append(Share(device, own, plan.nbytes, plan.resident, memory + carried, carried, seconds))
    each = [share.seconds for share in shares]
    cuts: tuple[tuple[str, ...], ...] = ()
    if kind == "pipeline":
        sends = [network.seconds(nbytes) for nbytes in sent[:-1]]
        step = step_seconds(each, sends, batch.passes) + network.latency
        cuts = tuple(tuple(kept.name for kept in plan.gives) for plan in plans[:-1])
    else:
        step = batch.passes * max(each) + (2 * network.latency if kind == "data parallel" else 0.0)
    return Layout(kind, tuple(shares), cuts, step)


def stage_memory(bundle: Bundle, plan: StagePlan, rows: float, tokens: float, positions: float) -> int:
    """Return the bytes that the process of a stage takes at most, about: an estimate, as for ``max_memory``.

    Parameters
    ----------
    bundle : Bundle
        The whole one.
    plan : StagePlan
    rows, tokens, positions : float
        Of a batch.
    """
    sizes, largest = stored_bytes(bundle), 0
    if not plan.is_frozen:
        largest = max((sizes[name] for name, kinds in plan.readers().items() if kinds & _PACKED), default=0)
    room = room_to_load(plan.nbytes, largest) + plan.activations(rows, tokens, positions)
    return PROCESS + plan.resident + room


def passes_of(method: str, queries: int | None) -> int:
    """Return the evaluations of a batch in a step of a method."""
    return METHODS[method].evaluations(queries)


def best_layout(found: Sequence[Layout]) -> Layout:
    """Return the first layout that fits.

    Raises
    ------
    MemoryLimitError
        None does; names what each device lacks.
    """
    if found[0].fits:
        return found[0]
    lacks = []
    for layout in found:
        short = next(share for share in layout.shares if not share.fits)
        where = layout.kind if layout.kind == "one device" else f"{layout.kind} of {len(layout.shares)}"
        engine = f", {megabytes(short.engine)} of them Ray's" if short.engine else ""
        has = f"{short.device.name} has {megabytes(short.device.memory)} of {megabytes(short.memory)}{engine}"
        lacks.append(f"{where}: {has}")
    raise MemoryLimitError(
        f"the model fits in no layout ({'; '.join(lacks)}). Add a device, or prepare the model in fewer bits"
    )


# ---- the devices' file -----------------------------------------------------------------------------------------------


def read_devices(path: Path) -> tuple[list[Device], Network]:
    """Read the devices and the network of a file, TOML or JSON.

    TOML has a table ``[[device]]`` for each device, and JSON a list of objects, or an object with ``device``. A device
    has

    - ``name``;
    - ``doctor``, what ``pocketzo doctor --json`` printed there: its path beside this file, or the object itself;
    - or, and then instead of what the doctor said, ``memory`` (bytes, or a size such as "1.5G") and ``speed``
      (multiply-adds a second).

    A table ``[network]`` may have ``bandwidth`` (bytes a second) and ``latency`` (seconds).

    Raises
    ------
    DataError
        It cannot be read, or something is missing or wrong; names it.
    """
    try:
        text = path.read_text("utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    given = values if isinstance(values, list) else values.get("device") if isinstance(values, dict) else None
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise DataError(
            f"{path}: expected at least one device: a table [[device]] in TOML, or a list of objects in JSON"
        )
    devices = [_device(path, number, one) for number, one in enumerate(given)]
    names = [device.name for device in devices]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: expected a name of its own for each device, got {', '.join(names)}")
    network = values.get("network", {}) if isinstance(values, dict) else {}
    try:
        found = Network(**network)
        check_number("bandwidth", found.bandwidth, positive=True)
        check_number("latency", found.latency)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: network: expected bandwidth and latency, got {network!r}: {error}") from None
    return devices, found


def _device(path: Path, number: int, values: Mapping[str, Any]) -> Device:
    name = values.get("name")
    if type(name) is not str or not name:
        raise DataError(f"{path}: device {number + 1}: expected a name, got {name!r}")
    where = f"{path}: device {name!r}"
    if unknown := sorted(values.keys() - {"name", "doctor", "memory", "speed"}):
        raise DataError(f"{where}: {unknown[0]!r} is not one of name, doctor, memory and speed")
    doctor = values.get("doctor", {})
    if isinstance(doctor, str):
        try:
            doctor = json.loads((path.parent / doctor).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: {path.parent / doctor}: cannot be read: {error}") from None
    try:
        memory = values["memory"] if "memory" in values else doctor["memory"]["available"]
        speed = values["speed"] if "speed" in values else doctor["products"]["multiply_adds_per_second"]
        noise = min(doctor["speed"]["gaussian"].values()) * 1e-9 if "speed" in doctor else 0.0
    except (KeyError, TypeError, AttributeError, ValueError):
        raise DataError(
            f"{where}: expected memory and speed, or doctor with what 'pocketzo doctor --json' of this version printed"
        ) from None
    if isinstance(memory, str):
        with contextlib.suppress(ValueError):  # named below
            memory = parse_size(memory)
    for key, value in (("memory", memory), ("speed", speed)):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise DataError(
                f"{where}: {key} is {value!r}, expected a positive number"
                + (' or a size such as "1.5G"' if key == "memory" else " of multiply-adds a second")
            )
    return Device(name, int(memory), float(speed), noise)
