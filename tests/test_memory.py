"""The limit on memory, and what loading takes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, save

import pocketzo as pz
from pocketzo.machine import cores, memory
from pocketzo.machine.memory import process_memory, reset_peak, resident_memory, trim_heap, watch
from pocketzo.optim import momentum
from pocketzo.runtime import loader
from pocketzo.runtime.model import SMALL

WIDTH, LAYERS = 16, 12
MB = 10**6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that keeps the outputs of all its layers to the end of a pass: 64 bytes x 12 a token."""
    folder = tmp_path_factory.mktemp("memory")
    nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["h0"])]
    nodes += [helper.make_node("Neg", [f"h{i}"], [f"h{i + 1}"]) for i in range(LAYERS)]
    nodes += [
        helper.make_node("Sum", [f"h{i}" for i in range(LAYERS + 1)], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["loss"], keepdims=0),
    ]
    table = np.random.default_rng(1).standard_normal((50, WIDTH)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(table, "embedding")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "deep.onnx")
    pz.prepare(folder / "deep.onnx", folder / "bundle")
    return folder / "bundle"


def tokens(examples: int) -> dict[str, NDArray[np.int64]]:
    return {"input_ids": np.arange(examples * 250).reshape(examples, 250) % 50}


LARGE = 1000  # examples: 16 MB a layer


def limited(bundle: Path) -> pz.Model:
    """Load with a limit that leaves room for a few layers of the large batch."""
    limit = resident_memory() + 2 * 16 * MB + (16 << 20) + 50 * MB
    return pz.load(bundle, threads=1, prepack=False, max_memory=limit)


def test_momentum_that_does_not_fit_is_refused_with_figures(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pz.load(bundle, threads=1, prepack=False)
    model.max_memory = resident_memory() + 64 * MB
    pz.Momentum(model, lr=0.1)
    monkeypatch.setattr(momentum, "resident_memory", lambda: model.max_memory - 3000)
    with pytest.raises(pz.MemoryLimitError, match=r"momentum takes 0 MB for 800 trained parameters, .* the limit is"):
        pz.Momentum(model, lr=0.1)  # of 3,200 bytes
    model.max_memory = None
    monkeypatch.setattr(momentum, "system_memory", lambda: (10**9, 3000))
    with pytest.raises(pz.MemoryLimitError, match=r"and this machine has 0 MB left\. Train fewer weights"):
        pz.Momentum(model, lr=0.1)


def test_readings_agree() -> None:
    resident, peak = process_memory()
    assert resident is not None
    assert peak is not None
    assert abs(resident_memory() - resident) < 20 * MB


def test_freed_memory_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, count = 64_000, 1000
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    last = libc.malloc(size)  # what is freed before it stays in the heap
    for block in blocks:
        libc.free(block)
    before = resident_memory()
    trim_heap()
    freed = before - resident_memory()
    libc.free(last)
    assert freed > 0.5 * size * count or not hasattr(libc, "malloc_trim")


def test_a_watch_calls_once_when_the_limit_is_exceeded() -> None:
    calls: list[int] = []
    with watch(resident_memory() + 500 * MB, lambda: calls.append(1)) as readings:
        np.ones(10 * MB)
    assert calls == readings == []
    most = resident_memory() + 50 * MB
    with watch(most, lambda: calls.append(1)) as readings:
        ballast: list[np.ndarray[Any, Any]] = []
        while not calls and len(ballast) < 10:  # more than one where the system has taken back other pages meanwhile
            ballast.append(np.ones(20 * MB))  # 160 MB
            time.sleep(0.2)
    assert calls == [1]
    assert most < readings[0] <= resident_memory() + sum(array.nbytes for array in ballast)


def test_a_forward_pass_is_stopped_before_the_limit(bundle: Path) -> None:
    model = limited(bundle)
    assert model.max_memory is not None
    expected = model.loss(tokens(2))
    reset_peak()
    with pytest.raises(pz.MemoryLimitError, match=r"1000 x 250 tokens was stopped: .* Take a smaller batch"):
        model.loss(tokens(LARGE))
    peak = process_memory()[1]
    assert peak is not None
    assert peak < model.max_memory
    assert model.loss(tokens(2)) == expected
    limit = model.max_memory
    del model
    pz.load(bundle, threads=1, prepack=False).loss(tokens(LARGE))
    peak = process_memory()[1]
    assert peak is not None
    assert peak > limit  # without the limit it would have been exceeded


@pytest.mark.parametrize("prepack", [True, False])
def test_there_is_never_a_second_copy_of_the_weights(tmp_path: Path, prepack: bool) -> None:
    count, width = 24, 1024  # 4.2 MB a matrix, and onnxruntime packs one after the other
    nodes, weights, at = [], [], "x"
    for i in range(count):
        out = "loss" if i == count - 1 else f"y{i}"
        nodes += [helper.make_node("MatMul", [at, f"w{i}"], [f"p{i}"]), helper.make_node("Tanh", [f"p{i}"], [out])]
        weights.append(numpy_helper.from_array(np.full((width, width), i, np.float32), f"w{i}"))
        at = out
    nodes[-1] = helper.make_node("ReduceMean", [f"p{count - 1}"], ["loss"], keepdims=0)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])
    graph = helper.make_graph(
        nodes, "wide", [x], [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])], weights
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "wide.onnx")
    pz.prepare(tmp_path / "wide.onnx", tmp_path / "bundle")
    script = (
        "import sys, pocketzo as pz\n"
        "from pocketzo.machine.memory import process_memory\n"
        "from pocketzo.runtime.layout import detect_layout\n"
        "detect_layout()\n"
        "before = process_memory()[1]\n"
        f"model = pz.load(sys.argv[1], threads=1, prepack={prepack}, verify='fast')\n"
        "print(process_memory()[1] - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "bundle"], check=True, capture_output=True, text=True
    )
    size = count * 4 * width**2
    assert 0.98 * size < int(done.stdout) < 1.7 * size


def test_loading_is_refused_with_figures(bundle: Path) -> None:
    with pytest.raises(pz.MemoryLimitError, match=r"loading takes [\d,]+ MB .* and the limit is 1 MB"):
        pz.load(bundle, max_memory=MB)


def test_forwards_are_timed_within_the_limit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "thread_counts", lambda: [1, 2])
    limit = resident_memory() + 2 * 16 * MB + (16 << 20) + 50 * MB
    with pytest.raises(pz.MemoryLimitError, match=r"1000 x 250 tokens was stopped"):
        pz.load(bundle, batch=tokens(LARGE), prepack=False, max_memory=limit)


def test_where_the_limit_is_too_small_to_prepack_the_plain_layout_is_used(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "resident_memory", lambda: 0)
    size = (tiny_bundle / "weights.safetensors").stat().st_size
    limit = size + size // 16 + SMALL  # enough to load, but not to hold a matrix three times while it is packed
    with pytest.warns(UserWarning, match=r"weights are not prepacked, which is slower: .*loading takes"):
        model = pz.load(tiny_bundle, threads=1, max_memory=limit)
    assert (model.prepacked, model.max_memory) == (False, limit)
    with pytest.raises(pz.MemoryLimitError, match="loading takes"):
        pz.load(tiny_bundle, threads=1, max_memory=limit - 1)
    assert pz.load(tiny_bundle, threads=1, max_memory=10**9).prepacked


def test_where_the_system_reports_no_memory_a_limit_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_STATM", tmp_path / "statm")
    with pytest.raises(pz.Error, match=r"the memory limit cannot be enforced: .*statm"):
        pz.load(bundle, prepack=False, max_memory=10**12)
    (tmp_path / "statm").write_text("")
    with pytest.raises(pz.Error, match=r"the memory limit cannot be enforced: .*statm"):
        pz.load(bundle, prepack=False, max_memory=10**12)
    pz.load(bundle, prepack=False)


def test_a_run_that_cannot_be_watched_is_refused(bundle: Path) -> None:
    model = pz.load(bundle, threads=1, prepack=False, max_memory=10**12)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    files: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 200), before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                files.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(pz.Error, match=r"the memory limit cannot be enforced: .*Too many open files"):
            model.loss(tokens(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for file in files:
            os.close(file)
    assert np.isfinite(model.loss(tokens(2)))


class Growing:
    """Two examples a step, and the large batch at step 3."""

    fingerprint = "growing"

    def __len__(self) -> int:
        return 100

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Any]:
        return tokens(LARGE if 6 in indices else 2)


def test_the_step_is_undone_and_the_run_goes_on_where_it_stopped(bundle: Path, tmp_path: Path) -> None:
    def trainer(model: pz.Model, run: str) -> pz.Trainer:
        return pz.Trainer(model, pz.FZOO(model, lr=1e-3), Growing(), run=tmp_path / run, steps=60, batch_size=2)

    whole = pz.load(bundle, threads=1, prepack=False)
    trainer(whole, "whole").fit()
    expected = whole.weights.sha256()
    del whole
    model = limited(bundle)
    stopped = trainer(model, "run")
    with pytest.raises(pz.MemoryLimitError):
        stopped.fit()
    run = pz.Run(tmp_path / "run")
    assert 0 < run.steps < 60
    at = {int(step) for step in range(60) if 6 in stopped._order(step)}
    assert run.steps == min(at)
    replayed = pz.load(bundle, threads=1, prepack=False)
    run.replay_onto(replayed)
    for name in model.weights:
        np.testing.assert_allclose(model.weights[name], replayed.weights[name], rtol=0, atol=1e-6)
    resumed = pz.Trainer.resume(tmp_path / "run", Growing())
    resumed.fit()
    assert resumed.model.weights.sha256() == expected


def language_model(folder: Path, words: int) -> pz.Bundle:
    """Prepare a decoder whose output projection is its widest matrix."""
    rng = np.random.default_rng(2)
    shapes = {"embedding": (words, 8), "head": (8, words)}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
        ],
        "lm",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", words])],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), name) for name, s in shapes.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    return pz.prepare(folder / "m.onnx", folder / "base", task="causal-lm")


def row_of_tokens(length: int, positions: int) -> dict[str, NDArray[np.int64]]:
    at = np.arange(positions)
    return {"input_ids": np.arange(length)[None], "positions": at, "targets": at}


@pytest.mark.parametrize("prepack", [True, False])
def test_a_loss_takes_no_more_memory_than_its_logits(tmp_path: Path, prepack: bool) -> None:
    words, count = 60_000, 200
    model = pz.load(language_model(tmp_path, words), prepack=prepack)
    model.run(row_of_tokens(2, 2))
    reset_peak()
    before = resident_memory()
    model.run(row_of_tokens(count, count))
    peak = process_memory()[1]
    assert peak is not None
    logits = 4 * words * count // (2 if prepack else 1)  # in two slices of 24 MB
    assert 0.9 * logits < peak - before < 1.3 * logits


@pytest.mark.parametrize(("prepack", "more"), [(True, 337), (False, 657)])  # in two slices, or not
def test_a_limit_counts_the_logits_of_positions_only(tmp_path: Path, prepack: bool, more: int) -> None:
    words, count = 20_000, 4000
    bundle = language_model(tmp_path, words)
    model = pz.load(bundle, threads=1, prepack=prepack, max_memory=resident_memory() + 100 * MB)
    assert np.isfinite(model.loss(row_of_tokens(count, 10)))  # 320 MB, if all tokens had logits
    with pytest.raises(pz.MemoryLimitError, match=rf"1 x 4000 tokens was stopped: .* may take {more} MB more"):
        model.loss(row_of_tokens(count, count))
