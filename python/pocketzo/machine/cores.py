"""The cores that this process may use, how fast they are as far as the system tells, and numbers of threads for them.

Phones mix fast and slow cores. Nothing here binds a thread to a core: a phone may refuse that, and moves processes
between its cores as it likes.
"""

from __future__ import annotations

import os
from pathlib import Path

from pocketzo._core import threads as kernel_threads

_CPUS = Path("/sys/devices/system/cpu")  # each core's folder may be readable where the list of them is not
_SPEEDS = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")  # the first one counts what a core does in a cycle, too


def usable() -> list[int]:
    """Return the numbers of the cores that this process may run on now."""
    try:
        return sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system, and a phone may refuse it
        return list(range(os.cpu_count() or 1))


def speeds() -> list[int] | None:
    """Return the speed of each usable core, to be compared with each other only; None where the system is silent."""
    for name in _SPEEDS:
        try:
            found = [int((_CPUS / f"cpu{core}" / name).read_text()) for core in usable()]
        except (OSError, ValueError):
            continue
        if min(found) > 0:
            return found
    return None


def fast() -> int:
    """Return how many of the usable cores are fast: all, or those that are faster than the slowest kind.

    A tenth is no difference: cores of one kind differ by that much on some machines.
    """
    found = speeds() or [1] * len(usable())
    return sum(speed > 1.1 * min(found) for speed in found) or len(found)


def thread_counts() -> list[int]:
    """Return the numbers of threads that are worth a try: 1, 2, the fast cores, all; no more than the kernels have."""
    most = min(len(usable()), kernel_threads())
    return sorted({min(count, most) for count in (1, 2, fast(), most)})
