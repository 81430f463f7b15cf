"""Ray carries the stages of a pipeline: each is an actor, in a process on the device that has its files.

Ray sends what one actor returns to the next one directly, and runs the calls of an actor in the order in which they
were made. Two calls that follow each other took 2 ms. A SuperNode of Flower asks for work every 3 s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from pocketzo.errors import Error, joined_lines
from pocketzo.pipeline.split import stage_path
from pocketzo.pipeline.stage import Stage

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
if "ray" not in sys.modules:  # it reads this when it is imported, and its processes when they start: both have to agree
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray

_STORE: Final = 256 << 20  # bytes for activations that are under way, on a device that begins a cluster of its own
_SILENT: Final = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}


def resource(number: int) -> str:
    """Return the name of Ray's resource that says which device has a stage's files."""
    return f"stage-{number}"


class Device:
    """An actor. It loads a stage by a call, whose errors reach the caller; those of a constructor do not."""

    def load(self, path: Path, **settings: Any) -> None:
        """Load a stage; see :class:`Stage`."""
        self._stage = Stage(path, **settings)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the stage."""
        return getattr(self._stage, method)(*arguments)


class Actors:
    """The stages of a pipeline as actors of a Ray cluster.

    Parameters
    ----------
    folder : path
        Where the stages are, on each device that has one of them.
    count : int
        How many stages.
    address : str, optional
        Of the cluster, whose nodes were started with the resources of :func:`resource`. By default all stages are
        processes on this device.
    threads : sequence of int or None, optional
        Of each stage; see :func:`pocketzo.load`.
    max_memory : int, optional
        Of each stage; see :func:`pocketzo.load`.

    Raises
    ------
    Error
        The cluster has no device for a stage, or its process has ended.
    BundleError, MemoryLimitError
        A stage cannot be loaded; says why.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        count: int,
        *,
        address: str | None = None,
        threads: Sequence[int | None] | None = None,
        max_memory: int | None = None,
    ) -> None:
        names = [resource(number) for number in range(count)]
        if address is None:
            own = dict.fromkeys(names, 1.0)
            ray.init("local", num_cpus=count, resources=own, object_store_memory=_STORE, **_SILENT)
        else:
            ray.init(address=address, **_SILENT)
        try:
            if missing := sorted(set(names) - ray.cluster_resources().keys()):
                raise Error(
                    f"the Ray cluster at {address} has no device for {', '.join(missing)}: start one there with "
                    f"ray start --address={address} --resources='{{\"{missing[0]}\": 1}}'"
                )
            actor = ray.remote(Device)
            self._actors = [actor.options(resources={name: 1}, num_cpus=0, max_restarts=0).remote() for name in names]
            path = Path(folder).resolve()
            loads = [
                one.load.remote(stage_path(path, number), threads=threads and threads[number], max_memory=max_memory)
                for number, one in enumerate(self._actors)
            ]
            for load in loads:
                self.result(load)
        except BaseException:
            ray.shutdown()
            raise

    @property
    def count(self) -> int:
        """How many stages."""
        return len(self._actors)

    def call(self, stage: int, method: str, *arguments: Any) -> Any:
        """See :meth:`Workers.call`."""
        return self._actors[stage].call.remote(method, *arguments)

    def result(self, promise: Any) -> Any:
        """See :meth:`Workers.result`."""
        try:
            return ray.get(promise)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.RayActorError):
                raise self._lost(error.cause) from error
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            raise self._lost(error) from error

    def _lost(self, error: ray.exceptions.RayActorError) -> Error:
        ids = [actor._actor_id.hex() for actor in self._actors]
        which = f"stage {ids.index(error.actor_id)}" if getattr(error, "actor_id", None) in ids else "a stage"
        return Error(
            f"{which} of the pipeline has ended: {joined_lines(error)[:300]}; the journal has all steps before this "
            "one: start Ray on that device again, and then the same command"
        )

    def close(self) -> None:
        """End the stages' processes, and a cluster that was begun here."""
        ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
