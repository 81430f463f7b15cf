"""PocketLLM's two models as a user gets them: exported from a checkpoint, prompted, and trained by MeZO.

    python bench/paper.py [--models DIR] [--shapes roberta-large ...] [--json FILE]

A random checkpoint of transformers' own class becomes ONNX by `pocketzo export`, and a bundle by `prepare --task
prompt`: RobertaForMaskedLM with the word at the mask, OPTForCausalLM with the word after the text. A step trains all
parameters on 8 x 64 tokens. Each system runs in a process of its own, as in step.py.

    forwards    two forwards of the bundle's graph by onnxruntime with its default settings
    default     a MeZO step of PocketZO
    torch       a MeZO step in PyTorch, on the checkpoint in transformers, as the code of MeZO's paper does it

Needs the extra 'export'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from machine import Run
from step import LR, System, measure, models_folder, usable, worker
from step import start as start_ours
from tables import paper_table

T = TypeVar("T")
SYSTEMS = ("forwards", "default", "torch")
SHAPES = ("roberta-large", "opt-1.3b")
BATCH = "8x64"
WORDS = ("terrible", "great")
CHECKPOINT = "checkpoint"  # a folder in the bundle's own


def config_of(shape: str) -> Any:
    """Return the published configuration."""
    from transformers import OPTConfig, RobertaConfig

    if shape == "roberta-large":
        return RobertaConfig(
            vocab_size=50265,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            architectures=["RobertaForMaskedLM"],
        )
    return OPTConfig(
        vocab_size=50272,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        ffn_dim=8192,
        word_embed_proj_dim=2048,
        max_position_embeddings=2048,
        architectures=["OPTForCausalLM"],
    )


def write_checkpoint(shape: str, folder: Path) -> None:
    """Save a model with random weights, and a tokenizer of words of the model's size."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = config_of(shape)
    model = getattr(transformers, config.architectures[0])(config)
    model.save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS]
    words += [f"w{number}" for number in range(config.vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>", eos_token="</s>"
    ).save_pretrained(folder)


def make_bundle(shape: str, folder: Path) -> Path:
    """Return the bundle of a shape, with its checkpoint inside; make them if they do not exist."""
    import pocketzo as pz
    from pocketzo.export import export

    bundle = folder / f"paper-{shape}"
    checkpoint, graph = folder / f"{shape}-checkpoint", folder / f"{shape}-onnx" / "model.onnx"
    if not bundle.exists():
        write_checkpoint(shape, checkpoint)
        export(checkpoint, graph)
        template = "{text} It was {mask} ." if shape == "roberta-large" else "{text} It was"
        pz.prepare(graph, bundle, task="prompt", template=template, label_words=WORDS)
        for file in graph.parent.iterdir():
            file.unlink()
        (bundle / CHECKPOINT).symlink_to(checkpoint.resolve())
    return bundle


def make_batch(bundle: Path, count: int, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return random words without padding; a word in the middle, or the last one, is the position that counts."""
    import pocketzo as pz

    rng = np.random.default_rng(1)
    ids = rng.integers(len(WORDS) + 5, 50_000, (count, tokens))
    masked = "roberta" in bundle.name
    place = tokens // 2 if masked else tokens - 1
    if masked:
        ids[:, place] = 4
    batch = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(tokens), (count, 1)),
        "positions": np.arange(count) * tokens + place,
        "labels": rng.integers(0, 2, count),
    }
    return {value.name: batch[value.name] for value in pz.Bundle.read(bundle).inputs}


class TorchMeZO:
    """MeZO (arXiv 2305.17333) as its paper's code does it: three passes that add eps z, and the update.

    Each pass seeds torch's generator with the step's seed, draws z of each parameter by torch.normal, and adds it.
    """

    def __init__(self, torch: Any, bundle: Path, batch: dict[str, np.ndarray[Any, Any]]) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        self.torch = torch
        self.masked = "roberta" in bundle.name
        kind = AutoModelForMaskedLM if self.masked else AutoModelForCausalLM
        self.model = kind.from_pretrained(bundle / CHECKPOINT).eval()
        self.batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        self.words = torch.tensor([5, 6])
        self.random = np.random.default_rng(0)

    def loss(self) -> float:
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        rows, places = self.batch["positions"] // ids.shape[1], self.batch["positions"] % ids.shape[1]
        with self.torch.inference_mode():
            if self.masked:  # only the hidden states at the mask are projected, as that code does it
                hidden = self.model.roberta(ids, attention_mask=mask)[0]
                logits = self.model.lm_head(hidden[rows, places])
            else:
                logits = self.model(ids, attention_mask=mask).logits[rows, places]
            return float(self.torch.nn.functional.cross_entropy(logits[:, self.words], self.batch["labels"]))

    def step(self, eps: float = 1e-3) -> None:
        seed = int(self.random.integers(1_000_000_000))
        self._add(seed, eps)
        above = self.loss()
        self._add(seed, -2 * eps)
        below = self.loss()
        self._add(seed, eps)
        self._add(seed, -LR * (above - below) / (2 * eps))

    def _add(self, seed: int, scale: float) -> None:
        self.torch.manual_seed(seed)
        for parameter in self.model.parameters():
            z = self.torch.normal(mean=0, std=1, size=parameter.data.size(), dtype=parameter.data.dtype)
            parameter.data = parameter.data + scale * z


def start(system: str, shape: str, bundle: Path, batch: str, threads: int) -> System:
    """Load a system; see step.py."""
    inputs = make_batch(bundle, *map(int, batch.split("x")))
    if system == "torch":
        import torch

        torch.set_num_threads(threads)
        peer = TorchMeZO(torch, bundle, inputs)
        return System(peer.step, peer.loss())
    return start_ours(system, shape, bundle, batch, threads, inputs)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:], start=start)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="keep the bundles in this folder (default: a temporary one)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()

    run = Run()
    cells = []
    with models_folder(arguments.models) as folder:
        for shape in arguments.shapes:
            cells.append(
                measure(
                    shape,
                    in_a_process(make_bundle, shape, folder),
                    BATCH,
                    usable(arguments.systems),
                    threads=arguments.threads,
                    rounds=arguments.rounds,
                    script=__file__,
                )
            )
            run.finish({"cells": cells}, arguments.json)
    print("\n".join(paper_table(run.finish({"cells": cells}, arguments.json))))


def in_a_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, whose memory is free afterwards."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
