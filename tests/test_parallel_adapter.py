"""The parallel adapter: its scores against numpy, learning over what is kept of the backbone, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from graphs import MODELS
from test_cut import both, check_equal
from test_head import SIZE, Array, examples, states, write_decoder
from test_queries import on

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.errors import BundleError
from pocketzo.formats.safetensors import file_sha256

UNITS = 4
TRAIN = f"parallel-adapter:{UNITS}"
LABELS = ["a", "b", "c"]


def source_of(name: str, folder: Path) -> Path:
    return MODELS / f"{name}.onnx" if name.startswith("bert") else write_decoder(name, folder / "model.onnx")


def prepared(name: str, folder: Path, **options: Any) -> pz.Bundle:
    options = {"task": "classification", "labels": LABELS, "train": TRAIN} | options
    return pz.prepare(source_of(name, folder), folder / "base", **options)


def rows_of(folder: Path, bundle: pz.Bundle) -> dict[str, Array]:
    return dict(pz.load_dataset(examples(folder / "rows.npz"), bundle).batch(np.arange(40)))


def by_numpy(taps: dict[int, Array], mask: Array, tensors: dict[str, Array]) -> Array:
    """Return the scores, from the states of the layers [batch, sequence, size]."""
    share = mask / mask.sum(axis=1, keepdims=True)
    state = np.zeros(UNITS)
    for layer, tap in taps.items():
        inner = (
            np.einsum("bt,bth->bh", share, tap) @ tensors[f"parallel.{layer}.down.weight"]
            + tensors[f"parallel.{layer}.down.bias"]
        )
        state = np.maximum(inner + state, 0)
    scores: Array = state @ tensors["parallel.up.weight"] + tensors["parallel.up.bias"]
    return scores


@pytest.mark.parametrize("name", ["bert-old", "bert-new", "llama", "gpt2", "genai"])
def test_the_scores_are_those_of_the_blocks(name: str, tmp_path: Path) -> None:
    bundle = prepared(name, tmp_path)
    head = pz.prepare(source_of(name, tmp_path), tmp_path / "head", train="side-head", labels=LABELS)
    batch = rows_of(tmp_path, bundle)
    model = pz.load(bundle, threads=1)
    rng = np.random.default_rng(2)
    stored = safetensors.numpy.load_file(bundle.trained_path)
    tensors = {key: stored[key] for key in bundle.trainable[TRAIN]}
    taps = states(head, {key: array for key, array in batch.items() if key != "labels"})
    for _ in range(2):  # as it begins, and with other values
        expected = by_numpy(taps, batch["attention_mask"], tensors)
        np.testing.assert_allclose(model.run(batch)["logits"], expected, rtol=1e-4, atol=1e-5)
        for tensor, array in tensors.items():
            tensors[tensor] = rng.normal(0, 0.5, array.shape).astype(np.float32)
            model.weights[tensor] = tensors[tensor]


def test_only_what_is_added_is_trained(tmp_path: Path) -> None:
    """It begins as noise that depends on no machine, and the base is the same for all numbers of units."""
    bundle, other = prepared("bert-new", tmp_path), prepared("bert-new", tmp_path / "other", train="parallel-adapter:8")
    names = bundle.trainable[TRAIN]
    assert bundle.trainable.keys() == {TRAIN}
    assert {spec.name for spec in bundle.tensors if spec.trainable} == set(names) == set(bundle.added[0].tensors)
    assert bundle.added[0].kind == "parallel-adapter"
    assert {spec.reason.partition(":")[0] for spec in bundle.frozen} <= {"request", "constant", "buffer"}
    assert not any(spec.name.startswith("classifier") for spec in bundle.tensors)  # scores of its own replace those
    assert file_sha256(bundle.weights_path) == file_sha256(other.weights_path)
    again = prepared("bert-new", tmp_path / "again")
    assert file_sha256(bundle.trained_path) == file_sha256(again.trained_path)


@pytest.mark.parametrize("name", ["bert-old", "llama"])
def test_a_step_does_not_run_the_backbone(name: str, tmp_path: Path) -> None:
    bundle = prepared(name, tmp_path)
    batch = rows_of(tmp_path, bundle)
    model, whole, halves = both(bundle)
    check_equal(model.run(batch), whole.run(batch), batch)
    computed = halves.computed
    before = model.loss(batch)
    optimizer = pz.FZOO(model, lr=1e-2, eps=1e-3, seed=3)
    for _ in range(40):
        optimizer.step(lambda model: model.loss(batch))
    assert model.loss(batch) < before - 0.05
    assert halves.computed == computed
    assert halves.cut.saved(16, 32) > 0.9
    for tensor in bundle.trainable[TRAIN]:
        whole.weights[tensor] = model.weights[tensor]
    check_equal(model.run(batch), whole.run(batch), batch)


def test_several_directions_in_one_forward_pass(tmp_path: Path) -> None:
    bundle = prepared("bert-new", tmp_path)
    batch = rows_of(tmp_path, bundle)
    model, whole, _ = both(bundle, queries=True)
    rng = np.random.default_rng(5)
    trained = [tensor for tensor in bundle.tensors if tensor.trainable]
    values = {one.name: rng.normal(0, 0.1, (3, *one.shape)).astype(np.float32) for one in trained}
    for index, loss in enumerate(on(bundle, batch, 3).together(model, values, [None, None, None])):
        for tensor, array in values.items():
            whole.weights[tensor] = array[index]
        assert loss == pytest.approx(whole.loss(batch), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "labels", "loss"),
    [("multi-label", ["a", "b"], "bce"), ("regression", None, "mse"), ("classification", ["a", "b"], "cross-entropy")],
)
def test_its_tasks(task: str, labels: list[str] | None, loss: str, tmp_path: Path) -> None:
    """With one unit, whose weights are single numbers, all tensors are seen to change."""
    bundle = prepared("bert-old", tmp_path, task=task, labels=labels, train="parallel-adapter:1")
    assert bundle.task is not None
    assert (bundle.task.name, bundle.task.settings["loss"]) == (task, loss)
    assert bundle.probe is not None
    model = pz.load(bundle, threads=1)
    rng = np.random.default_rng(0)
    model.weights["parallel.1.down.bias"] = np.full_like(model.weights["parallel.1.down.bias"], 9.0)
    for name in ("parallel.up.weight", "parallel.up.bias"):
        before = model.loss(bundle.probe)
        model.weights[name] = model.weights[name] + rng.random(model.weights[name].shape, np.float32)
        assert model.loss(bundle.probe) != before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"labels": None}, "'parallel-adapter:4' needs labels, the names of the classes"),
        ({"train": f"{TRAIN}+norm"}, "'parallel-adapter:4' is trained alone, beside a frozen model"),
        ({"train": "parallel-adapter"}, "'parallel-adapter': expected an integer from 1"),
        ({"base": "int4"}, "base is not an option of train='parallel-adapter:4'"),
        ({"task": "causal-lm"}, "train='parallel-adapter:4' is for the tasks classification, multi-label, regression"),
        ({"task": "prompt", "template": "{text}", "label_words": ["a"]}, "label_words is not an option of train='para"),
    ],
)
def test_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason.replace("+", r"\+")):
        prepared("bert-old", tmp_path, **options)
    assert not (tmp_path / "base").exists()


def test_it_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"'{TRAIN}' cannot be merged: it has a ReLU inside"):
        pz.merge(prepared("bert-old", tmp_path).path, tmp_path / "merged")


def test_the_commands(tmp_path: Path) -> None:
    """Prepare, train over a cache, resume, replay; the tuned bundle is that of the run."""
    source, data, base, run = (str(tmp_path / name) for name in ("m.onnx", "rows.npz", "base", "run"))
    Path(source).write_bytes((MODELS / "bert-old.onnx").read_bytes())
    examples(Path(data))

    def command(*arguments: str) -> str:
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        return done.output

    command("prepare", source, "-o", base, "--task", "classification", "--labels", "a,b,c", "--train", TRAIN)
    steps = ("--steps", "60", "--threads", "1", "--cache", str(tmp_path / "cache"))
    text = command("train", base, "--data", data, "--eval", data, "-o", run, *steps)
    assert "40 rows computed" in text
    command("replay", run, "-o", str(tmp_path / "tuned"))
    found = pz.Run(run).evaluations()
    losses = [values["loss"] or np.nan for values in found.values()]
    assert losses[-1] < losses[0]
    tuned = pz.load(pz.Bundle.read(tmp_path / "tuned"), threads=1)
    loss = tuned.loss(dict(pz.load_dataset(data, tuned.bundle).batch(np.arange(40))))
    assert loss == pytest.approx(losses[-1], rel=1e-5)
    assert SIZE * UNITS in [np.prod(spec.shape) for spec in tuned.bundle.tensors if spec.trainable]
