"""Backpropagation beside `pocketzo demo`: AdamW over all of all-MiniLM-L6-v2, on the demo's messages.

    python bench/messages.py [--epochs 5] [--seeds 1] [--json FILE]

A new linear head on the mean over the tokens, all weights trained by torch in float32, batches of 32, linear decay
after a tenth of the steps. The learning rate is chosen by accuracy on a fifth of the training messages, each class
divided equally; the held-out messages are looked at once, with the one that was chosen. The lopsided messages are those
of the demo, and take the same learning rate.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from machine import machine, write
from transformers import BertConfig, BertModel

from pocketzo.demo import minilm
from pocketzo.demo.head import lopsided
from pocketzo.demo.run import LABELS, messages
from pocketzo.tasks.metrics import METRICS

RATES = (1e-4, 3e-4)
BATCH = 32
if TYPE_CHECKING:
    from tokenizers import Tokenizer

Examples = tuple[list[list[int]], np.ndarray]


def read(path: Path, tokenizer: Tokenizer) -> Examples:
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [tokenizer.encode(text).ids for text, _ in lines], np.array([LABELS.index(label) for _, label in lines])


def taken(examples: Examples, rows: np.ndarray) -> Examples:
    return [examples[0][row] for row in rows], examples[1][rows]


class Classifier(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        config = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
        self.body = BertModel(config, add_pooling_layer=False)
        self.body.load_state_dict({name: one for name, one in weights.items() if not name.startswith("pooler.")}, False)
        self.head = torch.nn.Linear(384, len(LABELS))
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, ids: list[list[int]]) -> torch.Tensor:
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in ids], batch_first=True)
        hidden = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def trained(train: Examples, test: Examples, rate: float, epochs: int, seed: int, checkpoint: Path) -> dict[str, float]:
    """Train, and return the metrics on other examples."""
    from safetensors.torch import load_file

    torch.manual_seed(seed)
    model = Classifier(load_file(checkpoint))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(train[1]) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    random = np.random.default_rng(seed)
    began, used = time.perf_counter(), time.process_time()
    for _ in range(epochs):
        model.train()
        order = random.permutation(len(train[1]))
        for start in range(0, len(order), BATCH):
            ids, labels = taken(train, order[start : start + BATCH])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(ids), torch.tensor(labels)).backward()
            optimizer.step()
            schedule.step()
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    model.eval()
    with torch.no_grad():
        parts = [model(test[0][start : start + BATCH]) for start in range(0, len(test[0]), BATCH)]
    guesses = torch.cat(parts).argmax(1).numpy()
    found = {name: METRICS[name].function(guesses, test[1]) for name in ("accuracy", "f1")}
    return found | {"seconds": seconds, "cpu_seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    from tokenizers import Tokenizer

    files = minilm.find_checkpoint(arguments.checkpoint)
    tokenizer = Tokenizer.from_file(str(files.tokenizer))
    tokenizer.no_padding()
    tokenizer.enable_truncation(64)
    with tempfile.TemporaryDirectory() as folder:
        train, test, few, few_test = (
            read(path, tokenizer)
            for path in (
                *(messages(part) for part in ("train", "test")),
                *(lopsided(messages(part), Path(folder) / part) for part in ("train", "test")),
            )
        )
    by_class = np.argsort(train[1], kind="stable")
    inner, outer = by_class[np.arange(len(by_class)) % 5 != 0], by_class[::5]
    tried = {}
    for rate in RATES:
        tried[rate] = trained(taken(train, inner), taken(train, outer), rate, arguments.epochs, 0, files.weights)
        print(f"lr {rate:g}: accuracy on a fifth of the training messages {tried[rate]['accuracy']:.1%}", flush=True)
    best = max(tried, key=lambda rate: tried[rate]["accuracy"])
    rows = []
    for seed in range(arguments.seeds):
        found: dict[str, Any] = {
            "seed": seed,
            "messages": trained(train, test, best, arguments.epochs, seed, files.weights),
            "lopsided": trained(few, few_test, best, arguments.epochs, seed, files.weights),
        }
        rows.append(found)
        print(
            f"seed {seed}, lr {best:g}: accuracy {found['messages']['accuracy']:.1%}, lopsided macro-F1 "
            f"{found['lopsided']['f1']:.4f}, {found['messages']['cpu_seconds']:.0f} s of CPU time",
            flush=True,
        )
    write(arguments.json, {"rows": rows, "rate": best, "epochs": arguments.epochs})


if __name__ == "__main__":
    main()
