"""Probing batches that are made up from declared inputs."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import model_of, node, weight
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import pocketzo as pz
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import ValueSpec
from pocketzo.formats.probe import other_branches
from pocketzo.graph.probe import index_limits, made_up_batches
from pocketzo.graph.read import read_model

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def first(**inputs: tuple[str, tuple[int | str, ...]]) -> dict[str, NDArray[Any]]:
    """The first batch of some inputs."""
    specs = [ValueSpec(name.replace("__", "."), *value) for name, value in inputs.items()]
    return next(made_up_batches(specs, {}))


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_fixed_sizes_are_kept_and_a_name_is_one_size() -> None:
    batch = first(
        x=("float32", ("b", "s", 5)), y=("float32", ("s", "b")), one=("float32", ()), rows=("float32", (1, "?", "?"))
    )
    assert {name: array.shape for name, array in batch.items()} == {
        "x": (2, 8, 5),
        "y": (8, 2),
        "one": (),
        "rows": (1, 8, 8),
    }
    assert {(type(array), array.dtype) for array in batch.values()} == {(np.ndarray, np.dtype(np.float32))}


def test_a_decoder_gets_empty_caches_and_a_mask_of_the_tokens() -> None:
    total = "past_sequence_length + sequence_length"
    cache = ("float32", ("batch_size", 2, "past_sequence_length", 4))
    batch = first(
        past_key_values__0__key=cache,  # before the tokens, whose sizes count
        input_ids=("int64", ("batch_size", "sequence_length")),
        attention_mask=("int64", ("batch_size", total)),
        position_ids=("int64", ("batch_size", "sequence_length")),
        past_key_values__0__value=cache,
        use_cache_branch=("bool", (1,)),
        num_logits_to_keep=("int64", ()),
        logits_to_keep=("int64", (1,)),
    )
    assert batch["past_key_values.0.key"].shape == batch["past_key_values.0.value"].shape == (2, 2, 0, 4)
    assert batch["attention_mask"].shape == (2, 8)
    np.testing.assert_array_equal(batch["position_ids"], [range(8)] * 2)
    assert not batch["use_cache_branch"].any()
    assert batch["num_logits_to_keep"] == batch["logits_to_keep"] == 0
    batch = first(
        input_ids=("int64", (1, 1)),
        attention_mask=("int64", ("batch", "past_sequence_length + 1")),
        past_key_values__0__key=("float32", ("batch", 2, "past_sequence_length", 4)),
    )
    assert [array.shape for array in batch.values()] == [(1, 1), (1, 1), (1, 2, 0, 4)]


def test_the_state_of_a_recurrent_layer_has_the_examples_second() -> None:
    batch = first(input=("float32", ("?", "?")), state=("float32", (2, "?", 128)))
    assert [array.shape for array in batch.values()] == [(2, 8), (2, 2, 128)]


def test_masks_keep_and_drop_in_either_sense() -> None:
    for dtype in ("bool", "int64", "float32", "uint8"):
        mask = first(attention_mask=(dtype, ("b", "s")))["attention_mask"]
        assert mask.dtype == dtype
        assert mask.any(axis=1).all()
        assert not mask.all(axis=1).any()
        assert (np.diff(mask.astype(int)) <= 0).all(), "padding is on the right"
    assert first(padding_mask=("bool", ("b", 1)))["padding_mask"].all()


def test_what_is_known_by_name() -> None:
    batch = first(
        labels=("int64", ("b",)),
        token_type_ids=("int64", ("b", "s")),
        lengths=("int64", ("b",)),
        sr=("int64", ()),
        pixel_values=("uint8", ("b", 3, 32, 32)),
        text=("object", ("b",)),
    )
    np.testing.assert_array_equal(batch["labels"], 0)
    np.testing.assert_array_equal(batch["token_type_ids"], 0)
    np.testing.assert_array_equal(batch["lengths"], 8)
    assert batch["sr"] == 16000
    assert batch["pixel_values"].max() == 255
    np.testing.assert_array_equal(batch["text"], ["a", "a"])


def test_later_batches_are_larger_or_of_one_example_and_no_two_are_alike() -> None:
    specs = [ValueSpec("x", "float32", ("b", 3, "h", "w"))]
    shapes = [batch["x"].shape for batch in made_up_batches(specs, {})]
    assert (1, 3, 8, 8) in shapes
    assert (1, 3, 224, 224) in shapes
    assert len(list(made_up_batches([ValueSpec("x", "float32", (4, 5))], {}))) == 2  # integers that are 0
    huge = [ValueSpec("x", "float32", ("b", "x", "y", "z"))]
    assert [batch["x"].size for batch in made_up_batches(huge, {})][-1] < 1 << 23


def test_a_type_without_numpy_is_refused() -> None:
    with pytest.raises(BundleError, match="the input 'x' is bfloat16, which numpy does not have"):
        next(made_up_batches([ValueSpec("x", "bfloat16", (2,))], {}))


def test_other_branches_turn_flags_and_signs() -> None:
    batch = first(
        flag=("bool", (1,)),
        x=("float32", ("b", 8)),
        mask=("bool", ("b", "s")),
        sr=("int64", ()),
        bare=("bool", ()),
        scale=("float32", ()),
    )
    turned, positive, negative = other_branches(batch)
    assert turned["flag"].all()
    assert turned["sr"] == 8000
    assert turned["sr"].shape == ()
    assert turned["sr"].dtype == np.int64
    np.testing.assert_array_equal(turned["mask"], batch["mask"])
    assert turned["bare"]
    assert {type(array) for other in (turned, positive, negative) for array in other.values()} == {np.ndarray}
    assert (positive["x"] >= 0).all()
    assert (negative["x"] <= 0).all()
    assert list(other_branches({"ids": np.arange(3)})) == []


# ---- tables ----------------------------------------------------------------------------------------------------------


def limits(path: Path) -> dict[str, int]:
    return index_limits(read_model(path).graph)


@pytest.mark.parametrize(
    ("nodes", "tables"),
    [
        ([node("Gather", "W ids", "y")], {"W": (5, 3)}),
        (
            [node("Cast", "ids", "a", to=INT64), node("Unsqueeze", "a zero", "b"), node("Gather", "W b", "y")],
            {"W": (5, 3)},
        ),
        (
            [node("Gather", "V ids", "a"), node("Gather", "W ids", "b"), node("Add", "a b", "y")],
            {"V": (9, 3), "W": (5, 3)},
        ),
        ([node("Transpose", "W", "T", perm=[1, 0]), node("Gather", "T ids", "y")], {"W": (3, 5)}),
        ([node("Transpose", "W", "T"), node("Gather", "T ids", "y")], {"W": (3, 5)}),
        ([node("Gather", "W ids", "y", axis=1)], {"W": (3, 5)}),
        ([node("Concat", "ids ids", "a", axis=1), node("Gather", "W a", "y")], {"W": (5, 3)}),
    ],
    ids=["plain", "moved", "two", "transposed", "reversed", "axis", "joined"],
)
def test_ids_are_below_the_smallest_table(
    tmp_path: Path, nodes: list[onnx.NodeProto], tables: dict[str, tuple[int, int]]
) -> None:
    inputs = [("ids", INT64, ("batch", "sequence"))]
    tensors = [weight(name, *shape) for name, shape in tables.items()]
    path = model_of(
        tmp_path / "m.onnx",
        [*nodes, node("ReduceMean", "y", "logits", axes=[1], keepdims=0)],
        [*tensors, ints("zero", 0)],
        inputs=inputs,
        outputs=[("logits", ("batch", "?"))],
    )
    assert limits(path) == {"ids": 5}
    for batch in islice(made_up_batches([ValueSpec("ids", "int64", ("batch", "sequence"))], {"ids": 5}), 2):
        assert set(np.unique(batch["ids"])) == set(range(5))


def test_ids_may_be_declared_as_floats(tmp_path: Path) -> None:
    """As Keras does, which also adds an offset to those below 0."""
    path = model_of(
        tmp_path / "m.onnx",
        [
            node("Cast", "x", "i", to=TensorProto.INT32),
            node("Add", "i zero", "at"),
            node("Gather", "W at", "e"),
            node("ReduceMean", "e", "y", axes=[1], keepdims=0),
            node("MatMul", "y V", "logits"),
        ],
        [weight("W", 5, 4), weight("V", 4, 3), numpy_helper.from_array(np.array(0, np.int32), "zero")],
        inputs=[("x", FLOAT, ("batch", 21))],
    )
    bundle = pz.prepare(path, tmp_path / "bundle")
    assert bundle.probe is not None
    assert bundle.probe["x"].dtype == np.float32
    assert set(np.unique(bundle.probe["x"])) == set(range(5))


def test_a_table_in_a_branch_counts(tmp_path: Path) -> None:
    def branch(table: str, name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, FLOAT, None)
        return helper.make_graph([node("Gather", f"{table} ids", name)], name, [], [output])

    choice = helper.make_node("If", ["flag"], ["y"], then_branch=branch("V", "v"), else_branch=branch("W", "w"))
    path = model_of(
        tmp_path / "m.onnx",
        [choice, node("ReduceMean", "y", "logits", axes=[1], keepdims=0)],
        [weight("V", 9, 3), weight("W", 5, 3)],
        inputs=[("flag", BOOL, ()), ("ids", INT64, ("batch", "sequence"))],
    )
    assert limits(path) == {"ids": 5}


def test_the_rows_of_contributed_operators_count(tmp_path: Path) -> None:
    table = "input_ids segment_ids word position segment gamma beta"
    embed = helper.make_node("EmbedLayerNormalization", table.split(), ["h", "i"], domain="com.microsoft")
    tensors = [weight("word", 7, 4), weight("position", 16, 4), weight("segment", 2, 4)]
    path = model_of(
        tmp_path / "m.onnx",
        [embed, node("ReduceMean", "h", "logits", axes=[1], keepdims=0)],
        [*tensors, weight("gamma", 4), weight("beta", 4)],
        inputs=[(name, TensorProto.INT32, ("batch", "sequence")) for name in ("input_ids", "segment_ids")],
    )
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    assert limits(path) == {"input_ids": 7, "segment_ids": 2}


# ---- whole models ----------------------------------------------------------------------------------------------------


def image(path: Path) -> Path:
    """Of images no smaller than its kernel."""
    return model_of(
        path,
        [
            node("Conv", "x conv", "a"),
            node("GlobalAveragePool", "a", "p"),
            node("Flatten", "p", "q"),
            node("MatMul", "q W", "logits"),
        ],
        [weight("conv", 4, 3, 16, 16), weight("W", 4, 3)],
        inputs=[("x", FLOAT, ("batch", 3, "height", "width"))],
    )


def scalar(path: Path) -> Path:
    return model_of(
        path,
        [node("Cast", "rate", "f", to=FLOAT), node("Mul", "x f", "a"), node("MatMul", "a W", "logits")],
        [weight("W", 4, 3)],
        inputs=[("x", FLOAT, ("batch", 4)), ("rate", INT64, ())],
    )


def one_example(path: Path) -> Path:
    """Of one example, though its first axis is declared dynamic."""
    return model_of(
        path,
        [node("Reshape", "x shape", "a"), node("MatMul", "a W", "logits")],
        [ints("shape", 1, 4), weight("W", 4, 3)],
    )


def offset(path: Path) -> Path:
    """Of positions with an offset, as of OPT, into a table with room for few."""
    return model_of(
        path,
        [
            node("Add", "ids two", "at"),
            node("Gather", "W at", "y"),
            node("ReduceMean", "y", "logits", axes=[1], keepdims=0),
        ],
        [weight("W", 4, 3), ints("two", 2)],
        inputs=[("ids", INT64, ("batch", "sequence"))],
    )


def decoder(path: Path) -> Path:
    """A layer of attention with a cache."""
    shape = ("batch", 1, "past_sequence_length", 4)
    nodes = [
        node("Gather", "wte input_ids", "e"),
        node("Gather", "wpe position_ids", "p"),
        node("Add", "e p", "h"),
        node("Unsqueeze", "h one", "h4"),
        node("MatMul", "h4 Wk", "k1"),
        node("MatMul", "h4 Wv", "v1"),
        node("Concat", "past_key_values.0.key k1", "present.0.key", axis=2),
        node("Concat", "past_key_values.0.value v1", "present.0.value", axis=2),
        node("Transpose", "present.0.key", "kt", perm=[0, 1, 3, 2]),
        node("MatMul", "h4 kt", "scores"),
        node("Cast", "attention_mask", "m", to=FLOAT),
        node("Unsqueeze", "m one_two", "m4"),
        node("Sub", "unit m4", "dropped"),
        node("Mul", "dropped far", "bias"),
        node("Add", "scores bias", "masked"),
        node("Softmax", "masked", "w", axis=-1),
        node("MatMul", "w present.0.value", "c4"),
        node("Squeeze", "c4 one", "c"),
        node("MatMul", "c head", "logits"),
    ]
    weights = [weight("wte", 11, 4), weight("wpe", 9, 4), *(weight(name, 4, 4) for name in ("Wk", "Wv"))]
    constants = [ints("one", 1), ints("one_two", 1, 2)]
    floats = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in {"unit": 1, "far": -1e9}.items()]
    tokens = ("batch", "sequence")
    return model_of(
        path,
        nodes,
        [*weights, weight("head", 4, 11), *constants, *floats],
        inputs=[
            ("input_ids", INT64, tokens),
            ("attention_mask", INT64, ("batch", "past_sequence_length + sequence")),
            ("position_ids", INT64, tokens),
            ("past_key_values.0.key", FLOAT, shape),
            ("past_key_values.0.value", FLOAT, shape),
        ],
        outputs=[
            ("logits", ("batch", "sequence", 11)),
            ("present.0.key", ("batch", 1, "total", 4)),
            ("present.0.value", ("batch", 1, "total", 4)),
        ],
    )


def merged(path: Path) -> Path:
    """The same in both branches of a merged decoder: with a cache, and without."""
    model = onnx.load(decoder(path))
    graph = model.graph
    outputs = [value.name for value in graph.output]
    bodies = {name: helper.make_graph(graph.node, name, [], graph.output) for name in ("then_branch", "else_branch")}
    for copied in bodies["else_branch"].node:
        if copied.op_type == "Concat":
            copied.op_type = "Identity"
            del copied.input[0], copied.attribute[:]
    del graph.node[:]
    graph.node.append(helper.make_node("If", ["use_cache_branch"], outputs, **bodies))
    graph.input.append(helper.make_tensor_value_info("use_cache_branch", BOOL, (1,)))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("make", [image, scalar, one_example, offset, decoder, merged], ids=lambda make: make.__name__)
def test_models_with_inputs_of_their_own_kind_are_prepared_and_loaded(tmp_path: Path, make: Any) -> None:
    bundle = pz.prepare(make(tmp_path / "m.onnx"), tmp_path / "bundle")
    model = pz.load(bundle, threads=1, prepack=False, verify="full")
    assert np.isfinite(model.loss(bundle.probe or {}))


def test_a_model_that_needs_a_batch_says_so(tmp_path: Path) -> None:
    path = model_of(
        tmp_path / "m.onnx",
        [
            node("Sub", "ids base", "at"),
            node("Gather", "W at", "y"),
            node("ReduceMean", "y", "logits", axes=[1], keepdims=0),
        ],
        [weight("W", 4, 3), ints("base", 1000)],
        inputs=[("ids", INT64, ("batch", "sequence"))],
    )
    with pytest.raises(BundleError, match=r"none of the batches .*give one by --probe batch\.npz.*With ids \[2, 8\]"):
        pz.prepare(path, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    bundle = pz.prepare(path, tmp_path / "bundle", probe={"ids": np.array([[1000, 1003, 1001]])})
    pz.load(bundle, threads=1, prepack=False, verify="full")
