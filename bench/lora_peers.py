"""AdamW by backpropagation on a bundle's LoRA, in torch: SmolLM2 from its GGUF file, dequantised.

What comes before the first trained layer runs once for each example, so that an epoch costs the layers behind it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

import pocketzo as pz
from pocketzo.export.gguf import open_gguf

ROLES = {"attn_q": "q_proj", "attn_v": "v_proj"}


def with_lora(torch: Any, linear: Any, down: Any, scale: float) -> Any:
    """Return the projection with LoRA: y + scale x A B."""

    class Lora(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.down = linear, torch.from_numpy(down)
            self.up = torch.nn.Parameter(torch.zeros(down.shape[1], linear.out_features))

        def forward(self, x: Any) -> Any:
            return self.linear(x) + scale * (x @ self.down) @ self.up

    return Lora()


def add_lora(torch: Any, model: Any, bundle: pz.Bundle) -> dict[str, Any]:
    """Put the bundle's LoRA on a model's projections; return the matrices B by their names in the bundle."""
    model.requires_grad_(False)
    alphas = {name: spec.alpha for spec in bundle.added for name in spec.tensors}
    ups = {}
    for name, down in bundle.map_tensors().items():
        if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.lora_A", name):
            attention, role = model.model.layers[int(found[1])].self_attn, ROLES[found[2]]
            lora = with_lora(torch, getattr(attention, role), np.array(down), (alphas[name] or 0.0) / down.shape[1])
            setattr(attention, role, lora)
            ups[name.replace("lora_A", "lora_B")] = lora.up
    return ups


class PromptLora:
    """SmolLM2 behind a prompt with two or more label words, as a bundle of the task prompt with a set lora has it.

    Parameters
    ----------
    torch : module
    bundle : pocketzo.Bundle
    gguf : path
        The file that the bundle was exported from.
    """

    def __init__(self, torch: Any, bundle: pz.Bundle, gguf: Path) -> None:
        self.torch = torch
        whole = open_gguf(gguf).model
        self.ups = add_lora(torch, whole, bundle)
        self.first = min(int(name.split(".")[1]) for name in self.ups)
        self.model = whole.model
        self.layers, self.norm = self.model.layers, self.model.norm
        assert bundle.task is not None
        words = bundle.task.settings["label_tokens"]
        self.output = whole.lm_head.weight[words].detach()  # [labels, hidden]

    def states(self, data: pz.Dataset, size: int = 32) -> list[Any]:
        """Return the hidden states of each example before the first trained layer, [tokens, hidden]."""
        found: list[Any] = [None] * len(data)
        assert data.lengths is not None
        self.model.layers, self.model.norm = self.layers[: self.first], self.torch.nn.Identity()
        with self.torch.inference_mode():
            for rows in np.array_split(np.argsort(data.lengths), -(-len(data) // size)):
                batch = data.batch(rows)
                mask = self.torch.from_numpy(batch["attention_mask"])
                hidden = self.model(
                    input_ids=self.torch.from_numpy(batch["input_ids"]), attention_mask=mask, use_cache=False
                ).last_hidden_state
                for row, one, length in zip(rows.tolist(), hidden, mask.sum(1).tolist(), strict=True):
                    found[row] = one[:length].clone()
        self.model.layers, self.model.norm = self.layers[self.first :], self.norm
        return found

    def logits(self, states: list[Any]) -> Any:
        """Return the label words' logits after the last token of each example, [examples, labels]."""
        torch = self.torch
        lengths = torch.tensor([len(one) for one in states])
        padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        hidden = self.model(inputs_embeds=padded, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(states)), lengths - 1] @ self.output.T

    def train(self, states: list[Any], labels: Any, *, lr: float, epochs: int, batch_size: int, seed: int) -> float:
        """Train B from 0, the rate falling linearly to 0, and return the mean loss of the last epoch."""
        torch = self.torch
        with torch.no_grad():
            for up in self.ups.values():
                up.zero_()
        optimizer = torch.optim.AdamW(self.ups.values(), lr=lr, weight_decay=0.0)
        random = np.random.default_rng(seed)
        count = len(states) // batch_size
        losses: list[float] = []
        for epoch in range(epochs):
            losses = []
            for number, rows in enumerate(np.array_split(random.permutation(len(states)), count)):
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - (epoch * count + number) / (epochs * count))
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(self.logits([states[row] for row in rows]), labels[rows])
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return float(np.mean(losses))

    def evaluate(self, states: list[Any], labels: Any, size: int = 32) -> tuple[float, float]:
        """Return accuracy and mean loss."""
        with self.torch.inference_mode():
            logits = self.torch.cat([self.logits(states[at : at + size]) for at in range(0, len(states), size)])
            loss = self.torch.nn.functional.cross_entropy(logits, labels)
            return float((logits.argmax(1) == labels).float().mean()), float(loss)
