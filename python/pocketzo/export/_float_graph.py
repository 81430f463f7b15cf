"""The float32 graph of a decoder of transformers, with a cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from mobius import build
from transformers import DynamicCache

from pocketzo.export._trace import trace
from pocketzo.graph.stored import store

_BUILT: Final = {"gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3"}
"""Types of which mobius 0.1 builds the right graph, in seconds where tracing takes minutes.

Its graphs of Gemma-2, Gemma-3 and OPT are off by 0.6, 0.3 and 0.003 of the largest logit. Its Gemma adds 1 to the
weights of a norm, a sum that onnxruntime folds, so that they could not be trained.
"""
_ROPES: Final = {
    "default",
    "llama3",
}  # of others it stores sines and cosines of all positions, scaled: 52 MB for Phi-3.5
_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")


def write_float_graph(model: Any, target: Path) -> None:
    """Write the graph of a decoder.

    Inputs, int64: ``input_ids`` and ``position_ids`` ``[batch, sequence]``, ``attention_mask``
    ``[batch, past + sequence]``; float32 ``[batch, heads, past, size]``: ``past_key_values.{i}.key`` and ``.value``.
    Outputs, float32: ``logits`` ``[batch, sequence, vocabulary]``, ``present.{i}.key`` and ``.value``.

    Parameters
    ----------
    model : PreTrainedModel
        A model for causal language modelling with float32 weights, in evaluation mode.
    target : Path
        The file to write; the weights are written to a file of this name and ``.data``.

    Raises
    ------
    Error
        If torch cannot trace the model, as with rotary frequencies of the type ``dynamic``.

    Notes
    -----
    Phi-3's long rotary factors are used for all tokens of a run whose last position is beyond the original length, as
    in transformers. Keys in the cache keep the factors that they were computed with, where transformers' ``generate``
    computes them again.
    """
    with tempfile.TemporaryDirectory(prefix=".graph-", dir=target.parent) as name:
        written = Path(name, target.name)
        if _is_built(model.config):
            model.save_pretrained(name)
            graph = build(name, dtype="f32")["model"]
        else:
            graph = _traced(model)
        ir.save(graph, written, external_data=f"{written.name}.data")
        store(written, target)


def _is_built(config: Any) -> bool:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(config, "sliding_window", None)  # mobius leaves it out
    return config.model_type in _BUILT and window is None and rope in _ROPES


class _WithCache(torch.nn.Module):  # type: ignore[misc]  # torch may be missing
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        cache = DynamicCache()  # without the configuration, so that layers with a window keep all tokens
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        found = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return (found.logits, *(part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)))


def _traced(model: Any) -> ir.Model:
    with torch.no_grad():
        cache = model(torch.zeros(2, 3, dtype=torch.int64), use_cache=True).past_key_values
    past = [(layer.keys, layer.values) for layer in cache.layers]
    shape = {0: "batch", 2: "past"}
    names = [f"{layer}.{part}" for layer in range(len(past)) for part in ("key", "value")]
    ids, mask = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    graph: ir.Model = trace(
        _WithCache(model).eval(),
        type(model).__name__,
        [ids, mask, torch.arange(3, 7).repeat(2, 1), past],
        input_names=[*_INPUTS, *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=(
            {0: "batch", 1: "sequence"},
            {0: "batch", 1: "total"},
            {0: "batch", 1: "sequence"},
            [(shape, shape)] * len(past),
        ),
    ).model
    return graph
