"""The memory of the machine and of this process, and a limit on the latter.

Memory is resident memory: the weights, the buffers of a forward pass, Python and its libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pocketzo.errors import Error

_STATM = "/proc/self/statm"
_INTERVAL = 0.002  # seconds between two readings, which take some 10 us each


def system_memory() -> tuple[int | None, int | None]:
    """Return the machine's total and available memory in bytes; None where the system does not report it."""
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
    """Return the current and the peak memory of this process in bytes; None where the system does not report it."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        # Not ru_maxrss: it survives exec, so that it may be the peak of the program that started this one.
        return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            import resource
        except ImportError:  # no such module on Windows
            return None, None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return None, peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Reset the peak of :func:`process_memory` to the current memory, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def trim_heap() -> None:
    """Give freed memory of the C library's heap back to the system, where glibc keeps it.

    Tokenising leaves 40 MB for a vocabulary of 49,152 words, and loading a session 15 MB.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Return the current memory of this process in bytes. It takes microseconds.

    Raises
    ------
    Error
        The system does not report it.
    """
    with _statm() as file:
        return _resident(file)


@contextmanager
def _statm() -> Iterator[int]:
    try:
        file = os.open(_STATM, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(error) from None
    try:
        yield file
    finally:
        os.close(file)


def _resident(file: int) -> int:
    try:
        return int(os.pread(file, 128, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, IndexError, OSError, ValueError) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> Error:
    reason = f"{_STATM}: {getattr(error, 'strerror', None) or error}"
    return Error(f"the memory limit cannot be enforced: the memory in use cannot be read ({reason})")


@contextmanager
def watch(most: int, stop: Callable[[], None]) -> Iterator[list[int]]:
    """Call ``stop`` as soon as more than ``most`` bytes of this process are resident, from another thread.

    Yields
    ------
    list of int
        Empty, or the reading that exceeded ``most``.
    """
    readings: list[int] = []
    done = threading.Event()

    def poll() -> None:
        while True:
            now = _resident(file)
            if now > most:
                readings.append(now)
                stop()
            if readings or done.wait(_INTERVAL):
                return

    with _statm() as file:  # kept open: opening it could fail later, when file descriptors have run out
        thread = threading.Thread(target=poll, name="memory", daemon=True)
        thread.start()
        try:
            yield readings
        finally:
            done.set()
            thread.join()


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 1.5G, 800 MB (of 10^6 bytes) or 1400MiB (of 2^20).

    Raises
    ------
    ValueError
        It is no such size, or less than a byte.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?|\.\d+) *([MG])(i?)B?", text.strip(), re.IGNORECASE)
    power = 2 if match and match[2] in "mM" else 3
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size such as 1.5G, 800M or 1400MiB")
    return size


def megabytes(count: int) -> str:
    """Format a number of bytes in MB, of 10^6 bytes."""
    return f"{count / 1e6:,.0f} MB"
