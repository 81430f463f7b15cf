"""Live weights that show on few inputs only are not called dead, and dead ones are found beside coarse roundings."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import model_of, node, weight
from onnx import TensorProto, helper, numpy_helper

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

Array = npt.NDArray[Any]
PLAIN = [node("MatMul", "x w", "product")]
X = ("x", TensorProto.FLOAT, ("batch", 4))
W = weight("w", 4, 3)


def constant(name: str, value: object, dtype: npt.DTypeLike) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def load_all(
    source: Path, folder: Path, probe: dict[str, Array] | None = None, loss: Literal["none"] | None = None
) -> None:
    """Prepare a model and load it by each check, in both layouts; fail at a warning."""
    bundle = pz.prepare(source, folder, probe=probe, loss=loss)
    assert all(tensor.trainable for tensor in bundle.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "weights are not prepacked")
        for prepack in (False, "auto"):
            pz.load(bundle, threads=1, verify="full", prepack=prepack)


def branch(name: str, product: str) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(f"{name}_logits", TensorProto.FLOAT, None)
    return helper.make_graph([node("MatMul", f"x {product}", f"{name}_logits")], name, [], [output])


@pytest.mark.parametrize("flag", [True, False])
def test_weights_of_both_branches_are_seen(tmp_path: Path, flag: bool) -> None:
    nodes = [
        node("If", "use_cache", "logits", then_branch=branch("then", "w"), else_branch=branch("else", "v")),
    ]
    inputs = (X, ("use_cache", TensorProto.BOOL, ()))
    source = model_of(tmp_path / "m", nodes, [W, weight("v", 4, 3)], inputs=inputs)
    load_all(source, tmp_path / "b", {"x": np.ones((2, 4), np.float32), "use_cache": np.array(flag)})


@pytest.mark.parametrize("kind", ["ignore", "keep", "numbers"])
def test_a_weight_that_the_mask_hides_is_seen(tmp_path: Path, kind: str) -> None:
    # Where the mask hides all, the probing batch shows w nowhere.
    zeros = constant("zeros", np.zeros((1, 3)), np.float32)
    select = {
        "ignore": [node("Where", "mask zeros product", "logits")],
        "keep": [node("Where", "mask product zeros", "logits")],
        "numbers": [node("Cast", "mask", "flags", to=TensorProto.BOOL), node("Where", "flags product zeros", "logits")],
    }[kind]
    dtype = TensorProto.INT64 if kind == "numbers" else TensorProto.BOOL
    source = model_of(
        tmp_path / "m",
        [node("MatMul", "x w", "all"), node("Add", "all b", "product"), *select, node("Add", "logits c", "y")],
        [W, weight("b", 3), weight("c", 3), zeros],
        inputs=(X, ("mask", dtype, ("batch", 3))),
        outputs=[("y", ("batch", 3))],
    )
    mask = np.full((2, 3), kind == "ignore")
    probe = {"x": np.ones((2, 4), np.float32), "mask": mask.astype(np.int64) if kind == "numbers" else mask}
    bundle = pz.prepare(source, tmp_path / "b", probe=probe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pz.load(bundle, threads=1, verify="full", prepack=False)


def recurrent(path: Path, op_type: str) -> Path:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op_type]
    layer = helper.make_node(op_type, ["x", "W", "R", "B"], ["", "h"], hidden_size=5)
    nodes = [layer, node("Squeeze", "h axis", "last"), node("MatMul", "last w", "logits")]
    weights = [weight("W", 1, gates * 5, 4), weight("R", 1, gates * 5, 5), weight("B", 1, gates * 10)]
    constants = [constant("axis", [0], np.int64)]
    inputs = (("x", TensorProto.FLOAT, ("time", "batch", 4)),)
    return model_of(path, nodes, [*weights, weight("w", 5, 3), *constants], inputs=inputs)


@pytest.mark.parametrize("op_type", ["LSTM", "GRU", "RNN"])
def test_weights_of_recurrent_operators_are_seen(tmp_path: Path, op_type: str) -> None:
    # onnxruntime prepacks them as well, in layouts of their own.
    bundle = pz.prepare(recurrent(tmp_path / "m", op_type), tmp_path / "b")
    assert all(tensor.trainable for tensor in bundle.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prepack in (False, True):
            pz.load(bundle, threads=1, verify="full", prepack=prepack)


def test_frozen_weights_are_read_before_a_session_packs_them(tmp_path: Path) -> None:
    bundle = pz.prepare(recurrent(tmp_path / "m", "LSTM"), tmp_path / "b", train="^w$")
    assert [tensor.name for tensor in bundle.tensors if not tensor.trainable] == ["W", "R", "B"]
    batch = {"x": np.ones((2, 1, 4), np.float32)}
    got = pz.load(bundle, threads=1, prepack=True).run(batch)["logits"]
    np.testing.assert_allclose(got, pz.load(bundle, threads=1, prepack=False).run(batch)["logits"], rtol=1e-5)


def threshold(folder: Path, *values: float) -> pz.Bundle:
    """Prepare a model with a weight w of these values, which matters only where it is above 100."""
    nodes = [
        node("Mul", "x w", "product"),
        node("Greater", "product threshold", "above"),
        node("Where", "above product zero", "gated"),
        node("Add", "gated b", "logits"),
    ]
    weights = [constant("w", values, np.float32), weight("b", 3)]
    constants = [constant("threshold", 100, np.float32), constant("zero", 0, np.float32)]
    source = model_of(folder / "m", nodes, [*weights, *constants], inputs=(("x", TensorProto.FLOAT, ("batch", 3)),))
    bundle = pz.prepare(source, folder / "b", probe={"x": np.ones((2, 3), np.float32)})
    assert {"w", "b"} <= {tensor.name for tensor in bundle.tensors if tensor.trainable}
    return bundle


def test_a_weight_behind_a_threshold_is_seen(tmp_path: Path) -> None:
    # Noise does not reach it, and neither does NaN; the stored weight does.
    bundle = threshold(tmp_path, 200, 300, 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pz.load(bundle, threads=1, prepack=False, verify="full")


def test_a_weight_that_no_output_shows_is_named(tmp_path: Path) -> None:
    bundle = threshold(tmp_path, 2, 3, 4)
    with pytest.warns(UserWarning, match="nothing that was tried changes with w: is it unused, or used only with"):
        pz.load(bundle, threads=1, prepack=False, verify="full")


def test_a_weight_is_seen_though_one_of_the_batches_gives_zeros(tmp_path: Path) -> None:
    # Negative floats end at the ReLU. Zeros agree with any weights, which does not speak against these.
    nodes = [node("Relu", "x", "positive"), node("MatMul", "positive w", "logits")]
    load_all(model_of(tmp_path / "m", nodes, [W], inputs=(X,)), tmp_path / "b", loss="none")


def rectified(folder: Path, dtype: Literal["float32", "float16"]) -> pz.Bundle:
    """Prepare products by a weight and a threshold that they reach if both are by the stored weight, none by noise."""
    nodes = [
        node("MatMul", "x w", "a"),
        node("MatMul", "a w", "b"),
        node("Sub", "b threshold", "above"),
        node("Relu", "above", "y"),
    ]
    values = 20 * np.abs(numpy_helper.to_array(weight("w", 4, 4)))
    source = model_of(
        folder / "m",
        nodes,
        [constant("w", values, np.float32), constant("threshold", 1500, np.float32)],
        inputs=(X,),
        outputs=[("y", ("batch", 4))],
    )
    return pz.prepare(source, folder / "b", loss="none", dtype=dtype, probe={"x": np.ones((2, 4), np.float32)})


@pytest.mark.parametrize("verify", ["fast", "full"])
@pytest.mark.parametrize("prepack", [False, "auto"])
def test_a_stale_use_of_a_weight_is_found_where_noise_gives_zeros(
    tmp_path: Path, verify: Literal["fast", "full"], prepack: bool | Literal["auto"]
) -> None:
    bundle = rectified(tmp_path, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "weights are not prepacked")
        pz.load(bundle, threads=1, prepack=prepack, verify=verify)
    # The session folds the sum into a constant, which prepare would have refused.
    model = onnx.load(bundle.model_path, load_external_data=False)
    second = next(each for each in model.graph.node if each.output[0] == "b")
    second.input[1] = "double"
    model.graph.node.insert(0, node("Add", "w w", "double"))
    onnx.save(model, bundle.model_path)
    stale = replace(bundle, graph_sha256=file_sha256(bundle.model_path))
    stale.write_description()
    with pytest.raises(pz.DeadWeightError, match=r"does not see what is written to w,"):
        pz.load(stale, threads=1, prepack=prepack, verify=verify)


def cut_by_a_fixed_shape(folder: Path, *more: TensorProto) -> Path:
    """Return a model with a table whose rows are chosen by the shape of an input, which only the runtime computes."""
    nodes = [
        node("Transpose", "x", "turned", perm=[1, 0]),
        node("Shape", "turned", "stop", start=0, end=1),
        node("Slice", "table zero stop zero", "rows"),
        node("Add", "rows turned", "sum"),
        node("MatMul", "sum head" if more else "sum turned", "y"),
    ]
    table, zero = weight("table", 5, 4), constant("zero", [0], np.int64)
    sizes = (4, 3) if more else (4, 4)
    source = ("x", TensorProto.FLOAT, sizes)
    return model_of(
        folder / "m", nodes, [table, zero, *more], inputs=(source,), outputs=[("y", (sizes[1], sizes[0] - bool(more)))]
    )


def test_weights_that_the_runtime_computes_with_once_are_frozen_by_the_command_of_the_error(tmp_path: Path) -> None:
    source = cut_by_a_fixed_shape(tmp_path, weight("head", 4, 3))
    bundle = pz.prepare(source, tmp_path / "b", loss="none")
    with pytest.raises(pz.DeadWeightError, match=r"written to table, .* --train ") as caught:
        pz.load(bundle, threads=1, prepack=False)
    _, pattern, _ = str(caught.value).split("'")
    bundle = pz.prepare(source, tmp_path / "b", loss="none", train=pattern, overwrite=True)
    assert [tensor.name for tensor in bundle.tensors if tensor.trainable] == ["head"]
    pz.load(bundle, threads=1, prepack=False, verify="full")


def test_a_model_without_any_other_weight_is_not_told_to_freeze_it(tmp_path: Path) -> None:
    bundle = pz.prepare(cut_by_a_fixed_shape(tmp_path), tmp_path / "b", loss="none")
    with pytest.raises(pz.DeadWeightError, match=r"written to table, .*No other weight is left"):
        pz.load(bundle, threads=1)


def test_noise_that_gives_zeros_does_not_speak_against_float16_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "this processor does not compute in fp16")
        pz.load(rectified(tmp_path, "float16"), threads=1, verify="full")
