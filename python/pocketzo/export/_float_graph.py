"""The float32 graph of a decoder of transformers, with a cache."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from mobius import build
from transformers import DynamicCache

_TRACED: Final = {"gemma2", "gemma3_text"}  # mobius 0.1's graphs are off, by 0.6 and 0.3 of the largest logit


def write_float_graph(model: Any, folder: Path, target: Path) -> None:
    """Write the graph of a model, whose checkpoint is in `folder`, to a file with external data beside it."""
    if model.config.model_type in _TRACED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a dozen, about torch itself and the names of axes
            _trace(model, target)
        return
    graph = build(str(folder), dtype="f32")["model"]
    ir.save(graph, target, external_data=f"{target.name}.data")


class _WithCache(torch.nn.Module):  # type: ignore[misc]  # torch may be missing
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        found = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return (found.logits, *(part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)))


def _trace(model: Any, target: Path) -> None:
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    past = [tuple(torch.zeros(2, heads, 3, config.head_dim) for _ in range(2)) for _ in range(layers)]
    names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    torch.onnx.export(
        _WithCache(model).eval(),
        (
            torch.ones(2, 4, dtype=torch.int64),
            torch.ones(2, 7, dtype=torch.int64),
            torch.arange(3, 7).repeat(2, 1),
            past,
        ),
        target,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=(
            {0: "batch", 1: "sequence"},
            {0: "batch", 1: "total"},
            {0: "batch", 1: "sequence"},
            [({0: "batch", 2: "past"}, {0: "batch", 2: "past"})] * layers,
        ),
        dynamo=True,
        external_data=True,
        verbose=False,
    )
