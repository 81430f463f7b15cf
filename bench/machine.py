"""What every figure is shown with: the machine, the versions, the command."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pocketzo as pz


def machine() -> dict[str, Any]:
    """Describe where this runs."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = {"python": platform.python_version()}
    for package in ("pocketzo", "numpy", "onnxruntime", "torch", "mkl_random"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": pz.kernels.isa(),
        "system": platform.platform(),
        "versions": versions,
        "command": " ".join(["python", *sys.argv]),
    }


def write(path: Path | None, results: Any) -> None:
    """Write results with the machine as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
