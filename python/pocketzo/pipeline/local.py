"""The stages of a pipeline as threads of this process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from pocketzo.pipeline.stage import Stage


class Threads:
    """Stages in this process, a thread for each. It holds all weights: for tests, and to compare with.

    Parameters
    ----------
    stages : sequence of Stage
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self._threads = [ThreadPoolExecutor(1) for _ in self.stages]

    @property
    def count(self) -> int:
        """How many stages."""
        return len(self.stages)

    def call(self, stage: int, method: str, *arguments: Any) -> Future[Any]:
        """See :meth:`Workers.call`."""

        def called() -> Any:
            given = [one.result() if isinstance(one, Future) else one for one in arguments]
            return getattr(self.stages[stage], method)(*given)

        return self._threads[stage].submit(called)

    def result(self, promise: Future[Any]) -> Any:
        """See :meth:`Workers.result`."""
        return promise.result()

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
