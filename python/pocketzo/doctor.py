"""``pocketzo doctor``: instruction sets and their self-test, cores, memory, versions."""

from __future__ import annotations

import os
import platform
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo import kernels
from pocketzo._core import __version__, has_fp16_arithmetic
from pocketzo.errors import NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.machine import cores
from pocketzo.machine.memory import system_memory
from pocketzo.packages import EXTRAS, broken, version
from pocketzo.runtime.frozen import frozen_base
from pocketzo.runtime.layout import detect_layout, product_model
from pocketzo.runtime.prepack import plan_prepacking

__all__ = ["examine", "prepacking", "products", "self_test", "speed"]

_SEED, _TENSOR, _DRAW = 20250101, 0x5EED, 41
_NEAR: Final[dict[str, Any]] = {"seed": _SEED, "tensor": _TENSOR, "draw": _DRAW}
_FAR: Final[dict[str, Any]] = {"seed": 0x0123456789ABCDEF, "tensor": 0xDEADBEEF, "draw": 1 << 32}
_COUNT = 1 << 16

# CRC-32 of 65,536 little-endian numbers. The first four are the first CRCs of the lines normal_crc and rademacher_crc
# in tests/vectors/answers.txt. The others apply two directions, with weight decay between them, to the first stream;
# the last one does so in fp16. All come from tests/vectors/reference.py, which implements cpp/SPEC.md in numpy, and
# tests/test_cli.py recomputes them.
ANSWERS: Final = {
    "normal": 0x33DBAC66,
    "normal, far": 0xAC30A971,
    "rademacher": 0x256D82B1,
    "rademacher, far": 0x26670CE0,
    "step, normal": 0xB56D5BA6,
    "step, rademacher": 0x14D593A5,
    "step, fp16": 0x1CBDA6FE,
}


def self_test() -> dict[str, list[str]]:
    """Compare every available instruction set with the known answers.

    Returns
    -------
    dict of str to list of str
        By instruction set, the names in :data:`ANSWERS` of the tests that failed.
    """
    before = kernels.isa()
    try:
        return {name: _failed(name) for name in kernels.available()}
    finally:
        kernels.use(before)


def _failed(isa: str) -> list[str]:
    kernels.use(isa)

    def stepped(distribution: kernels.Distribution, dtype: str = "float32") -> NDArray[Any]:
        w = kernels.noise(_COUNT, **_NEAR).astype(dtype)
        kernels.step(
            w,
            seed=_SEED,
            tensor=_TENSOR,
            draw=42,
            scale=1e-3,
            decay=1e-2,
            next_draw=43,
            next_scale=-2e-3,
            distribution=distribution,
        )
        return w

    streams: dict[str, Callable[[], NDArray[Any]]] = {
        "normal": lambda: kernels.noise(_COUNT, **_NEAR),
        "normal, far": lambda: kernels.noise(_COUNT, **_FAR, offset=17179344875),
        "rademacher": lambda: kernels.noise(_COUNT, **_NEAR, distribution="rademacher"),
        "rademacher, far": lambda: kernels.noise(_COUNT, **_FAR, offset=549755682795, distribution="rademacher"),
        "step, normal": lambda: stepped("gaussian"),
        "step, rademacher": lambda: stepped("rademacher"),
        "step, fp16": lambda: stepped("gaussian", "float16"),
    }
    return [name for name, stream in streams.items() if _crc(stream()) != ANSWERS[name]]


def _crc(array: NDArray[Any]) -> int:
    return zlib.crc32(array.astype(array.dtype.newbyteorder("<")).data)


def speed(count: int = 1 << 22, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Time the perturbation of ``count`` weights, in nanoseconds per weight; the best of ``repeats``.

    Returns
    -------
    dict of str to dict of str to float
        By distribution, then by number of threads: ``"1 thread"`` and, if there are more, ``"N threads"``.
    """
    w = np.zeros(count, np.float32)
    threads = kernels.threads()
    result: dict[str, dict[str, float]] = {"gaussian": {}, "rademacher": {}}
    distributions: tuple[kernels.Distribution, ...] = ("gaussian", "rademacher")
    try:
        for number in sorted({1, threads}):
            kernels.set_threads(number)
            for distribution in distributions:
                times = []
                for draw in range(repeats):
                    started = time.perf_counter()
                    kernels.perturb(w, seed=0, tensor=0, draw=draw, scale=1e-3, distribution=distribution)
                    times.append(time.perf_counter() - started)
                name = f"{number} thread" + ("s" if number > 1 else "")
                result[distribution][name] = round(min(times) / count * 1e9, 3)
    finally:
        kernels.set_threads(threads)
    return result


def products(rows: int = 128, size: int = 1024, repeats: int = 5) -> dict[str, float] | None:
    """Time onnxruntime's product of [rows, size] and [size, size] in float32 on the fast cores; the best of some runs.

    Returns
    -------
    dict of str to float or None
        ``threads``, and ``multiply_adds_per_second``; None without the package protobuf.
    """
    threads = cores.fast()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    weight = np.ones((size, size), np.float32)
    try:
        model = product_model("MatMul", weight, transposed=False).SerializeToString()
    except NotPrepackableError:
        return None
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = {"x": np.ones((rows, size), np.float32)}
    times = []
    for _ in range(repeats + 1):  # the first run allocates
        started = time.perf_counter()
        session.run(None, x)
        times.append(time.perf_counter() - started)
    return {"threads": threads, "multiply_adds_per_second": round(rows * size * size / min(times))}


def examine() -> dict[str, Any]:
    """Collect everything that ``pocketzo doctor`` prints; this takes a few seconds.

    Returns
    -------
    dict
        Values for JSON, which ``pocketzo plan`` takes for a device. ``ok`` is whether the self-test passed and every
        package that is installed can be imported; ``broken`` has the reason for each that cannot. Sizes are in bytes;
        ``speed`` is in nanoseconds per weight.
    """
    failed, reasons = self_test(), broken()
    total, available = system_memory()
    return {
        "ok": not any(failed.values()) and not reasons,
        "pocketzo": __version__,
        "spec": kernels.SPEC_VERSION,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "onnxruntime": version("onnxruntime"),
        "extras": {extra: {name: version(name) for name in names} for extra, names in EXTRAS.items()},
        "broken": reasons,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "android": hasattr(sys, "getandroidapilevel"),
        "termux": "com.termux" in os.environ.get("PREFIX", ""),
        "prepacking": prepacking(),
        "fp16": has_fp16_arithmetic(),
        "isa": kernels.isa(),
        "available": kernels.available(),
        "cores": {
            "present": os.cpu_count(),
            "usable": len(cores.usable()),
            "fast": cores.fast(),
            "speeds": cores.speeds(),
        },
        "threads": kernels.threads(),
        "memory": {"total": total, "available": available},
        "self_test": {name: {"ok": not names, "failed": names} for name, names in failed.items()},
        "speed": speed(),
        "products": products(),
    }


def prepacking(bundle: Bundle | None = None) -> str:
    """Describe whether weights can be prepacked on this system, and if not, why; of a bundle if one is given.

    :func:`pocketzo.load` also checks that they are live in the session.
    """
    try:
        if bundle is None:
            layout = detect_layout()
            return f"can be prepacked, in blocks of {layout.depth} rows and panels of 16 columns"
        if frozen := frozen_base(bundle):
            return f"the frozen base of {len(frozen)} tensors is, when it is loaded"
        matrices = plan_prepacking(bundle).matrices
    except NotPrepackableError as error:
        return f"not prepacked: {error}"
    size = sum(matrix.nbytes for matrix in matrices)
    return f"can be prepacked: {len(matrices)} matri{'x' if len(matrices) == 1 else 'ces'}, {size / 1e6:.1f} MB"
