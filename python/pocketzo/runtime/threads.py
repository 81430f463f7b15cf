"""How many threads a session takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.liveness import read_as_noise
from pocketzo.runtime.model import Batch, Model
from pocketzo.runtime.session import create_session, optimization_level, ort_values
from pocketzo.runtime.weights import Weights


def time_forwards(bundle: Bundle, batch: Batch, counts: Iterable[int], max_memory: int | None) -> dict[int, float]:
    """Return the least time of a few forward passes with each number of threads.

    A session has its threads for life, so each number takes one of its own. They are unpacked and share the weights,
    and so are quick to make; one comes when the one before it has gone, with its activations. Packed, the second thread
    was worth as much: 1.75 times the speed (BERT-base's shape, 1 x 16 and 8 x 64 tokens; bench/session.py).
    """
    weights = Weights(bundle)
    read_as_noise(weights, bundle)
    values = ort_values(weights)
    outputs = [bundle.loss] if bundle.loss is not None and "labels" in batch else None
    seconds = {}
    for threads in counts:
        session = create_session(bundle.model_path, values, threads, prepacked=False, level=optimization_level(bundle))
        model = Model(bundle, weights, session, threads, values, not_prepacked_because="for timing")
        model.max_memory = max_memory
        times: list[float] = []
        while len(times) < 5 and sum(times) < 1:
            started = time.perf_counter()
            model.run(batch, outputs)
            times.append(time.perf_counter() - started)
        seconds[threads] = round(min(times), 6)
        del model, session
    return seconds


def quickest(seconds: Mapping[int, float]) -> int:
    """Return the number of threads with the least time, or a smaller one that is as good: it keeps the phone cooler."""
    return min(threads for threads, took in seconds.items() if took <= 1.05 * min(seconds.values()))
