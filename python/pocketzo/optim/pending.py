"""Deferred passes over the weights, and protection of a pass against Ctrl-C."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not in typeshed
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from pocketzo.optim.program import Part


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C: an exception between two passes over the weights would leave them half shifted."""
    # The functions of signal search enumerations for what these return: 12 us a step.
    elsewhere = threading.current_thread() is not threading.main_thread()  # only the main thread gets signals
    if elsewhere or _signal.getsignal(signal.SIGINT) is None:  # a handler not set from Python cannot be restored
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = _signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        _signal.signal(signal.SIGINT, before)
    if callable(before):
        for number, frame in held:
            before(number, frame)
    elif held and before == signal.SIG_DFL:
        signal.raise_signal(signal.SIGINT)


def flush(parts: Sequence[Part], lock: threading.RLock) -> None:
    """Apply the pending terms of some parts."""
    if any(part.pending for part in parts):
        with uninterrupted(), lock:
            for part in parts:
                part.apply()
