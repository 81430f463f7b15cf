"""A model that is cut behind what does not depend on trained tensors computes what the whole one does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoders import Array
from graphs import MODELS, inputs_of, model_of, node, weight
from test_language_models import Sentences
from test_queries import disturb, on
from test_trainable import DECODERS, words_of

import pocketzo as pz
from pocketzo.errors import NotCuttableError
from pocketzo.formats.safetensors import file_sha256
from pocketzo.runtime import measure
from pocketzo.runtime.cut import plan_cut
from pocketzo.runtime.halves import Halves, InMemory
from pocketzo.runtime.load import load
from pocketzo.runtime.min_cut import INFINITE, Network
from pocketzo.runtime.onnx_proto import EXTERNAL, read_graph

pytestmark = [
    pytest.mark.usefixtures("quiet_quantiser"),
    pytest.mark.filterwarnings("ignore:.*prepacked, which is slower"),
]

LAST = "lora:r=2,layers=1-"


def bundle_and_batch(name: str, train: str, folder: Path) -> tuple[pz.Bundle, dict[str, Array]]:
    """Return a bundle, and a batch of texts of different lengths, padded on the right."""
    if "bert" in name or name.startswith("mlm"):
        feed, source = words_of(name) if name.startswith("bert") else (inputs_of(name), str(MODELS / f"{name}.onnx"))
        return pz.prepare(source, folder / "base", train=train), dict(feed)
    path = DECODERS[name](folder / "m.onnx")
    bundle = pz.prepare(path, folder / "base", task="causal-lm", train=train)
    return bundle, dict(Sentences(path).batch(np.arange(7)))


def both(bundle: pz.Bundle, **options: Any) -> tuple[pz.Model, pz.Model, Halves]:
    """Return a model that is cut, the whole model with the same values, and the first one's session."""
    model, whole = load(bundle, threads=1, cut=plan_cut(bundle), **options), pz.load(bundle, threads=1)
    assert model.halves is not None
    disturb(model, whole)
    return model, whole, model.halves


def check_equal(got: Mapping[str, Array], expected: Mapping[str, Array], batch: Mapping[str, Array]) -> None:
    """Compare outputs, but for those at padding."""
    mask = batch["attention_mask"] != 0
    for name, values in expected.items():
        own = got[name]
        if values.shape[:2] == mask.shape:
            own, values = own[mask], values[mask]
        np.testing.assert_allclose(own, values, rtol=1e-5, atol=1e-5 * np.abs(values).max(initial=0), err_msg=name)


CASES = [
    *((name, LAST) for name in ("gpt2", "llama", "qwen2", "qwen3", "genai", "llama, int4", "gpt2, int8 in blocks")),
    ("genai, QDQ", LAST),
    ("llama", r"layers\.1"),
    ("gpt2", r"h\.1\."),
    *((name, LAST) for name in ("bert-old", "bert-new")),
    *((name, "last:1+head") for name in ("bert-old", "bert-new", "bert-old-unfolded")),
    ("bert-old", "head"),
]


@pytest.mark.parametrize(("name", "train"), CASES)
def test_a_cut_model_computes_what_the_whole_one_does(name: str, train: str, tmp_path: Path) -> None:
    bundle, batch = bundle_and_batch(name, train, tmp_path)
    model, whole, halves = both(bundle)
    before = halves.computed
    for _ in range(2):
        check_equal(model.run(batch), whole.run(batch), batch)
    rows = {row.tobytes() for row in batch["input_ids"]}
    assert halves.computed - before <= len(rows)
    disturb(whole, model)
    for tensor in bundle.tensors:  # what is written to trained tensors is seen behind the cut
        if tensor.trainable:
            for one in model, whole:
                one.weights[tensor.name] = np.full(tensor.shape, 0.05, tensor.dtype)
    check_equal(model.run(batch), whole.run(batch), batch)
    assert halves.computed - before <= len(rows)
    saved = halves.cut.saved(4, 8)
    assert 0.1 < saved < 0.999


@pytest.mark.parametrize(("name", "train"), CASES)
def test_the_sizes_of_values_do_not_need_the_matrices(
    name: str, train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = bundle_and_batch(name, train, tmp_path)
    graph = read_graph(bundle.model_path)
    found = measure.measure(bundle, graph)
    thin = measure._thin
    monkeypatch.setattr(measure, "_thin", lambda graph: None)
    assert found == measure.measure(bundle, graph)
    thin(graph.graph)
    stored = {tensor.name for tensor in graph.graph.initializer if tensor.data_location == EXTERNAL}
    assert not [one.name for one in graph.graph.node if one.op_type in measure._THINNED and one.input[1] in stored]


@pytest.mark.parametrize("name", ["llama", "gpt2, int8 in blocks", "bert-old"])
def test_several_directions_run_behind_the_cut(name: str, tmp_path: Path) -> None:
    bundle, batch = bundle_and_batch(name, LAST, tmp_path)
    model, whole, halves = both(bundle, queries=True)
    rng = np.random.default_rng(5)
    values = {
        tensor.name: rng.normal(0, 0.1, (3, *tensor.shape)).astype(np.float32)
        for tensor in bundle.tensors
        if tensor.trainable
    }
    before = halves.computed
    got = on(bundle, batch, 3).together(model, values, [None, None, None])
    assert halves.computed - before <= len(batch["input_ids"])
    for index, loss in enumerate(got):
        for tensor, array in values.items():
            whole.weights[tensor] = array[index]
        assert loss == pytest.approx(whole.loss(batch), rel=1e-5)


def test_less_can_be_trained_than_the_bundle_allows(tmp_path: Path) -> None:
    bundle, batch = bundle_and_batch("llama", "lora:r=2", tmp_path)
    with pytest.raises(NotCuttableError, match=r"too little is computed before the first trained tensor"):
        plan_cut(bundle)
    later = [tensor.name for tensor in bundle.tensors if tensor.trainable and "layers.1" in tensor.name]
    model, whole = load(bundle, threads=1, cut=plan_cut(bundle, later)), pz.load(bundle, threads=1)
    for name in later:
        values = np.random.default_rng(1).normal(0, 0.1, model.weights[name].shape).astype(np.float32)
        model.weights[name] = whole.weights[name] = values
    check_equal(model.run(batch), whole.run(batch), batch)
    first = next(tensor.name for tensor in bundle.tensors if tensor.trainable and tensor.name not in later)
    with pytest.raises(ValueError, match=f"{first} is frozen"):
        model.weights[first] = 0.0
    model.weights.read()
    with pytest.raises(ValueError, match=f"'{first}' cannot be trained, as the model was loaded with a cut behind it"):
        pz.MeZO(model, lr=1e-2)
    data = Sentences(tmp_path / "m.onnx")
    pz.Trainer(
        model, pz.MeZO(model, lr=1e-2, trainable="layers.1"), data, steps=3, batch_size=4, run=tmp_path / "run"
    ).fit()
    pz.Run(tmp_path / "run").replay(tmp_path / "tuned")
    model.save(tmp_path / "saved")
    tuned, saved = (pz.Bundle.read(tmp_path / name) for name in ("tuned", "saved"))
    assert file_sha256(tuned.trained_path) == file_sha256(saved.trained_path) != file_sha256(bundle.trained_path)


@pytest.mark.parametrize("prepack", ["auto", False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.filterwarnings("ignore:this processor does not compute in fp16")
def test_layouts(dtype: Any, prepack: Any, tmp_path: Path) -> None:
    feed, source = words_of("bert-old")
    bundle = pz.prepare(source, tmp_path / "base", train="last:1+head", dtype=dtype)
    model = load(bundle, threads=1, cut=plan_cut(bundle), prepack=prepack)
    assert model.prepacked == (prepack == "auto" and dtype == "float32")
    whole = pz.load(bundle, threads=1, prepack=prepack)
    disturb(model, whole)
    got, expected = model.run(feed), whole.run(feed)
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, rtol=3e-2 if dtype == "float16" else 1e-5, atol=1e-3)


def test_what_is_kept_longest_unused_goes_first() -> None:
    store = InMemory(100)
    for number in range(4):
        store.put(bytes([number]), 1, [np.zeros(10, np.float32)])
        store.get(bytes([0]))
    assert [store.get(bytes([number])) is not None for number in range(4)] == [True, False, False, True]


# ---- what cannot be cut ----------------------------------------------------------------------------------------------


def test_rows_that_depend_on_each_other_are_refused(tmp_path: Path) -> None:
    bundle, _ = bundle_and_batch("gpt2, dynamic int8", LAST, tmp_path)
    with pytest.raises(NotCuttableError, match=r"DynamicQuantizeLinear .* rounds each row of a batch by all of them"):
        plan_cut(bundle)


def test_values_that_padding_changes_are_refused(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "table input_ids", "x"),
        node("MatMul", "x frozen", "y"),
        node("ReduceMean", "y", "mean", axes=[1], keepdims=1),  # over padding, too
        node("Add", "y mean", "h"),
        node("MatMul", "h frozen2", "h2"),
        node("Relu", "h2", "k"),
        node("MatMul", "k head.weight", "scores"),
        node("ReduceMean", "scores", "logits", axes=[1], keepdims=0),
        node("Cast", "attention_mask", "m", to=1),
        node("ReduceSum", "m", "unused", keepdims=0),
    ]
    weights = [
        weight("table", 30, 64),
        weight("frozen", 64, 64),
        weight("frozen2", 64, 16),
        weight("head.weight", 16, 2),
    ]
    shape = ["batch", "sequence"]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        weights,
        inputs=[("input_ids", 7, shape), ("attention_mask", 7, shape)],
        outputs=[("logits", ["batch", 2]), ("unused", [])],
    )
    bundle = pz.prepare(path, tmp_path / "base", train=r"head\.weight")
    with pytest.raises(NotCuttableError, match=r"changes by .* with the padding"):
        load(bundle, threads=1, cut=plan_cut(bundle))


def test_a_tied_embedding_that_is_trained_leaves_nothing_before_it(tmp_path: Path) -> None:
    bundle, _ = bundle_and_batch("mlm-new", "last:1+head", tmp_path)
    with pytest.raises(NotCuttableError, match="too little is computed before the first trained tensor"):
        plan_cut(bundle)


# ---- the minimum cut -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_minimum_cut_is_that_of_all_cuts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arcs = {(a, b): int(rng.integers(1, 10)) for a in range(7) for b in range(7) if a != b and rng.random() < 0.4}
    network = Network()
    for (tail, head), capacity in arcs.items():
        network.connect(tail, head, capacity)
    network.connect("begin", 0, INFINITE)
    network.connect(6, "end", INFINITE)

    def cost(side: set[Any]) -> int:
        return sum(capacity for (tail, head), capacity in arcs.items() if tail in side and head not in side)

    sides = [{0, *middle} for size in range(6) for middle in itertools.combinations(range(1, 6), size)]
    least = min(map(cost, sides))
    near = network.near_side("begin", "end") - {"begin"}
    assert cost(near) == least
    assert len(near) == min(len(side) for side in sides if cost(side) == least)
