"""Logits at some positions only, behind each kind of output projection; caches and flags become constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoders import MICROSOFT, Array, Nodes, llama_weights, write_llama
from onnx import TensorProto, helper, numpy_helper

from pocketzo.errors import BundleError
from pocketzo.graph.decoder import remove_cache
from pocketzo.graph.language import LanguageGraph
from pocketzo.graph.read import read_model, shape_of, to_bytes

VOCABULARY, HIDDEN, BATCH, LENGTH = 11, 8, 3, 5
IDS = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, LENGTH))
KEPT = ["row", LENGTH, HIDDEN]


def matrix(name: str, *shape: int) -> Array:
    return np.random.default_rng([3, *name.encode()]).normal(size=shape).astype(np.float32)


class Model(Nodes):
    """A language model of an embedding, a Tanh and an output projection."""

    inputs: Sequence[tuple[str, int, Sequence[int | str]]] = [("input_ids", TensorProto.INT64, ("batch", "sequence"))]
    scores: Sequence[int | str] = ("batch", "sequence", VOCABULARY)
    flag: Mapping[str, Array] = {}

    def hidden(self) -> str:
        table = self.weight("embedding.weight", matrix("embedding", VOCABULARY, HIDDEN))
        return str(self.op("Tanh", self.op("Gather", table, "input_ids")))

    def head(self, rows: int = HIDDEN) -> str:
        return self.weight("head.weight", matrix("head", rows, VOCABULARY))

    def logits(self, value: str) -> None:
        self.op("Identity", value, outputs=["logits"])

    def proto(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(*value) for value in self.inputs],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, self.scores)],
            self.initializers,
        )
        versions = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=9)


# ---- projections -----------------------------------------------------------------------------------------------------


def plain(m: Model) -> None:
    m.logits(m.op("MatMul", m.hidden(), m.head()))


def with_bias(m: Model) -> None:
    m.logits(m.op("Add", m.weight("bias", matrix("bias", VOCABULARY)), m.op("MatMul", m.hidden(), m.head())))


def with_wide_bias(m: Model) -> None:
    m.logits(m.op("Add", m.op("MatMul", m.hidden(), m.head()), m.weight("bias", matrix("bias", 1, 1, VOCABULARY))))


def tied(m: Model) -> None:
    hidden = m.hidden()
    m.logits(m.op("MatMul", hidden, m.op("Transpose", "embedding.weight", perm=[1, 0])))


def softcapped(m: Model) -> None:
    scaled = m.op("Div", m.op("MatMul", m.hidden(), m.head()), m.constant(0.5))
    m.logits(m.op("Mul", m.op("Tanh", scaled), m.constant(0.5)))


def gemm(m: Model) -> None:
    flat = m.op("Reshape", m.hidden(), m.constant([-1, HIDDEN]))
    product = m.op("Gemm", flat, m.weight("head.weight", matrix("head", VOCABULARY, HIDDEN)), transB=1)
    m.logits(m.op("Reshape", product, m.op("Concat", m.op("Shape", "input_ids"), m.constant([VOCABULARY]), axis=0)))


def fused(m: Model) -> None:
    head = m.weight("head.weight", matrix("head", VOCABULARY, HIDDEN))
    m.logits(m.op("FusedMatMul", m.hidden(), head, transB=1, alpha=0.5, domain=MICROSOFT))


def half(m: Model) -> None:
    hidden = m.op("Cast", m.hidden(), to=TensorProto.FLOAT16)
    head = m.weight("head.weight", matrix("head", HIDDEN, VOCABULARY).astype(np.float16))
    m.logits(m.op("Cast", m.op("MatMul", hidden, head), to=TensorProto.FLOAT))


def dynamic(m: Model) -> None:
    """The scale is one for all tokens: gathered integers have to be multiplied by it, too."""
    values, scale, zero = m.op("DynamicQuantizeLinear", m.hidden(), outputs=["q", "q_scale", "q_zero"])
    head = m.weight("head.quantized", np.round(40 * matrix("head", HIDDEN, VOCABULARY)).astype(np.int8))
    product = m.op("MatMulInteger", values, head, zero, m.weight("zero", np.array(0, np.int8)))
    factor = m.op("Mul", scale, m.weight("scale", np.abs(matrix("scale", VOCABULARY))))
    m.logits(m.op("Mul", m.op("Cast", product, to=TensorProto.FLOAT), factor))


def integers(m: Model) -> None:
    scale, zero = m.weight("scale", np.array(0.01, np.float32)), m.weight("zero", np.array(3, np.uint8))
    hidden = m.op("DequantizeLinear", m.op("QuantizeLinear", m.hidden(), scale, zero), scale, zero)
    product = m.op("MatMul", hidden, m.head())
    wide = m.weight("wide", np.array(0.1, np.float32))
    m.logits(m.op("DequantizeLinear", m.op("QuantizeLinear", product, wide, zero), wide, zero))


def with_offsets(m: Model) -> None:
    """Blocks of a minimum each: a second, smaller product of sums is added."""
    hidden = m.hidden()
    sums = m.op("Reshape", hidden, m.constant([0, 0, 2, HIDDEN // 2]))
    sums = m.op("ReduceSum", sums, m.constant([-1]), keepdims=0)
    offsets = m.op("MatMul", sums, m.weight("offsets", matrix("offsets", 2, VOCABULARY)))
    m.logits(m.op("Add", m.op("MatMul", hidden, m.head()), offsets))


def kept(m: Model) -> None:
    """As transformers exports it: hidden[:, -num_logits_to_keep:], where 0 keeps all."""
    m.inputs = [*m.inputs, ("num_logits_to_keep", TensorProto.INT64, ())]
    m.flag = {"num_logits_to_keep": np.array(0)}
    start = m.op("Unsqueeze", m.op("Neg", "num_logits_to_keep"), m.constant([0]))
    hidden = m.op("Slice", m.hidden(), start, m.constant([2**40]), m.constant([1]))
    m.logits(m.op("MatMul", hidden, m.head()))


def kept_after(m: Model) -> None:
    m.inputs = [*m.inputs, ("num_logits_to_keep", TensorProto.INT64, (1,))]
    m.flag = {"num_logits_to_keep": np.array([0])}
    product = m.op("MatMul", m.hidden(), m.head())
    m.logits(m.op("Slice", product, m.op("Neg", "num_logits_to_keep"), m.constant([2**40]), m.constant([1])))


PROJECTIONS: list[Callable[[Model], None]] = [
    plain,
    with_bias,
    with_wide_bias,
    tied,
    softcapped,
    gemm,
    fused,
    half,
    dynamic,
    integers,
    with_offsets,
    kept,
    kept_after,
]
GRAPHS = {
    "tokens": LanguageGraph(causal=True),
    "label words": LanguageGraph(causal=True, label_tokens=(7, 2, 9)),
    "calibrated": LanguageGraph(causal=False, label_tokens=(7, 2), calibration=(0.5, -1.25)),
}


def reduced(m: Model, graph: LanguageGraph, path: Path) -> ir.Model:
    onnx.save(m.proto(), path)
    model = read_model(path)
    graph.reduce(model)
    return model


def run(model: bytes, feed: dict[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(names, {name: feed[name] for name in taken}), strict=True))


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())
@pytest.mark.parametrize("write", PROJECTIONS)
def test_losses_follow_from_the_logits_of_all_tokens(
    write: Callable[[Model], None], graph: LanguageGraph, tmp_path: Path
) -> None:
    m = Model()
    write(m)
    logits = run(m.proto().SerializeToString(), {"input_ids": IDS, **m.flag})["logits"]
    model = reduced(m, graph, tmp_path / "m.onnx")
    assert {value.name for value in model.graph.inputs} & {"num_logits_to_keep", "logits"} == set()
    feed = {"positions": np.array([1, 4, 5, 13]), "targets": np.array([3, 0, 10, 3]), "labels": np.array([1, 0, 1, 1])}
    got = run(to_bytes(model), {"input_ids": IDS, **feed})

    close = 1e-2 if write is half else 1e-6  # sums in 16 bits, in another order
    rows = logits.reshape(-1, VOCABULARY)[feed["positions"]].astype(np.float64)
    if graph.label_tokens is None:
        targets = feed["targets"]
    else:
        rows = rows[:, list(graph.label_tokens)] - np.array(graph.calibration or 0)
        np.testing.assert_allclose(got["logits"], rows, rtol=1e-5, atol=close)
        targets = feed["labels"]
    losses = -np.log((np.exp(rows) / np.exp(rows).sum(1, keepdims=True))[np.arange(4), targets])
    np.testing.assert_allclose(got["loss"], losses.mean(), rtol=1e-5, atol=close)
    if graph.label_tokens is None:
        np.testing.assert_allclose(got["token_losses"], losses, rtol=1e-5, atol=close)
    expected = graph.expected(logits, feed)  # by which `prepare` compares
    assert expected.keys() == got.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=close)


@pytest.mark.parametrize("write", PROJECTIONS)
def test_no_value_has_a_row_of_the_vocabulary_for_each_token(write: Callable[[Model], None], tmp_path: Path) -> None:
    m = Model()
    write(m)
    model = reduced(m, LanguageGraph(causal=True), tmp_path / "m.onnx")
    assert max(sizes(model, {"input_ids": IDS, "positions": np.array([1, 3])})) < BATCH * LENGTH * VOCABULARY
    onnx.save(m.proto(), tmp_path / "m.onnx")  # and the check sees one where it is
    whole = sizes(read_model(tmp_path / "m.onnx"), {"input_ids": IDS, **m.flag})
    assert BATCH * LENGTH * VOCABULARY in whole


def sizes(model: ir.Model, feed: dict[str, Array]) -> list[int]:
    """Return the elements of each value of the vocabulary's width."""
    values = [value for node in model.graph for value in node.outputs if not value.is_graph_output() and value.name]
    model.graph.outputs.extend(values)
    got = run(to_bytes(model), feed | {"targets": feed.get("positions", IDS)})
    return [array.size for array in got.values() if array.ndim > 1 and array.shape[-1] == VOCABULARY]


# ---- what is refused -------------------------------------------------------------------------------------------------


def softmax(m: Model) -> None:
    m.logits(m.op("Softmax", m.op("MatMul", m.hidden(), m.head())))


def by_position(m: Model) -> None:
    added = m.weight("added", matrix("added", LENGTH, VOCABULARY))
    m.logits(m.op("Add", m.op("MatMul", m.hidden(), m.head()), added))


def bilinear(m: Model) -> None:
    hidden = m.hidden()
    m.logits(m.op("MatMul", hidden, m.op("Transpose", hidden, perm=[0, 2, 1])))


def last_only(m: Model) -> None:
    m.scores = ("batch", 1, VOCABULARY)
    last = m.op("Slice", m.hidden(), m.constant([-1]), m.constant([2**40]), m.constant([1]))
    m.logits(m.op("MatMul", last, m.head()))


def of_a_text(m: Model) -> None:
    m.scores = ("batch", VOCABULARY)
    m.logits(m.op("MatMul", m.op("ReduceMean", m.hidden(), m.constant([1]), keepdims=0), m.head()))


def an_input_of_the_name(m: Model) -> None:
    m.inputs = [*m.inputs, ("positions", TensorProto.INT64, ("n",))]
    plain(m)


def embeddings(m: Model) -> None:
    m.inputs = [("inputs_embeds", TensorProto.FLOAT, ("batch", "sequence", HIDDEN))]
    m.logits(m.op("MatMul", "inputs_embeds", m.head()))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (
            softmax,
            r"before 'logits': .*\(Softmax\) is between the two; export the model with a plain",
        ),
        (by_position, r"\(Add\) combines them with a constant of shape \[5, 11\]"),
        (bilinear, r"\(MatMul\) multiplies by a matrix that is computed from the tokens"),
        (last_only, r"'logits' is \[batch, 1, 11\], and a loss needs logits of every token.* without prune_lm_head"),
        (of_a_text, r"'logits' is \[batch, 11\], and a loss needs logits of every token"),
        (an_input_of_the_name, "an input 'positions', as one that is added"),
        (embeddings, r"an input 'input_ids' \[batch, sequence\], this graph has 'inputs_embeds': export"),
    ],
)
def test_what_has_no_loss_by_token_is_refused(write: Callable[[Model], None], reason: str, tmp_path: Path) -> None:
    m = Model()
    write(m)
    with pytest.raises(BundleError, match=reason):
        reduced(m, LanguageGraph(causal=True), tmp_path / "m.onnx")


# ---- caches ----------------------------------------------------------------------------------------------------------


def with_cache(shape: Sequence[int | str], path: Path, dtype: int = TensorProto.FLOAT) -> ir.Graph:
    m = Model()
    m.inputs = [
        ("input_ids", TensorProto.INT64, ("batch", "sequence")),
        ("attention_mask", TensorProto.INT64, ("batch", "past + sequence")),
        ("past_key_values.0.key", dtype, shape),
    ]
    m.op("Shape", "past_key_values.0.key", outputs=["size"])
    m.op("Identity", "attention_mask", outputs=["mask"])
    plain(m)
    proto = m.proto()
    proto.graph.output.append(helper.make_tensor_value_info("size", TensorProto.INT64, (len(shape),)))
    proto.graph.output.append(helper.make_tensor_value_info("mask", TensorProto.INT64, ("batch", "past + sequence")))
    onnx.save(proto, path)
    return read_model(path).graph


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("batch", 2, "past", 4), [3, 2, 0, 4]),
        (("b", 2, "past", 4), [3, 2, 0, 4]),
        (("batch", "past", 2, 4), [3, 0, 2, 4]),
        ((2, "batch", 3, "past", 4), [2, 3, 3, 0, 4]),  # GPT-2 of onnxruntime: keys and values in one
        (("past", "batch", 2, 4), [0, 3, 2, 4]),
    ],
)
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_cache_is_empty_whatever_its_layout(
    shape: Sequence[int | str], expected: list[int], dtype: int, tmp_path: Path
) -> None:
    graph = with_cache(shape, tmp_path / "m.onnx", dtype)
    remove_cache(graph)
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask"]
    assert shape_of(graph.inputs[1]) == ["batch", "sequence"]  # there is no past
    model = to_bytes(ir.Model(graph, ir_version=9))
    assert run(model, {"input_ids": IDS, "attention_mask": np.ones_like(IDS)})["size"].tolist() == expected


@pytest.mark.parametrize("shape", [("batch", "heads", "past", 4), ("batch", 2, 5, 4), ("?", "?", "?", "?")])
def test_a_cache_whose_length_is_not_known_is_refused(shape: Sequence[int | str], tmp_path: Path) -> None:
    graph = with_cache(shape, tmp_path / "m.onnx")
    with pytest.raises(BundleError, match=r"the cache 'past_key_values.0.key' is declared as .*: expected one size"):
        remove_cache(graph)


def test_the_branch_without_a_cache_takes_the_place_of_the_if(tmp_path: Path) -> None:
    """Its names may be those of the other branch, or of the graph; what the other one read alone is unused."""
    branches = {}
    for name, scale in (("then_branch", 2.0), ("else_branch", 3.0)):
        nodes = [
            helper.make_node("Constant", [], ["scale"], value=numpy_helper.from_array(np.array(scale, np.float32))),
            helper.make_node("Mul", ["product", "scale"], ["result"]),
            *([helper.make_node("Add", ["result", "only"], ["out"])] if name == "then_branch" else []),
        ]
        output = "out" if name == "then_branch" else "result"
        value = helper.make_tensor_value_info(output, TensorProto.FLOAT, ("batch", "sequence", VOCABULARY))
        branches[name] = helper.make_graph(nodes, name, [], [value])
    m = Model()
    m.inputs = [*m.inputs, ("use_cache_branch", TensorProto.BOOL, (1,))]
    m.op("MatMul", m.hidden(), m.head(), outputs=["product"])
    m.weight("only", matrix("only", VOCABULARY))
    m.op("If", "use_cache_branch", outputs=["logits"], **branches)
    logits = run(m.proto().SerializeToString(), {"input_ids": IDS, "use_cache_branch": np.array([False])})["logits"]
    graph = LanguageGraph(causal=True)
    model = reduced(m, graph, tmp_path / "m.onnx")
    assert "If" not in {node.op_type for node in model.graph}
    assert "only" not in model.graph.initializers
    feed = {"positions": np.array([2, 7]), "targets": np.array([1, 6])}
    got = run(to_bytes(model), {"input_ids": IDS, **feed})
    np.testing.assert_allclose(got["token_losses"], graph.expected(logits, feed)["token_losses"], rtol=1e-5)


# ---- the batch of the comparison -------------------------------------------------------------------------------------


def test_real_tokens_that_are_followed_by_one_are_compared() -> None:
    ids = np.array([[5, 6, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]])
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    feed = LanguageGraph(causal=True).feed({"input_ids": ids, "attention_mask": mask})
    assert feed["positions"].tolist() == [0, 1, 8, 9, 10]
    assert feed["targets"].tolist() == [6, 7, 2, 3, 4]
    words = LanguageGraph(causal=True, label_tokens=(1, 2)).feed({"input_ids": ids, "attention_mask": mask})
    assert words["positions"].tolist() == [2, 4, 11]
    with pytest.raises(BundleError, match="no row of the batch has two tokens"):
        LanguageGraph(causal=True).feed({"input_ids": ids[:, :1]})


def test_a_batch_with_past_tokens_is_refused() -> None:
    batch: dict[str, Array] = {"input_ids": IDS, "past_key_values.0.key": np.zeros((BATCH, 2, 3, 4), np.float32)}
    with pytest.raises(BundleError, match=r"past tokens, 'past_key_values.0.key' \[3, 2, 3, 4\].* caches of length 0"):
        LanguageGraph(causal=True).feed(batch)


def test_layers_share_an_empty_cache(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.onnx", llama_weights(kv_heads=2), 2)
    model = read_model(path)
    remove_cache(model.graph)
    assert [node.op_type for node in model.graph].count("ConstantOfShape") == 1
