"""The cores that this process may use, their speeds where the system reports them, and numbers of threads to try.

Phones mix fast and slow cores. No thread is bound to a core: a phone may refuse that, and it moves processes between
its cores at any time.
"""

from __future__ import annotations

import os
from pathlib import Path

from pocketzo._core import threads as kernel_threads

_CPUS = Path("/sys/devices/system/cpu")  # each core's folder may be readable where the list of them is not
_SPEEDS = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")  # the first one also reflects the work of a core in a cycle


def usable() -> list[int]:
    """Return the numbers of the cores that this process may run on now."""
    try:
        return sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system, and a phone may refuse it
        return list(range(os.cpu_count() or 1))


def speeds() -> list[int] | None:
    """Return the speeds of the usable cores in one arbitrary unit, or None where the system does not report them."""
    for name in _SPEEDS:
        try:
            found = [int((_CPUS / f"cpu{core}" / name).read_text()) for core in usable()]
        except (OSError, ValueError):
            continue
        if min(found) > 0:
            return found
    return None


def fast() -> int:
    """Return the number of fast cores: those that are faster than the slowest kind, or all if there is one kind.

    Speeds within 10 % count as equal: cores of one kind differ by that much on some machines.
    """
    found = speeds() or [1] * len(usable())
    return sum(speed > 1.1 * min(found) for speed in found) or len(found)


def thread_counts() -> list[int]:
    """Return the numbers of threads to try: 1, 2, the fast cores, all; none is more than the kernels have."""
    most = min(len(usable()), kernel_threads())
    return sorted({min(count, most) for count in (1, 2, fast(), most)})
