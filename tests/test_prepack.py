"""Models whose weights are prepacked and live, and the plain layout where that is not possible."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import pocketzo as pz
from pocketzo import _core
from pocketzo.errors import NotPrepackableError
from pocketzo.formats.safetensors import file_sha256
from pocketzo.runtime import layout, prepack
from pocketzo.runtime.image import Image
from pocketzo.runtime.matrices import find_matrices
from pocketzo.runtime.outputs import ROUNDINGS, close

MODELS = Path(__file__).parent / "models"

# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bert-old", "gpt2-old", "mlm-new", "opt-old"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pz.Bundle:
    """An encoder with classes, two decoders and a masked model; but for the first, with a tied output projection."""
    return pz.prepare(MODELS / f"{request.param}.onnx", tmp_path_factory.mktemp(request.param) / "bundle")


def batch_of(bundle: pz.Bundle) -> dict[str, NDArray[Any]]:
    """Two texts of eight tokens, of two kinds in those positions where the fixtures have no more."""
    ids = np.arange(16).reshape(2, 8)
    kinds = {"input_ids": ids, "token_type_ids": ids % 2}
    return {
        value.name: kinds.get(value.name, np.ones((2, 8), value.dtype))
        for value in bundle.inputs
        if value.name != "labels"
    }


def trained(bundle: pz.Bundle, out: Path, *, threads: int = 1, **settings: Any) -> bytes:
    """Load, take steps whose losses are given, so that roundings of the forward do not matter, and save."""
    model = pz.load(bundle, threads=threads, **settings)
    losses = itertools.cycle([0.5, 0.3, 0.9, 0.1, 0.2])
    for optimizer in (
        pz.MeZO(model, lr=1e-3, weight_decay=0.1, seed=4),
        pz.FZOO(model, lr=1e-3, seed=5),
        pz.Momentum(model, lr=1e-3, weight_decay=0.1, queries=2, seed=6),
    ):
        for _ in range(4):
            optimizer.step(lambda _: next(losses))
    model.save(out)
    assert model.weights.sha256() == file_sha256(out / "weights.safetensors")
    return (out / "weights.safetensors").read_bytes()


def test_training_gives_the_same_weights_prepacked_and_plain(bundle: pz.Bundle, tmp_path: Path) -> None:
    images = {
        trained(bundle, tmp_path / f"{prepack}{threads}", prepack=prepack, threads=threads)
        for prepack in (True, False)
        for threads in (1, 2)
    }
    assert len(images) == 1
    assert images != {bundle.weights_path.read_bytes()}


def test_prepacked_and_plain_compute_the_same(bundle: pz.Bundle) -> None:
    models = [pz.load(bundle, threads=1, prepack=prepack) for prepack in (True, False)]
    assert [model.prepacked for model in models] == [True, False]
    batch = batch_of(bundle)
    for move in range(2):
        a, b = (model.run(batch) for model in models)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)
        for model in models:  # the second round is on weights that were moved in place
            pz.MeZO(model, lr=1e-2, eps=1e-2, seed=move).step(lambda _: 1.0)


def test_every_prepacked_weight_is_live_wherever_it_is_read(bundle: pz.Bundle) -> None:
    model = pz.load(bundle, threads=1, prepack=True)
    batch = batch_of(bundle)
    assert model.weights.locations
    rng = np.random.default_rng(0)
    for name in model.weights:
        for memory, _, _ in model.weights.segments(name):  # two for a tied weight: each one has to show
            before, kept = model.run(batch)["logits"], memory.copy()
            memory += rng.standard_normal(memory.shape, np.float32)
            after = model.run(batch)["logits"]
            if "key.bias" not in name and "k_proj.bias" not in name:  # the softmax takes these out again
                assert not np.array_equal(before, after), name
            memory[...] = kept
            np.testing.assert_array_equal(before, model.run(batch)["logits"])


def test_a_tied_weight_has_two_locations_and_one_value(tmp_path: Path) -> None:
    bundle = pz.prepare(MODELS / "gpt2-old.onnx", tmp_path / "bundle")
    model = pz.load(bundle, threads=1, prepack=True)
    (tied,) = [name for name in model.weights if len(model.weights.segments(name)) == 2]
    losses = iter([1.0, 2.0] * 3)
    optimizer = pz.MeZO(model, lr=1e-2, seed=1)
    for _ in range(3):
        optimizer.step(lambda _: next(losses))
    value = model.weights[tied]  # the plain location
    location = model.weights.locations[tied]
    out = np.empty_like(value)
    location.packing.unpack(location.memory, out, 0)
    assert out.tobytes() == value.tobytes()
    assert not np.array_equal(out, pz.load(bundle, prepack=False).weights[tied])


def test_a_journal_of_prepacked_training_replays(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = pz.load_dataset(tiny_data, pz.Bundle.read(tiny_bundle))
    model = pz.load(tiny_bundle, threads=1, prepack=True)
    pz.Trainer(model, pz.MeZO(model, lr=1e-2), data, steps=20, run=tmp_path / "run", snapshot_every=8).fit()
    pz.Run(tmp_path / "run").replay(tmp_path / "out")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == b"".join(model.weights._bytes())
    for choice in (True, False):
        other = pz.load(tiny_bundle, threads=1, prepack=choice)
        with nullcontext() if choice else pytest.warns(UserWarning, match="are not prepacked .*unlike its journal"):
            resumed = pz.Trainer.resume(tmp_path / "run", data, model=other)
        assert resumed.model.weights.sha256() == model.weights.sha256()
        assert resumed._writer is not None
        resumed._writer.close()


def test_written_and_read_weights(tiny_bundle: Path) -> None:
    model = pz.load(tiny_bundle, threads=1, prepack=True)
    stored = model.weights["dense.weight"]
    with pytest.raises(ValueError, match="read-only"):
        stored += 1
    model.weights["dense.weight"] = stored + 1
    np.testing.assert_array_equal(model.weights["dense.weight"], stored + 1)
    with pytest.raises(ValueError, match=r"dense.weight has shape \[\d+, \d+\], got \[3, 5\]"):
        model.weights["dense.weight"] = np.zeros((3, 5), np.float32)
    with pytest.raises(KeyError):
        model.weights["nothing"] = 0
    model.weights.read()
    np.testing.assert_array_equal(model.weights["dense.weight"], stored)


# ---- where it is not possible ----------------------------------------------------------------------------------------


def refuse() -> layout.Layout:
    raise NotPrepackableError("this runtime is unknown")


def other_packing(self: layout.Layout, rows: int, columns: int, *, transposed: bool) -> _core.Packing:
    stride = -(-columns // 16) * 16 + 16
    return _core.Packing(rows=rows, columns=columns, stride=stride, depth=64, transposed=transposed)


@pytest.mark.parametrize(
    ("target", "substitute", "reason"),
    [
        ("prepack.detect_layout", refuse, "this runtime is unknown"),
        ("prepack.onnx_messages", refuse, "this runtime is unknown"),
        ("prepack.file_mappings", lambda path: {}, "did not map the prepacked weight"),
        # not the bytes that onnxruntime packs: it says so, or silently uses its own, which the check finds
        (
            "layout.Layout.packing",
            other_packing,
            "refuses prepacked weights|the outputs differ|the session does not see",
        ),
    ],
)
def test_where_prepacking_fails_the_plain_layout_is_used(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str, substitute: Callable[..., Any], reason: str
) -> None:
    layout.detect_layout()  # cached for the process, so that it does not see the substitute
    monkeypatch.setattr(f"pocketzo.runtime.{target}", substitute)
    with pytest.warns(UserWarning, match=f"weights are not prepacked, which is slower: .*({reason})") as warned:
        model = pz.load(tiny_bundle, threads=1)
    assert warned[0].filename == __file__  # of the caller, not of the package
    assert not model.prepacked
    assert model.not_prepacked_because is not None
    expected = pz.load(tiny_bundle, threads=1, prepack=False)
    batch = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 1]])}
    np.testing.assert_array_equal(model.run(batch)["logits"], expected.run(batch)["logits"])
    with pytest.raises(pz.Error, match=f"the weights cannot be prepacked: .*({reason})"):
        pz.load(tiny_bundle, threads=1, prepack=True)


@pytest.mark.parametrize("known", [True, False])
def test_without_temporary_files_the_plain_layout_is_used(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: bool
) -> None:
    layout.detect_layout()
    if not known:
        monkeypatch.setattr(prepack, "detect_layout", layout.detect_layout.__wrapped__)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="no temporary file can be made"):
        assert not pz.load(tiny_bundle, threads=1).prepacked


def test_a_full_file_system_is_a_reason_not_to_prepack(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In one in memory, reading a hole for which there is no page left would kill the process (SIGBUS).
    layout.detect_layout()
    full = SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.warns(UserWarning, match=r"has 4,096 bytes free, and [\d,]+ may be needed; set TMPDIR"):
        assert not pz.load(tiny_bundle, threads=1).prepacked


def test_without_memory_for_a_prepacked_model_the_plain_layout_is_used(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("pocketzo.runtime.loader.open_session", refuse)
    with pytest.warns(UserWarning, match="weights are not prepacked, which is slower: MemoryError"):
        assert not pz.load(tiny_bundle, threads=1).prepacked


def test_a_temporary_folder_may_have_any_name(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = tmp_path / "a  b\nc\\012 (deleted) é"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    assert pz.load(tiny_bundle, threads=1, prepack=True).prepacked


def test_outputs_are_close() -> None:
    expected = np.array([1.0, -np.inf, np.nan, 2.0])
    assert close(expected + 1e-4, expected, ROUNDINGS)
    for got in ([1.0, 5.0, np.nan, 2.0], [1.1, -np.inf, np.nan, 2.0], [1.0, -np.inf, 0.0, 2.0], [1.0, -np.inf]):
        assert not close(np.array(got), expected, ROUNDINGS)


def test_weights_outlive_their_model(tiny_bundle: Path) -> None:
    # The memory belongs to a mapping of the session's, which must stay as long as anything refers to it.
    model = pz.load(tiny_bundle, threads=1, prepack=True)
    weights, expected = model.weights, model.weights.sha256()
    memory = weights.segments("dense.weight")[0][0]
    del model
    gc.collect()
    assert weights.sha256() == expected
    del weights
    gc.collect()
    memory += 1


def weight(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32), name)


def prepared(path: Path, nodes: list[onnx.NodeProto], weights: list[TensorProto]) -> pz.Bundle:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        weights,
    )
    path.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path / "m.onnx")
    return pz.prepare(path / "m.onnx", path / "bundle")


def test_a_weight_of_two_products_is_not_prepacked(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["logits"]),
    ]
    bundle = prepared(tmp_path / "m", nodes, [weight("w", 4, 4)])
    with pytest.warns(UserWarning, match="w is a factor of 2 products"):
        assert not pz.load(bundle, threads=1).prepacked


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda graph: graph.input.add(name="dense.weight"), "dense.weight is an input of the graph"),
        (lambda graph: graph.node[0].attribute.add(name="body").g.node.add(), r"has control flow \(\w+\)"),
    ],
    ids=["input", "control flow"],
)
def test_graphs_that_are_not_prepacked(tiny_bundle: Path, change: Callable[[Any], object], reason: str) -> None:
    plan = prepack.plan_prepacking(pz.Bundle.read(tiny_bundle))
    assert {matrix.name for matrix in plan.matrices} == {"dense.weight", "classifier.weight"}
    change(plan.model.graph)
    with pytest.raises(NotPrepackableError, match=reason):
        find_matrices(plan.bundle, plan.model.graph, plan.layout)


def test_a_graph_without_products_is_not_prepacked(tmp_path: Path) -> None:
    bundle = prepared(tmp_path / "m", [helper.make_node("Mul", ["x", "w"], ["logits"])], [weight("w", 1, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is slower for it
        model = pz.load(bundle, threads=1)
    assert model.not_prepacked_because == "the graph multiplies by no weight"


def test_prepack_must_be_a_choice(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="prepack must be True, False or 'auto', got 'yes'"):
        pz.load(tiny_bundle, prepack="yes")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for is no reason to warn
        model = pz.load(tiny_bundle, prepack=False)
    assert (model.prepacked, model.not_prepacked_because) == (False, "as asked for")


# ---- shapes where equal matrices, many small ones and padding meet ---------------------------------------------------


def test_many_small_matrices_are_kept_apart(tmp_path: Path) -> None:
    # The runtime shares prepacked bytes that are equal, and 40 small matrices are the same holes but for their marks.
    count = 40
    nodes, values, at = [], [], "x"
    for i in range(count):
        out = "logits" if i == count - 1 else f"y{i}"
        nodes += [helper.make_node("MatMul", [at, f"w{i}"], [f"p{i}"]), helper.make_node("Tanh", [f"p{i}"], [out])]
        values.append(numpy_helper.from_array(np.eye(4, dtype=np.float32) * (i + 1), f"w{i}"))
        at = out
    bundle = prepared(tmp_path / "m", nodes, values)
    model = pz.load(bundle, threads=1, prepack=True, verify="full")
    assert len(model.weights.locations) == count


@pytest.mark.parametrize("sizes", [(4, 600, 50, 4), (4, 1030, 1, 4), (4, 33, 515, 4), (4, 2048, 640, 4)])
def test_odd_shapes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    nodes, at = [], "x"
    for i in range(len(sizes) - 1):
        out = "logits" if i == len(sizes) - 2 else f"y{i}"
        nodes += [helper.make_node("MatMul", [at, f"w{i}"], [f"p{i}"]), helper.make_node("Tanh", [f"p{i}"], [out])]
        at = out
    weights = [weight(f"w{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
    bundle = prepared(tmp_path / "m", nodes, weights)
    assert trained(bundle, tmp_path / "a", prepack=True) == trained(bundle, tmp_path / "b", prepack=False)


def test_the_graph_is_read_once_and_left_as_it_is(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, reads, read_bytes = pz.Bundle.read(tiny_bundle), [], Path.read_bytes

    def counted(path: Path) -> bytes:
        if path == bundle.model_path:
            reads.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    assert pz.load(bundle, threads=1, prepack=True).prepacked
    assert len(reads) == 1
    plan = prepack.plan_prepacking(bundle)
    before = plan.model.SerializeToString()
    image = Image.allocate(bundle, without=plan.only_prepacked)
    session, locations, _ = prepack.open_session(plan, image.values, 1)
    assert set(locations) == plan.only_prepacked == {"dense.weight", "classifier.weight"}
    assert all(not location.memory.any() for location in locations.values())
    assert plan.model.SerializeToString() == before
    del session


def test_nothing_is_left_behind(tiny_bundle: Path, tmp_path: Path) -> None:
    script = "import sys, pocketzo as pz; print(len(pz.load(sys.argv[1], prepack=True).weights.locations))"
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_bundle],
        env={**os.environ, "TMPDIR": os.fspath(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2"]
    assert not list(tmp_path.glob("*pocketzo*"))
