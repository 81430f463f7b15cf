"""The graph of every family of decoders: against transformers, and through preparing, training and generating."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf_files as files
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
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


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    model = files.model_of(LlamaConfig(**COMMON, rope_parameters=rope(10000.0, "dynamic", factor=2.0)))
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(Error, match=r"checkpoint: torch cannot export LlamaForCausalLM: .*data-dependent") as caught:
        write_float_graph(model, tmp_path / "checkpoint", tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()
