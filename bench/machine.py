"""What every figure is shown with: the machine, the versions, the command."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


def machine() -> dict[str, Any]:
    """Describe where this runs."""
    import pocketzo as pz  # not above: step.py's peers must not carry it in their memory

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = {"python": platform.python_version()}
    for package in ("pocketzo", "numpy", "onnxruntime", "torch", "mkl_random", "mkl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isa": pz.kernels.isa(),
        "system": platform.platform(),
        "date": datetime.now(UTC).date().isoformat(),
        "busy": busy(),
        "versions": versions,
        "command": " ".join(["python", Path(sys.argv[0]).as_posix().removeprefix(f"{Path.cwd()}/"), *sys.argv[1:]]),
    }


def busy() -> float:
    """Share of the processors' time that others use while this process sleeps for a second."""

    def times() -> tuple[int, int]:
        user, nice, system, idle, waiting, *others = map(int, stat.read_text().split("\n")[0].split()[1:])
        return user + nice + system + sum(others[:3]), idle + waiting

    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    before = times()
    time.sleep(1)
    used, unused = (now - then for now, then in zip(times(), before, strict=True))
    return used / max(1, used + unused)


class Run:
    """Describes the machine as it is before a measurement, and writes the results with it at the end."""

    def __init__(self) -> None:
        self.machine = machine()
        if self.machine["busy"] > 0.05:
            share = f"{self.machine['busy']:.0%} of its processors' time"
            print(f"the machine has other work ({share}): figures are not to be trusted", file=sys.stderr, flush=True)
        self.began = time.perf_counter()

    def finish(self, results: Any, path: Path | None) -> dict[str, Any]:
        """Return results with the machine; write them as JSON, if a path is given."""
        seconds = time.perf_counter() - self.began
        report: dict[str, Any] = rounded({"machine": {**self.machine, "seconds": seconds}, "results": results})
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
        return report


def write(path: Path | None, results: Any) -> None:
    """Write results with the machine as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Keep five digits of every float, so that the files stay small and their differences readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of repeated measurements."""
    low, median, high = np.quantile(np.asarray(seconds), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high, "repeats": len(seconds)}


def peer(name: str) -> Any:
    """Import what this is compared with, or say that it is skipped and return None.

    Peers are imported by name: what is not installed must be an error neither here nor for the type checker.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"skipped: {name} is not installed (pip install --group bench)", file=sys.stderr, flush=True)
        return None


def status() -> dict[str, int]:
    """Bytes of memory that /proc/self/status reports for this process: VmHWM (peak), VmRSS and what it consists of."""
    result = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"):
            result[name] = int(value.split()[0]) * 1024
    return result


def peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    return status()["VmHWM"]
