"""The peers in PyTorch, on the models of models.py: MeZO as its paper's code does it, and AdamW by backpropagation.

Weights are those of a bundle; dense ones are stored as torch stores them, [out, in]. The forward runs eagerly, with
torch's own fused attention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from models import MASKED, OPT_OFFSET, Shape
from numpy.typing import NDArray

Tensors = dict[str, Any]


def read_weights(torch: Any, bundle: Path) -> Tensors:
    """Read a bundle's weights, one tensor at a time; dense ones are transposed."""
    path = bundle / "weights.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    result = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            continue  # padding
        start, stop = entry["data_offsets"]
        array = np.fromfile(path, np.float32, (stop - start) // 4, offset=8 + length + start).reshape(entry["shape"])
        dense = array.ndim == 2 and "embed" not in name
        result[name] = torch.from_numpy(np.ascontiguousarray(array.T) if dense else array)
    return result


class Model:
    """A model of models.py; ``weights`` are its tensors by name."""

    def __init__(self, torch: Any, bundle: Path, shape: Shape) -> None:
        self.torch = torch
        self.layers, self.heads, self.causal = shape.layers, shape.heads, shape.causal
        self.weights = read_weights(torch, bundle)

    def loss(self, batch: Mapping[str, NDArray[np.int64]]) -> float:
        """Return the mean cross-entropy of a batch's labels."""
        with self.torch.no_grad():
            return float(self._loss(batch))

    def logits(self, batch: Mapping[str, NDArray[np.int64]]) -> Any:
        with self.torch.no_grad():
            return self._logits(batch)

    def _loss(self, batch: Mapping[str, NDArray[np.int64]]) -> Any:
        labels = self.torch.from_numpy(batch["labels"])
        logits = self._logits(batch)
        return self.torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))

    def _logits(self, batch: Mapping[str, NDArray[np.int64]]) -> Any:
        ids, mask = (self.torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask"))
        return self._decoder(ids, mask) if self.causal else self._encoder(ids, mask, batch["token_type_ids"])

    def _dense(self, x: Any, name: str) -> Any:
        return self.torch.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Any, name: str) -> Any:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5 if self.causal else 1e-12)

    def _attention(self, x: Any, mask: Any, query: str, key: str, value: str) -> Any:
        batch, tokens, hidden = x.shape
        q, k, v = (
            self._dense(x, name).view(batch, tokens, self.heads, hidden // self.heads).transpose(1, 2)
            for name in (query, key, value)
        )
        mixed = self.torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(batch, tokens, hidden)

    def _encoder(self, ids: Any, mask: Any, types: NDArray[np.int64]) -> Any:
        functional, weights = self.torch.nn.functional, self.weights
        x = functional.embedding(ids, weights["embeddings.word_embeddings.weight"])
        x = x + functional.embedding(self.torch.from_numpy(types), weights["embeddings.token_type_embeddings.weight"])
        x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self._norm(x, "embeddings.LayerNorm")
        real = mask.to(x.dtype)
        bias = ((1 - real) * MASKED)[:, None, None, :]
        for n in range(self.layers):
            layer = f"encoder.layer.{n}"
            names = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
            mixed = self._dense(self._attention(x, bias, *names), f"{layer}.attention.output.dense")
            x = self._norm(mixed + x, f"{layer}.attention.output.LayerNorm")
            inner = functional.gelu(self._dense(x, f"{layer}.intermediate.dense"))
            x = self._norm(self._dense(inner, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
        pooled = (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
        return self._dense(pooled, "classifier")

    def _decoder(self, ids: Any, mask: Any) -> Any:
        torch, functional = self.torch, self.torch.nn.functional
        tokens = ids.shape[1]
        places = torch.arange(tokens)
        x = functional.embedding(ids, self.weights["embed_tokens.weight"])
        x = x + self.weights["embed_positions.weight"][places + OPT_OFFSET]
        later = (places[None, :] > places[:, None]).to(x.dtype)
        bias = torch.maximum(later[None, None], (1 - mask.to(x.dtype))[:, None, None, :]) * MASKED
        for n in range(self.layers):
            layer = f"layers.{n}"
            names = [f"{layer}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
            mixed = self._attention(self._norm(x, f"{layer}.self_attn_layer_norm"), bias, *names)
            x = x + self._dense(mixed, f"{layer}.self_attn.out_proj")
            inner = functional.relu(self._dense(self._norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1"))
            x = x + self._dense(inner, f"{layer}.fc2")
        return functional.linear(self._norm(x, "final_layer_norm"), self.weights["embed_tokens.weight"])


class MeZO(Model):
    """MeZO (arXiv 2305.17333) as its paper's code does it.

    A step is four passes over the weights: +eps, -2 eps, +eps and the update. Each pass seeds torch's generator with
    the step's seed, draws every z with torch.normal, and replaces each weight by a new tensor.

    Parameters
    ----------
    lr, eps : float
    groups : dict of str to float
        Factors of lr and eps for the weights whose names start with the key.
    seed : int
        Seed of the generator that draws the seeds of the steps.
    """

    def __init__(
        self,
        torch: Any,
        bundle: Path,
        shape: Shape,
        *,
        lr: float,
        eps: float = 1e-3,
        groups: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(torch, bundle, shape)
        self.lr, self.eps = lr, eps
        self.factors = {
            name: factor for start, factor in (groups or {}).items() for name in self.weights if name.startswith(start)
        }
        self.random = np.random.default_rng(seed)

    def step(self, batch: Mapping[str, NDArray[np.int64]]) -> float:
        """Take one step; return the mean of its two losses."""
        seed = int(self.random.integers(1_000_000_000))
        self._add(seed, self.eps)
        above = self.loss(batch)
        self._add(seed, -2 * self.eps)
        below = self.loss(batch)
        self._add(seed, self.eps)
        self._add(seed, -self.lr, (above - below) / (2 * self.eps))
        return (above + below) / 2

    def _add(self, seed: int, scale: float, gradient: float | None = None) -> None:
        torch = self.torch
        torch.manual_seed(seed)
        for name, weight in self.weights.items():
            z = torch.normal(mean=0, std=1, size=weight.size(), dtype=weight.dtype)
            factor = scale * self.factors.get(name, 1)
            self.weights[name] = weight + (factor * z if gradient is None else factor * (gradient * z))


class AdamW(Model):
    """AdamW by backpropagation, with torch's default settings; gradients are freed before the next forward."""

    def __init__(self, torch: Any, bundle: Path, shape: Shape, *, lr: float) -> None:
        super().__init__(torch, bundle, shape)
        for weight in self.weights.values():
            weight.requires_grad_()
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=lr)

    def step(self, batch: Mapping[str, NDArray[np.int64]]) -> float:
        """Take one step; return its loss."""
        self.optimizer.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())
