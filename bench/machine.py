"""Common to the scripts: the machine, versions and command of a measurement, spreads, and memory readings."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


def machine() -> dict[str, Any]:
    """Describe the machine, the versions and the command."""
    import pocketzo as pz  # not above: it would count in the memory of step.py's peers

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = {"python": platform.python_version()}
    for package in ("pocketzo", "numpy", "onnxruntime", "torch", "mkl_random", "mkl", "onnxruntime-genai"):
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
        "command": command(["python", *sys.argv]),
    }


def command(words: Sequence[str]) -> str:
    """Join a command line, without folders of this machine: where models are kept changes no figure."""
    line = re.sub(r" --(models|json|plot|work) \S+", "", " ".join(words))
    return line.replace(f"{Path.cwd()}/", "")


def busy() -> float:
    """Return the share of CPU time that other processes use while this one sleeps for a second."""

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
    """Describes the machine before a measurement, and adds that description to the results."""

    def __init__(self) -> None:
        self.machine = machine()
        if self.machine["busy"] > 0.05:
            share = f"other processes use {self.machine['busy']:.0%} of its CPU time"
            print(f"the machine is busy ({share}): do not rely on these figures", file=sys.stderr, flush=True)
        self.began = time.perf_counter()

    def finish(self, results: Any, path: Path | None) -> dict[str, Any]:
        """Return the results with the machine; if a path is given, write them there as JSON."""
        seconds = time.perf_counter() - self.began
        report: dict[str, Any] = rounded({"machine": {**self.machine, "seconds": seconds}, "results": results})
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
        return report


class Rows:
    """Rows of figures that are written to a file as they come: a long run can be stopped, and the same command goes on.

    Parameters
    ----------
    run : Run
    path : Path or None
        Its rows are not measured again. None keeps them in memory only.
    settings : mapping
        What all rows of a file have in common; other settings are refused.
    """

    def __init__(self, run: Run, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._run, self._path = run, path
        self._settings = json.loads(json.dumps(rounded(dict(settings)), default=str))
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            found = json.loads(path.read_text())["results"]
            if not isinstance(found, dict) or found.get("settings") != self._settings:
                sys.exit(f"{path}: holds figures of other settings than {self._settings}; name another file")
            self.rows = found["rows"]

    def has(self, **named: Any) -> bool:
        """Return whether there is a row with these values."""
        return any(all(row.get(key) == value for key, value in named.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write all."""
        self.rows.append(rounded(row))
        if self._path is not None:
            beside = self._path.with_name(f"{self._path.name}.new")
            self._run.finish({"settings": self._settings, "rows": self.rows}, beside)
            beside.replace(self._path)


def write(path: Path | None, results: Any) -> None:
    """If a path is given, write the results with the machine there as JSON."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Round every float to five significant digits, which keeps the files small and their diffs readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, quartiles and mean of repeated measurements, and their number."""
    low, median, high = np.quantile(np.asarray(seconds), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high, "mean": float(np.mean(seconds)), "repeats": len(seconds)}


def peer(name: str) -> Any:
    """Import a module to compare with; if it is not installed, report that it is skipped and return None.

    Imports by name, so that neither Python nor the type checker fails where a peer is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"skipped: {name} is not installed (pip install --group bench)", file=sys.stderr, flush=True)
        return None


def status() -> dict[str, int]:
    """Return the memory of this process by /proc/self/status, in bytes: VmHWM (the peak), VmRSS and its three parts."""
    result = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"):
            result[name] = int(value.split()[0]) * 1024
    return result


def peak_rss() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return status()["VmHWM"]
