"""Weights that are packed and live: the kernels on the packed layout, and models that are loaded so."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import pocketzo as pz
from pocketzo import _core, packed

MODELS = Path(__file__).parent / "models"

F32 = NDArray[np.float32]


# ---- the kernels -----------------------------------------------------------------------------------------------------


def places(rows: int, columns: int, stride: int, depth: int) -> NDArray[np.int64]:
    """Where element (k, n) lies, as kernels.h says it."""
    k, n = np.mgrid[0:rows, 0:columns]
    top = k // depth * depth
    height = np.minimum(depth, rows - top)
    result: NDArray[np.int64] = top * stride + n // 16 * 16 * height + (k - top) * 16 + n % 16
    return result


def packed_by_hand(tensor: F32, transposed: bool, stride: int, depth: int) -> F32:
    factor = tensor.T if transposed else tensor
    memory = np.full(factor.shape[0] * stride, 7, np.float32)  # 7 is the padding, which has to stay
    rows, columns = factor.shape
    memory[places(rows, columns, stride, depth)] = factor
    return memory


@st.composite
def packings(draw: st.DrawFn) -> tuple[int, int, int, int, bool]:
    size = st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 256, 257, 320, 512, 576]))
    rows, columns = draw(size), draw(size)
    stride = -(-columns // 16) * 16 + 16 * draw(st.integers(0, 2))
    return rows, columns, stride, draw(st.sampled_from([64, 128, 256])), draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(
    packing=packings(),
    direction=st.integers(0, 1),
    terms=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3), st.sampled_from([0.0, 0.01])), max_size=10),
    isa=st.sampled_from(pz.kernels.available()),
    threads=st.integers(1, 3),
)
def test_packed_memory_gets_the_bits_of_contiguous_memory(
    packing: tuple[int, int, int, int, bool],
    direction: int,
    terms: list[tuple[int, int, float]],
    isa: str,
    threads: int,
) -> None:
    rows, columns, stride, depth, transposed = packing
    shape = (columns, rows) if transposed else (rows, columns)
    tensor = np.random.default_rng(0).standard_normal(shape, np.float32)
    layout = _core.Packing(rows=rows, columns=columns, stride=stride, depth=depth, transposed=transposed)
    memory = packed_by_hand(tensor, transposed, stride, depth)
    program = np.zeros(len(terms), _core.TERM)
    for i, (draw, count, decay) in enumerate(terms):
        program[i] = (3, draw, (0.5, -1.0, 0.25), decay, count, direction, (0,) * 6)
    before = pz.kernels.isa(), pz.kernels.threads()
    try:
        pz.kernels.use(isa)
        pz.kernels.set_threads(threads)
        _core.Segments([(tensor, 9)]).apply(program)
        _core.Segments([(memory, 9, layout)]).apply(program)
    finally:
        pz.kernels.use(before[0])
        pz.kernels.set_threads(before[1])
    assert memory.tobytes() == packed_by_hand(tensor, transposed, stride, depth).tobytes()


@settings(deadline=None, max_examples=60)
@given(packing=packings(), cut=st.floats(0, 1), size=st.floats(0, 1))
def test_packing_copies_any_part_and_nothing_else(
    packing: tuple[int, int, int, int, bool], cut: float, size: float
) -> None:
    rows, columns, stride, depth, transposed = packing
    shape = (columns, rows) if transposed else (rows, columns)
    tensor = np.arange(rows * columns, dtype=np.float32).reshape(shape)
    layout = _core.Packing(rows=rows, columns=columns, stride=stride, depth=depth, transposed=transposed)
    start = int(cut * tensor.size)
    stop = start + int(size * (tensor.size - start))
    memory = packed_by_hand(np.full_like(tensor, -1), transposed, stride, depth)
    layout.pack(memory, tensor.ravel()[start:stop].copy(), start)
    expected = np.full(tensor.size, -1, np.float32)
    expected[start:stop] = np.arange(start, stop)
    assert memory.tobytes() == packed_by_hand(expected.reshape(shape), transposed, stride, depth).tobytes()
    out = np.empty(stop - start, np.float32)
    layout.unpack(memory, out, start)
    np.testing.assert_array_equal(out, np.arange(start, stop))


def test_large_copies_are_cut_among_threads() -> None:
    rows, columns = 600, 1500
    layout = _core.Packing(rows=rows, columns=columns, stride=1504, depth=256, transposed=False)
    tensor = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    memory = np.full(layout.size, 7, np.float32)
    layout.pack(memory, tensor, 0)
    assert memory.tobytes() == packed_by_hand(tensor, False, 1504, 256).tobytes()
    out = np.empty_like(tensor)
    layout.unpack(memory, out, 0)
    np.testing.assert_array_equal(out, tensor)


def test_the_name_of_a_packed_buffer() -> None:
    # mmh3 5.2 (PyPI): mmh3.hash_bytes(np.arange(64, dtype="<f4").tobytes(), 0, x64arch=False).hex()
    full = bytes.fromhex("1e2609a1e44551fd92a6983c895d80b5")
    first, second = np.frombuffer(full[:8], "<u4").tolist()
    assert _core.packed_hash(np.arange(64, dtype=np.float32)) == second << 32 | first & ~7


def test_a_packing_refuses_what_it_cannot_be() -> None:
    good: dict[str, Any] = {"rows": 4, "columns": 4, "stride": 16, "depth": 64, "transposed": False}
    layout = _core.Packing(**good)
    for change, message in (
        ({"rows": 0}, r"rows \* columns must be in 1 \.\. 2\*\*34, got 0 \* 4"),
        ({"rows": 2**33}, r"rows \* columns must be in"),
        ({"columns": -1}, r"columns must be in 0 \.\."),
        ({"columns": 17}, "stride must be a multiple of 16 and at least the columns, got 16"),
        ({"stride": 24}, "stride must be a multiple of 16"),
        ({"depth": 32}, "depth must be a multiple of 64, got 32"),
        ({"depth": 0}, "depth must be a multiple of 64, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.Packing(**{**good, **change})
    memory, values = np.zeros(64, np.float32), np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="packed must have 64 elements, got 63"):
        layout.pack(memory[:63].copy(), values, 0)
    with pytest.raises(ValueError, match="offset \\+ size must not exceed rows \\* columns, got offset 1"):
        layout.pack(memory, values, 1)
    with pytest.raises(ValueError, match="packed must have 64 elements, got 16"):
        _core.Segments([(values, 1, layout)])
    with pytest.raises(ValueError, match="address must be that of a page"):
        _core.remap(1, 1, None)


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
    for optimizer in (pz.MeZO(model, lr=1e-3, weight_decay=0.1, seed=4), pz.FZOO(model, lr=1e-3, seed=5)):
        for _ in range(4):
            optimizer.step(lambda _: next(losses))
    model.save(out)
    assert model.weights.sha256() == pz.safetensors.file_sha256(out / "weights.safetensors")
    return (out / "weights.safetensors").read_bytes()


def test_training_gives_the_same_weights_packed_and_unpacked(bundle: pz.Bundle, tmp_path: Path) -> None:
    images = {
        trained(bundle, tmp_path / f"{packed}{threads}", packed=packed, threads=threads)
        for packed in (True, False)
        for threads in (1, 2)
    }
    assert len(images) == 1
    assert images != {bundle.weights_path.read_bytes()}


def test_packed_and_unpacked_agree_on_what_they_compute(bundle: pz.Bundle) -> None:
    models = [pz.load(bundle, threads=1, packed=packed) for packed in (True, False)]
    assert [model.packed for model in models] == [True, False]
    batch = batch_of(bundle)
    for move in range(2):
        a, b = (model.run(batch) for model in models)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)
        for model in models:  # the second round is on weights that were moved where they lie
            pz.MeZO(model, lr=1e-2, eps=1e-2, seed=move).step(lambda _: 1.0)


def test_every_packed_weight_is_live_wherever_it_is_read(bundle: pz.Bundle) -> None:
    model = pz.load(bundle, threads=1, packed=True)
    batch = batch_of(bundle)
    assert model.weights._places
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


def test_a_tied_weight_has_two_places_and_one_value(tmp_path: Path) -> None:
    bundle = pz.prepare(MODELS / "gpt2-old.onnx", tmp_path / "bundle")
    model = pz.load(bundle, threads=1, packed=True)
    (tied,) = [name for name in model.weights if len(model.weights.segments(name)) == 2]
    losses = iter([1.0, 2.0] * 3)
    optimizer = pz.MeZO(model, lr=1e-2, seed=1)
    for _ in range(3):
        optimizer.step(lambda _: next(losses))
    value = model.weights[tied]  # the plain place
    place = model.weights._places[tied]
    out = np.empty_like(value)
    place.packing.unpack(place.memory, out, 0)
    assert out.tobytes() == value.tobytes()
    assert not np.array_equal(out, pz.load(bundle, packed=False).weights[tied])


def test_a_record_of_packed_training_replays(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = pz.load_dataset(tiny_data, pz.Bundle.read(tiny_bundle))
    model = pz.load(tiny_bundle, threads=1, packed=True)
    pz.Trainer(model, pz.MeZO(model, lr=1e-2), data, steps=20, run=tmp_path / "run", snapshot_every=8).fit()
    pz.Run(tmp_path / "run").replay(tmp_path / "out")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == b"".join(model.weights._bytes())
    for choice in (True, False):
        resumed = pz.Trainer.resume(tmp_path / "run", data, model=pz.load(tiny_bundle, threads=1, packed=choice))
        assert resumed.model.weights.sha256() == model.weights.sha256()
        resumed._journal.close()  # type: ignore[union-attr]


def test_written_and_read_weights(tiny_bundle: Path) -> None:
    model = pz.load(tiny_bundle, threads=1, packed=True)
    stored = model.weights["dense.weight"]
    with pytest.raises(ValueError, match="read-only"):
        stored += 1
    model.weights["dense.weight"] = stored + 1
    np.testing.assert_array_equal(model.weights["dense.weight"], stored + 1)
    with pytest.raises(ValueError, match="could not broadcast"):
        model.weights["dense.weight"] = np.zeros((3, 5), np.float32)
    with pytest.raises(KeyError):
        model.weights["nothing"] = 0
    model.weights.read()
    np.testing.assert_array_equal(model.weights["dense.weight"], stored)


# ---- where it is not understood --------------------------------------------------------------------------------------


def refuse() -> packed.Layout:
    raise packed.UnpackableError("this runtime is a stranger")


def other_packing(self: packed.Layout, rows: int, columns: int, *, transposed: bool) -> _core.Packing:
    stride = -(-columns // 16) * 16 + 16
    return _core.Packing(rows=rows, columns=columns, stride=stride, depth=64, transposed=transposed)


@pytest.mark.parametrize(
    ("target", "substitute", "reason"),
    [
        ("learn", refuse, "this runtime is a stranger"),
        ("_messages", refuse, "this runtime is a stranger"),
        ("_mappings", lambda path: {}, "did not map the packed weight"),
        # not the bytes that the runtime packs: it says so, or quietly goes on with its own, which the proof sees
        ("Layout.packing", other_packing, "refuses packed weights|the session does not see"),
    ],
)
def test_what_is_not_understood_is_used_unpacked(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str, substitute: Callable[..., Any], reason: str
) -> None:
    packed.learn()  # kept for the process, so that it does not itself see a substitute
    monkeypatch.setattr(f"pocketzo.packed.{target}", substitute)
    with pytest.warns(UserWarning, match=f"weights are used unpacked, which is slower: .*({reason})"):
        model = pz.load(tiny_bundle, threads=1)
    assert not model.packed
    assert model.unpacked_because is not None
    expected = pz.load(tiny_bundle, threads=1, packed=False)
    batch = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 1]])}
    np.testing.assert_array_equal(model.run(batch)["logits"], expected.run(batch)["logits"])
    with pytest.raises(pz.Error, match=f"the weights cannot be packed: .*({reason})"):
        pz.load(tiny_bundle, threads=1, packed=True)


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


def test_a_weight_of_two_products_is_used_unpacked(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["logits"]),
    ]
    bundle = prepared(tmp_path / "m", nodes, [weight("w", 4, 4)])
    with pytest.warns(UserWarning, match="w is a factor of 2 products"):
        assert not pz.load(bundle, threads=1).packed


def test_a_graph_without_products_is_used_unpacked(tmp_path: Path) -> None:
    bundle = prepared(tmp_path / "m", [helper.make_node("Mul", ["x", "w"], ["logits"])], [weight("w", 1, 4)])
    with pytest.warns(UserWarning, match="the graph multiplies by no weight"):
        assert not pz.load(bundle, threads=1).packed


def test_packed_must_be_a_choice(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="packed must be True, False or 'auto', got 'yes'"):
        pz.load(tiny_bundle, packed="yes")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who asks for unpacked weights is not warned
        model = pz.load(tiny_bundle, packed=False)
    assert (model.packed, model.unpacked_because) == (False, "as asked for")


# ---- shapes where equal matrices, many small ones and padding meet ---------------------------------------------------


def test_many_small_matrices_are_told_apart(tmp_path: Path) -> None:
    # The runtime shares packed bytes that are equal, and 40 small matrices are the same holes but for their marks.
    count = 40
    nodes, values, at = [], [], "x"
    for i in range(count):
        out = "logits" if i == count - 1 else f"y{i}"
        nodes += [helper.make_node("MatMul", [at, f"w{i}"], [f"p{i}"]), helper.make_node("Tanh", [f"p{i}"], [out])]
        values.append(numpy_helper.from_array(np.eye(4, dtype=np.float32) * (i + 1), f"w{i}"))
        at = out
    bundle = prepared(tmp_path / "m", nodes, values)
    model = pz.load(bundle, threads=1, packed=True, verify="full")
    assert len(model.weights._places) == count


@pytest.mark.parametrize("sizes", [(4, 600, 50, 4), (4, 1030, 1, 4), (4, 33, 515, 4), (4, 2048, 640, 4)])
def test_odd_shapes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    nodes, at = [], "x"
    for i in range(len(sizes) - 1):
        out = "logits" if i == len(sizes) - 2 else f"y{i}"
        nodes += [helper.make_node("MatMul", [at, f"w{i}"], [f"p{i}"]), helper.make_node("Tanh", [f"p{i}"], [out])]
        at = out
    weights = [weight(f"w{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
    bundle = prepared(tmp_path / "m", nodes, weights)
    assert trained(bundle, tmp_path / "a", packed=True) == trained(bundle, tmp_path / "b", packed=False)


def test_nothing_is_left_behind(tiny_bundle: Path, tmp_path: Path) -> None:
    script = "import sys, pocketzo as pz; print(len(pz.load(sys.argv[1], packed=True).weights._places))"
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_bundle],
        env={**os.environ, "TMPDIR": os.fspath(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2"]
    assert not list(tmp_path.glob("*pocketzo*"))
