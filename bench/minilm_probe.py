"""Linear probes on the frozen all-MiniLM-L6-v2 embedding, SST-2: the baseline that fine-tuning has to beat.

    python bench/minilm_probe.py [SST2_FOLDER] [--checkpoint DIR]

Trains on 1,024 sentences (512 a class, drawn by three seeds); prints the accuracy on dev for several strengths of the
L2 penalty and for the one that 5-fold cross-validation on these sentences chooses, with embeddings as pooled and
scaled to unit length. If OpenBLAS shares its cores with other work, OPENBLAS_NUM_THREADS=1 is much faster.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from sst2 import SST2

from pocketzo.demo import minilm
from pocketzo.demo.probe import linear_probe
from pocketzo.export.bert import Checkpoint, build_onnx

Array = npt.NDArray[Any]


def read(path: Path) -> tuple[list[str], Array]:
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [line[0] for line in lines], np.array([int(line[1]) for line in lines])


def embed(checkpoint: Checkpoint, sentences: list[str]) -> Array:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    tokenizer.no_padding()
    with tempfile.TemporaryDirectory() as folder:
        build_onnx(checkpoint, Path(folder, "model.onnx"), num_labels=2)
        session = onnxruntime.InferenceSession(Path(folder, "model.onnx"))
    tokens = [tokenizer.encode(sentence).ids for sentence in sentences]
    lengths = np.array([len(ids) for ids in tokens])
    result = np.empty((len(sentences), checkpoint.hidden_size), np.float32)
    for length in np.unique(lengths):
        for alike in np.split(same := np.flatnonzero(lengths == length), range(64, len(same), 64)):
            ids = np.array([tokens[index] for index in alike])
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            (result[alike],) = session.run(["embedding"], inputs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=SST2)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"no such folder: {arguments.data}")
    checkpoint = minilm.find_checkpoint(arguments.checkpoint)
    sentences, labels = read(arguments.data / "train.tsv")
    dev, dev_labels = read(arguments.data / "dev.tsv")
    dev_features = embed(checkpoint, dev)

    strengths = (None, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    print("| seed | embedding | " + " | ".join("chosen" if l2 is None else f"l2 {l2}" for l2 in strengths) + " |")
    print("|---" * (2 + len(strengths)) + "|")
    for seed in range(3):
        random = np.random.default_rng(seed)
        chosen = np.concatenate([random.permutation(np.flatnonzero(labels == label))[:512] for label in (0, 1)])
        features = embed(checkpoint, [sentences[index] for index in chosen])
        for name in ("as pooled", "unit length"):
            train, test = features, dev_features
            if name == "unit length":
                train, test = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, test))
            found = [linear_probe(train, labels[chosen], test, dev_labels, l2=l2) for l2 in strengths]
            print(f"| {seed} | {name} | " + " | ".join(f"{accuracy:.1%}" for accuracy in found) + " |", flush=True)


if __name__ == "__main__":
    main()
