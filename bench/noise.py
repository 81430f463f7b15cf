"""Noise passes over weights larger than the caches: PocketZO against numpy, MKL and torch, and memory bandwidth.

    python bench/noise.py [--mib 1024] [--rounds 5] [--threads 1 2] [--json FILE]

`w += s z` draws z and adds it; the step pass adds two z. With low rank, w is a matrix, and z the product of two factors
of rank 2, as the method lozo has it. The bound is an in-place scale, `w *= s`, which reads,
multiplies and writes each element once: the fastest of several implementations, for each number of threads. All are
measured in turn for several rounds, and their medians are compared.

numpy, mkl_random and MKL itself (vsRngGaussian and cblas_saxpy by ctypes) run in their fastest form: blocks that stay
in the cache, one generator per thread. torch runs as MeZO's code calls it: all of z by one torch.normal, then the sum.
The scalar set is bound by computation, not by memory; it works on a sixteenth of the array.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
from machine import Run, peer, spread
from numpy.typing import NDArray
from tables import noise_table

import pocketzo as pz
from pocketzo import _core

Weights = NDArray[np.float32]

BLOCK = 1 << 16  # elements, 256 KiB: z stays in the second-level cache
SCALE = 1e-3
COLUMNS = 2048  # of the matrix that low-rank directions move
RANK = 2  # the default of lozo
REST = 0.3  # seconds between libraries: OpenMP threads spin for 0.2 s after their work
SLOW = 2  # rounds of entries at least ten times slower than the bound


@dataclass
class Entry:
    """One row of the table, for one number of threads."""

    system: str
    work: str
    threads: int
    run: Callable[[], object]
    elements: int
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        began = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - began)


def in_threads(work: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function that runs each in a thread of its own."""
    if len(work) == 1:
        return work[0]
    pool = ThreadPoolExecutor(len(work))
    return lambda: [future.result() for future in [pool.submit(each) for each in work]]


def parts(w: Weights, threads: int) -> list[Weights]:
    return np.split(w, threads)


def ours(w: Weights, threads: int) -> list[Entry]:
    entries = []
    # A term with decay alone is w = fma(-decay, w, w): the bound, by the loop and the threads of the noise passes.
    segments = _core.Segments([(w, 2)])
    decay = np.zeros(1, _core.TERM)
    decay["decay"] = 1e-4

    def entry(isa: str, work: str, run: Callable[[], object]) -> None:
        def with_settings() -> None:
            pz.kernels.set_threads(threads)
            pz.kernels.use(isa)
            run()

        entries.append(Entry(f"pocketzo, {isa}", work, threads, with_settings, w.size))

    whole = w
    for isa in pz.kernels.available():
        w = whole[: whole.size // 16] if isa == "scalar" else whole
        for distribution in ("gaussian", "rademacher"):
            known: dict[str, Any] = {"seed": 1, "tensor": 2, "draw": 3, "scale": SCALE, "distribution": distribution}
            entry(isa, f"add {distribution}", partial(pz.kernels.perturb, w, **known))
            entry(isa, f"step {distribution}", partial(pz.kernels.step, w, **known, next_draw=4, next_scale=-SCALE))
        matrix = _core.Segments([(w.reshape(-1, COLUMNS), 2)])
        terms = np.zeros(2, _core.TERM)
        terms["seed"], terms["draw"], terms["count"], terms["rank"] = 1, (3, 4), 1, RANK
        terms["scale"][:, 0] = SCALE, -SCALE
        entry(isa, "add low rank", partial(matrix.apply, terms[:1]))
        entry(isa, "step low rank", partial(matrix.apply, terms))
        if isa != "scalar":
            entry(isa, "scale", partial(segments.apply, decay))
    return entries


def by_numpy(w: Weights, threads: int) -> list[Entry]:
    def scale(part: Weights) -> None:
        for at in range(0, part.size, BLOCK):
            block = part[at : at + BLOCK]
            np.multiply(block, np.float32(0.9999), out=block)

    def add(part: Weights, bits: type[np.random.BitGenerator]) -> None:
        generator = np.random.Generator(bits(3))
        z = np.empty(BLOCK, np.float32)
        for at in range(0, part.size, BLOCK):
            generator.standard_normal(BLOCK, np.float32, z)
            np.multiply(z, np.float32(SCALE), out=z)
            part[at : at + BLOCK] += z

    def entry(system: str, work: str, each: Callable[[Weights], object]) -> Entry:
        run = in_threads([partial(each, part) for part in parts(w, threads)])
        return Entry(system, work, threads, run, w.size)

    return [
        entry("numpy", "scale", scale),
        *(
            entry(f"numpy, {bits.__name__}", "add gaussian", partial(add, bits=bits))
            for bits in (np.random.SFC64, np.random.Philox)
        ),
    ]


def by_mkl_random(w: Weights, threads: int) -> list[Entry]:
    mkl_random = peer("mkl_random")
    if mkl_random is None:
        return []

    def add(part: Weights) -> None:
        generator = mkl_random.MKLRandomState(3, brng="PHILOX4X32X10")
        for at in range(0, part.size, BLOCK):
            z = generator.standard_normal(BLOCK, method="BoxMuller2")  # float64, its only type
            np.multiply(z, SCALE, out=z)
            part[at : at + BLOCK] += z

    run = in_threads([partial(add, part) for part in parts(w, threads)])
    return [Entry("mkl_random, Philox, float64", "add gaussian", threads, run, w.size)]


def by_mkl(w: Weights, threads: int) -> list[Entry]:
    try:
        libraries = sorted(str(path.locate()) for path in files("mkl") or [] if path.name.startswith("libmkl_rt.so"))
    except PackageNotFoundError:
        libraries = []
    if not libraries:
        print("skipped: MKL's libmkl_rt is not installed (pip install --group bench)", file=sys.stderr, flush=True)
        return []
    mkl = ctypes.CDLL(libraries[-1])
    mkl.MKL_Set_Threading_Layer(1)  # sequential: this script makes the threads
    philox, box_muller_2 = 16 << 20, 1
    mkl.cblas_saxpy.argtypes = [
        ctypes.c_int,
        ctypes.c_float,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    mkl.vsRngGaussian.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_float, ctypes.c_float,
    ]  # fmt: skip

    def add(part: Weights) -> None:
        z = np.empty(BLOCK, np.float32)
        stream = ctypes.c_void_p()
        assert mkl.vslNewStream(ctypes.byref(stream), philox, 3) == 0
        for at in range(0, part.size, BLOCK):
            assert mkl.vsRngGaussian(box_muller_2, stream, BLOCK, z.ctypes.data, 0.0, 1.0) == 0
            mkl.cblas_saxpy(BLOCK, SCALE, z.ctypes.data, 1, part.ctypes.data + 4 * at, 1)
        mkl.vslDeleteStream(ctypes.byref(stream))

    run = in_threads([partial(add, part) for part in parts(w, threads)])
    return [Entry("MKL, Philox, float32", "add gaussian", threads, run, w.size)]


def by_torch(w: Weights, threads: int) -> list[Entry]:
    torch = peer("torch")
    if torch is None:
        return []
    weights = torch.from_numpy(w)

    def scale() -> None:
        torch.set_num_threads(threads)
        weights.mul_(0.9999)

    def add() -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        z = torch.normal(mean=0, std=1, size=weights.size(), dtype=weights.dtype)
        weights.add_(z, alpha=SCALE)

    return [Entry("torch", work, threads, run, w.size) for work, run in (("scale", scale), ("add gaussian", add))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()

    run = Run()
    memory = mmap.mmap(-1, arguments.mib << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # page-aligned, as weights
    memory.madvise(mmap.MADV_HUGEPAGE)
    w = np.frombuffer(memory, np.float32)
    w[:] = 0.02
    entries = [
        entry
        for threads in arguments.threads
        for make in (ours, by_numpy, by_mkl_random, by_mkl, by_torch)
        for entry in make(w, threads)
    ]
    for number in range(arguments.rounds + 1):
        quickest = {
            threads: min((min(e.seconds) for e in entries if e.threads == threads and e.seconds), default=float("inf"))
            for threads in arguments.threads
        }
        for before, entry in zip([None, *entries], entries, strict=False):
            if before is None or before.system != entry.system:
                time.sleep(REST)
            slow = entry.seconds and min(entry.seconds) > 10 * quickest[entry.threads]
            if not slow or number < SLOW:
                entry.measure()
            if number == 1 and not slow:
                del entry.seconds[0]  # the first round warms up
    rows: list[dict[str, Any]] = [
        {
            "system": entry.system,
            "work": entry.work,
            "threads": entry.threads,
            "elements": entry.elements,
            **spread(entry.seconds),
        }
        for entry in entries
    ]
    print("\n".join(noise_table(run.finish({"rows": rows}, arguments.json))))


if __name__ == "__main__":
    main()
