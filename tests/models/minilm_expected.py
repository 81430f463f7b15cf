"""Write minilm_expected.npz, what tests/test_bert.py compares with: embeddings by transformers' BertModel.

Written once with Python 3.11.7, torch 2.13.0 (CPU), transformers 5.23.0, numpy 2.4.6, safetensors 0.8.0 and tokenizers
0.23.3, in an environment that has them, from a folder with all-MiniLM-L6-v2 (SHA-256 53aa5117...):

    python tests/models/minilm_expected.py FOLDER

Two models: `minilm`, the pretrained one, on six sentences written for this test; `tiny`, one small enough to carry its
random weights along (`tiny/weights/...`), so that the graph is checked where the pretrained one is absent.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

SENTENCES = (
    "Dinner at eight?",
    "Could you pick up some oat milk and a loaf of bread on the way home, please?",
    "RUNNING LATE, start without me!!",
    "Happy 40th, you old goat",
    "The plumber cannot come before Thursday because the boiler part is still stuck somewhere in a warehouse.",
    "ok",
)


def embed(model: BertModel, tokens: dict[str, Ids]) -> Floats:
    with torch.no_grad():
        hidden = model(**{name: torch.from_numpy(array) for name, array in tokens.items()}).last_hidden_state
    mask = torch.from_numpy(tokens["attention_mask"])[..., None].to(hidden.dtype)
    pooled: Floats = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return pooled


def padded(rows: list[list[int]]) -> tuple[Ids, Ids]:
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def main(folder: Path) -> None:
    arrays: dict[str, Any] = {}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids, mask = padded([tokenizer.encode(sentence).ids for sentence in SENTENCES])
    minilm = BertModel.from_pretrained(folder).eval()
    cases = {"minilm": (minilm, ids, mask, np.zeros_like(ids))}

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.3,
        layer_norm_eps=1e-3,
    )
    tiny = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():  # biases and normalisations that are not 0 and 1, so that leaving one out shows
        for parameter in tiny.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    random = np.random.default_rng(0)
    ids, mask = padded([random.integers(1, 40, length).tolist() for length in (12, 1, 7)])
    cases["tiny"] = (tiny, ids, mask, random.integers(0, 2, ids.shape))
    arrays |= {f"tiny/weights/{name}": value.numpy() for name, value in tiny.state_dict().items()}

    for name, (model, ids, mask, types) in cases.items():
        tokens = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        arrays |= {f"{name}/{key}": value for key, value in tokens.items()}
        arrays[f"{name}/embedding"] = embed(model, tokens)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
