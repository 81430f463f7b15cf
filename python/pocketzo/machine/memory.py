"""How much memory the machine has and this process takes, and a limit on the latter.

What is meant is resident memory: the weights, what a forward pass computes with, Python and its libraries.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pocketzo.errors import Error

_STATM = "/proc/self/statm"
_INTERVAL = 0.002  # seconds between two readings, which take some 10 us each


def system_memory() -> tuple[int | None, int | None]:
    """Return the machine's memory and what of it is available, in bytes; None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
        except (AttributeError, OSError, ValueError):
            return None, None
    return total, available


def process_memory() -> tuple[int | None, int | None]:
    """Return the memory of this process in bytes, resident now and at its peak; None where the system is silent."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        # Not ru_maxrss: it outlives exec, and so may be that of the program that started this one.
        return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            import resource
        except ImportError:  # no such module on Windows
            return None, None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return None, peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Let the peak of :func:`process_memory` begin anew from what is resident now, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_memory() -> int:
    """Return the memory of this process that is resident now, in bytes, which takes microseconds.

    Raises
    ------
    Error
        The system does not tell.
    """
    with _statm() as file:
        return _resident(file)


@contextmanager
def _statm() -> Iterator[int]:
    try:
        file = os.open(_STATM, os.O_RDONLY)
    except OSError as error:
        raise _silent(error) from None
    try:
        yield file
    finally:
        os.close(file)


def _resident(file: int) -> int:
    try:
        return int(os.pread(file, 128, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, IndexError, OSError, ValueError) as error:
        raise _silent(error) from None


def _silent(error: Exception) -> Error:
    reason = f"{_STATM}: {getattr(error, 'strerror', None) or error}"
    return Error(f"a limit on memory cannot be kept: the system does not tell how much is used ({reason})")


@contextmanager
def watch(most: int, stop: Callable[[], None]) -> Iterator[list[int]]:
    """Call ``stop`` as soon as more than ``most`` bytes of this process are resident, from another thread.

    Yields
    ------
    list of int
        Gets the reading that was too much, if there is one.
    """
    readings: list[int] = []
    done = threading.Event()

    def look() -> None:
        while True:
            now = _resident(file)
            if now > most:
                readings.append(now)
                stop()
            if readings or done.wait(_INTERVAL):
                return

    with _statm() as file:  # kept open, as this could fail later for want of file descriptors
        thread = threading.Thread(target=look, name="memory", daemon=True)
        thread.start()
        try:
            yield readings
        finally:
            done.set()
            thread.join()
