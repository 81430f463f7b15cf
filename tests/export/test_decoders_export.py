"""The graph of every family of decoders: against transformers, and through preparing, training and generating."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import gguf_files as files
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_decoders import COMMON, CONTEXT, FAMILIES, VOCABULARY, WINDOW, rope
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import pocketzo as pz
from pocketzo import Error
from pocketzo.export import export as export_model
from pocketzo.export._agreement import difference
from pocketzo.export._float_graph import write_float_graph
from pocketzo.graph.blocks import Scheme
from pocketzo.graph.matrices import Matrices
from pocketzo.graph.nbits import quantise
from pocketzo.graph.stored import store
from pocketzo.runtime.embeddings import context_length

Array = npt.NDArray[Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")


@dataclass(frozen=True)
class Exported:
    model: Any
    path: Path

    @cached_property
    def bundle(self) -> pz.Bundle:
        return pz.prepare(self.path, self.path.parent / "base", task="causal-lm")


def export(name: str, folder: Path) -> Exported:
    model = files.model_of(FAMILIES[name]())
    model.save_pretrained(folder / "checkpoint")
    tokenizer = Tokenizer(WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "checkpoint")
    export_model(folder / "checkpoint", folder / "m.onnx")
    return Exported(model, folder / "m.onnx")


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(request.param, tmp_path_factory.mktemp(request.param))


def expected(model: Any, ids: Array, mask: Array) -> Array:
    with torch.no_grad():
        logits: Array = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    return logits


class Graph:
    """A graph in onnxruntime, optimised as for its users."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.past = [value for value in inputs if value.name.startswith("past_key_values.")]
        assert {value.name for value in inputs} - {value.name for value in self.past} == {
            "input_ids",
            "attention_mask",
            "position_ids",
        }

    def run(self, ids: Array, mask: Array, cache: list[Array] | None = None) -> tuple[Array, list[Array]]:
        if cache is None:
            cache = [np.empty((len(ids), value.shape[1], 0, value.shape[3]), np.float32) for value in self.past]
        before = cache[0].shape[2]
        feed = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": np.tile(np.arange(before, before + ids.shape[1]), (len(ids), 1)),
        }
        names = [value.name for value in self.past]
        presents = [name.replace("past_key_values", "present") for name in names]
        logits, *cache = self.session.run(["logits", *presents], feed | dict(zip(names, cache, strict=True)))
        return logits, cache


def test_logits_are_those_of_transformers(exported: Exported) -> None:
    """With three rows of 20 tokens, past the window; two are padded on the right. Tracing saw two of 4."""
    graph, rng = Graph(exported.path), np.random.default_rng(3)
    ids = rng.integers(0, VOCABULARY, (3, 20))
    lengths = np.array([[20], [9], [1]])
    mask = (np.arange(20) < lengths).astype(np.int64)
    wanted = expected(exported.model, ids, mask)
    largest = np.abs(wanted[mask > 0]).max()
    found, _ = graph.run(ids, mask)
    assert np.abs(found - wanted)[mask > 0].max() <= 1e-4 * largest

    warm, unpadded = [], np.ones_like(mask)
    part, cache = graph.run(ids[:, :7], unpadded[:, :7])
    warm.append(part)
    for at in range(7, 20):
        part, cache = graph.run(ids[:, at : at + 1], unpadded[:, : at + 1], cache)
        warm.append(part)
    wanted = expected(exported.model, ids, unpadded)
    if exported.model.config.model_type == "phi3" and exported.model.config.rope_parameters["rope_type"] != "default":
        warm, wanted = warm[:10], wanted[:, :16]  # the keys of the short factors stay in the cache
    joined = np.concatenate(warm, axis=1)
    assert np.abs(joined - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_difference_is_small_and_sees_a_change(exported: Exported) -> None:
    assert difference(exported.model, exported.path) <= 1e-5
    parameter = next(parameter for parameter in exported.model.parameters() if parameter.ndim == 2)
    with torch.no_grad():
        parameter *= 1.01
    try:
        assert difference(exported.model, exported.path) > 1e-4
    finally:
        with torch.no_grad():
            parameter /= 1.01


def test_all_parameters_are_trainable(exported: Exported) -> None:
    trainable = sum(int(np.prod(tensor.shape)) for tensor in exported.bundle.tensors if tensor.sets)
    assert trainable == sum(parameter.numel() for parameter in exported.model.parameters())
    frozen = [tensor for tensor in exported.bundle.frozen if not tensor.reason.startswith("buffer")]
    assert all(tensor.elements == 1 for tensor in frozen), "an epsilon or a scale is one number"


def batch_of(texts: list[list[int]], width: int) -> dict[str, Array]:
    ids = np.array([text + [0] * (width - len(text)) for text in texts])
    mask = np.array([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    rows, columns = np.nonzero(mask[:, 1:])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(width), (len(texts), 1)),
        "positions": rows * width + columns,
        "targets": ids[rows, columns + 1],
    }


def test_a_loss_is_the_same_alone_and_in_any_padded_batch(exported: Exported) -> None:
    rng = np.random.default_rng(4)
    texts = [rng.integers(0, VOCABULARY, length).tolist() for length in (2, 15, 7, 11)]
    model = pz.load(exported.bundle)
    together = model.run(batch_of(texts, 16))["token_losses"]
    alone = np.concatenate([model.run(batch_of([text], len(text)))["token_losses"] for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    pair = model.run(batch_of(texts[:2], 15))["token_losses"]
    np.testing.assert_allclose(pair, alone[: len(pair)], rtol=1e-5, atol=1e-5)


def test_three_steps(exported: Exported) -> None:
    model = pz.load(exported.bundle)
    batch = batch_of(np.random.default_rng(6).integers(0, VOCABULARY, (4, 12)).tolist(), 12)
    before = float(model.run(batch)["loss"])
    optimizer = pz.MeZO(model, lr=1e-4, eps=1e-3, seed=2)
    for _ in range(3):
        info = optimizer.step(lambda model: float(model.run(batch)["loss"]))
        assert np.isfinite(info.loss)
    assert float(model.run(batch)["loss"]) != before


def test_greedy_text_is_that_of_transformers(exported: Exported) -> None:
    prompt = np.random.default_rng(7).integers(0, VOCABULARY, 5).tolist()
    stream = pz.load(exported.bundle).stream(prompt, max_tokens=WINDOW + 3)
    for _ in stream:
        pass
    config = GenerationConfig(max_new_tokens=WINDOW + 3, do_sample=False, pad_token_id=0, use_cache=True)
    with torch.no_grad():
        wanted = exported.model.generate(torch.tensor([prompt]), generation_config=config)
    assert stream.tokens == wanted[0, 5:].tolist()
    assert stream.stop == "length"


def test_the_context_is_known_where_there_is_a_table_of_positions(exported: Exported) -> None:
    found = context_length(exported.bundle, exported.bundle.generate_path)
    learned = exported.model.config.model_type in ("opt", "gpt2")
    assert found == CONTEXT or (found is None and not learned)


def test_a_table_that_is_read_and_multiplied_is_written_once(exported: Exported) -> None:
    largest = sum(parameter.numel() for parameter in exported.model.parameters()) + 2 * CONTEXT * 16  # sines, cosines
    assert exported.path.with_name("m.onnx.data").stat().st_size <= 4 * largest + 64 * len(exported.bundle.tensors)


def test_a_graph_in_float16(exported: Exported, tmp_path: Path) -> None:
    """1.7e-3 is the largest difference that was seen."""
    store(exported.path, tmp_path / "m.onnx", "float16")
    assert 1e-5 < difference(exported.model, tmp_path / "m.onnx") <= 5e-3
    bundle = pz.prepare(tmp_path / "m.onnx", tmp_path / "base", task="causal-lm")
    trainable = [tensor for tensor in bundle.tensors if tensor.sets]
    assert {tensor.dtype for tensor in trainable} == {"float16"}
    names = {tensor.name for tensor in exported.bundle.tensors if tensor.sets}
    assert {tensor.name for tensor in trainable} == names


def rounded(model: Any, kind: str) -> Any:
    """Return a copy with the numbers that a quantised graph has: all matrices but positions, along a row's inputs."""
    copied, chosen = copy.deepcopy(model), gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if parameter.ndim == 2 and "wpe" not in name and "embed_positions" not in name:
                inward = copied.config.model_type == "gpt2" and ".c_" in name  # stored as [in, out]
                rows = (parameter.T if inward else parameter).contiguous().numpy()
                blocks = gguf.quants.dequantize(gguf.quants.quantize(rows, chosen), chosen)
                parameter.copy_(torch.from_numpy(blocks.T if inward else blocks))
    return copied


@pytest.mark.parametrize(("dtype", "kind", "planes"), [("int4", "Q4_0", 1), ("int8", "Q8_0", 2)])
def test_a_quantised_graph(exported: Exported, dtype: Any, kind: str, planes: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    summary = quantise(exported.path, path, Matrices(Scheme.parse(dtype)))
    model = rounded(exported.model, kind)
    assert difference(model, path) <= 5e-5
    pairs = zip(exported.model.parameters(), model.parameters(), strict=True)
    changed = [(one.detach(), other.detach()) for one, other in pairs if not torch.equal(one, other)]
    errors = sum(float((one - other).square().sum()) for one, other in changed)
    squares = sum(float(one.square().sum()) for one, _ in changed)
    assert summary.error == pytest.approx((errors / squares) ** 0.5, rel=1e-4)
    assert (summary.kind, summary.exact, summary.floats) == (kind, {}, {})

    graph = onnx.load(path, load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    tied = exported.model.config.tie_word_embeddings
    assert operators["GatherBlockQuantized"] == planes
    assert operators["MatMulNBits"] == planes * (len(summary.requantised) - 1 + tied)
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm")
    trainable = [tensor for tensor in bundle.tensors if tensor.sets]
    vectors = [parameter for parameter in exported.model.parameters() if parameter.ndim == 1]
    positions = [each for each in trainable if len(each.shape) == 2]
    assert sum(int(np.prod(each.shape)) for each in trainable) == sum(each.numel() for each in vectors) + sum(
        int(np.prod(each.shape)) for each in positions
    )
    assert len(positions) == (exported.model.config.model_type in ("opt", "gpt2"))
    model_alone = pz.load(bundle)
    texts = [[3, 1, 4, 1, 5, 9], [2, 6, 5]]
    together = model_alone.run(batch_of(texts, 8))["token_losses"]
    alone = [model_alone.run(batch_of([text], len(text)))["token_losses"] for text in texts]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-5)


def test_what_is_not_quantised(tmp_path: Path) -> None:
    """A head of few classes, and a table whose rows are no whole blocks; a matrix of such rows is."""
    rng = np.random.default_rng(1)
    shapes = {"table": (50, 40), "dense": (40, 32), "head": (32, 31)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "dense"], ["y"]),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 31])
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "few", [ids], [logits], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    summary = quantise(tmp_path / "m.onnx", tmp_path / "q.onnx", Matrices(Scheme(8)))
    assert (summary.requantised, summary.floats) == ({"dense": "F32"}, {"table": "F32"})
    assert summary.lines()[1] == "embedding tables in float32: 1 of F32"
    tokens = rng.integers(0, 50, (2, 5))
    found = ort.InferenceSession(tmp_path / "q.onnx").run(None, {"input_ids": tokens})[0]
    wanted = arrays["table"][tokens] @ arrays["dense"] @ arrays["head"]
    assert 1e-5 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.02


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    model = files.model_of(LlamaConfig(**COMMON, rope_parameters=rope(10000.0, "dynamic", factor=2.0)))
    with pytest.raises(Error, match=r"torch cannot export LlamaForCausalLM: .*data-dependent") as caught:
        write_float_graph(model, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()
