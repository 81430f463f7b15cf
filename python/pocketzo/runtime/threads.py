"""The number of threads of a session."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from pocketzo.formats.bundle import Bundle
from pocketzo.machine.memory import trim_heap
from pocketzo.runtime.frozen import open_over_base, trained_weights
from pocketzo.runtime.model import Batch, Model
from pocketzo.runtime.noise import read_as_noise
from pocketzo.runtime.session import open_plain


def time_forwards(bundle: Bundle, batch: Batch, counts: Iterable[int], max_memory: int | None) -> dict[int, float]:
    """Time a few forward passes with each number of threads.

    A session has its threads for life, so each number takes a session of its own. These share the weights and, except
    over a frozen base, are plain, and so are quick to make; each comes when the one before it has gone, with its
    activations. With prepacked weights the second thread was worth as much: 1.75 times the speed (BERT-base's shape,
    1 x 16 and 8 x 64 tokens; bench/session.py).

    Returns
    -------
    dict of int to float
        By number of threads, the least seconds of a pass.
    """
    weights = trained_weights(bundle)
    read_as_noise(weights, bundle)
    open_session = open_plain if weights.image.is_whole else open_over_base
    outputs = [bundle.loss] if bundle.loss is not None and "labels" in batch else None
    seconds = {}
    for threads in counts:
        model = Model(
            bundle,
            weights,
            open_session(bundle, weights.image.values, threads),
            threads=threads,
            max_memory=max_memory,
            forward_seconds={},
            not_prepacked_because="for timing",
        )
        times: list[float] = []
        while len(times) < 5 and sum(times) < 1:
            started = time.perf_counter()
            model.run(batch, outputs)
            times.append(time.perf_counter() - started)
        seconds[threads] = round(min(times), 6)
        del model
        trim_heap()  # or what a session had prepacked of a frozen base stays beside that of the next
    return seconds


def quickest(seconds: Mapping[int, float]) -> int:
    """Return the number of threads with the least time, or a smaller one within 5 %, which keeps the phone cooler."""
    return min(threads for threads, took in seconds.items() if took <= 1.05 * min(seconds.values()))
