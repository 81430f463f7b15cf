"""Merging: the logits of the tuned model, from the graphs and the sets of the model without what was added."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from decoders import Array
from graphs import MODELS, inputs_of
from test_decoders import FLOATS, op_types, plain
from test_language_models import Sentences, token_losses
from test_trainable import DECODERS, check_training

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import DESCRIPTION

pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")


def tune(bundle: pz.Bundle, folder: Path, scale: float = 0.1) -> Path:
    """Save a bundle with random numbers added to what is trained."""
    rng = np.random.default_rng(8)
    model = pz.load(bundle, threads=1)
    for tensor in bundle.tensors:
        if tensor.trainable:
            noise = scale * rng.normal(size=tensor.shape)
            model.weights[tensor.name] = (model.weights[tensor.name] + noise).astype(tensor.dtype)
    model.save(folder)
    return folder


def agree(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def check_is_like(merged: pz.Bundle, base: pz.Bundle) -> None:
    """Check that only weights differ from a bundle that was prepared without the added sets."""
    assert merged.trainable == base.trainable
    assert {tensor.name: (tensor.id, tensor.dtype, tensor.shape) for tensor in merged.tensors} == {
        tensor.name: (tensor.id, tensor.dtype, tensor.shape) for tensor in base.tensors
    }
    assert set(merged.frozen) == set(base.frozen)
    assert (merged.inputs, merged.outputs, merged.task, merged.max_length) == (
        base.inputs,
        base.outputs,
        base.task,
        base.max_length,
    )
    for path in (base.model_path, base.generate_path):
        if path.is_file():
            graphs = [
                onnx.load(folder / path.name, load_external_data=False).graph for folder in (merged.path, base.path)
            ]
            assert Counter(op_types(graphs[0])) == Counter(op_types(graphs[1]))
            assert {value.name for value in graphs[0].initializer} == {value.name for value in graphs[1].initializer}


SETS = {"lora:r=2": "all", "ia3": "all", "lora:r=3,alpha=5+ia3+norm": "norm"}
"""And the sets without what is added."""


@pytest.mark.parametrize("train", SETS)
@pytest.mark.parametrize("name", FLOATS)
def test_a_decoder_is_merged(name: str, train: str, tmp_path: Path) -> None:
    path = FLOATS[name](tmp_path / "m.onnx")
    data = Sentences(path)
    everything = data.batch(np.arange(len(data)))
    bundle = pz.prepare(path, tmp_path / "added", task="causal-lm", train=train)
    tuned = tune(bundle, tmp_path / "tuned")
    merged = pz.merge(tuned, tmp_path / "merged")
    check_is_like(merged, pz.prepare(path, tmp_path / "base", task="causal-lm", train=SETS[train]))

    expected = plain(tuned / "generate.onnx", everything)
    for key, value in plain(merged.generate_path, everything).items():
        agree(value, expected[key])
    assert np.abs(expected["logits"] - plain(path, everything)["logits"]).max() > 1e-2
    losses = pz.load(merged, threads=1).run(everything)["token_losses"]
    np.testing.assert_allclose(losses, token_losses(expected["logits"], everything), rtol=1e-4, atol=1e-4)
    (tmp_path / "again").mkdir()
    check_training(merged, tmp_path / "again", data)


@pytest.mark.parametrize("train", ["lora:r=2", "ia3", "lora:r=2,layers=1,targets=query|dense"])
@pytest.mark.parametrize("name", ["bert-old", "bert-new"])
def test_an_encoder_is_merged(name: str, train: str, tmp_path: Path) -> None:
    feed = inputs_of(name)
    path = MODELS / f"{name}.onnx"
    tuned = tune(pz.prepare(path, tmp_path / "added", train=train), tmp_path / "tuned")
    merged = pz.merge(tuned, tmp_path / "merged")
    check_is_like(merged, pz.prepare(path, tmp_path / "base"))
    feed["labels"] = np.arange(len(feed["input_ids"])) % 3
    expected = plain(tuned / "model.onnx", feed)["logits"]
    agree(plain(merged.model_path, feed)["logits"], expected)
    assert np.abs(expected - plain(path, feed)["logits"]).max() > 1e-3


def test_float16_weights_are_rounded_again(tmp_path: Path) -> None:
    path = FLOATS["llama"](tmp_path / "m.onnx")
    feed: Mapping[str, Array] = Sentences(path).batch(np.arange(8))
    bundle = pz.prepare(path, tmp_path / "added", task="causal-lm", dtype="float16", train="lora+ia3")
    tuned = tune(bundle, tmp_path / "tuned")
    merged = pz.merge(tuned, tmp_path / "merged")
    check_is_like(merged, pz.prepare(path, tmp_path / "base", task="causal-lm", dtype="float16"))
    agree(plain(merged.generate_path, feed)["logits"], plain(tuned / "generate.onnx", feed)["logits"], 1e-2)


def test_a_run_is_merged_at_any_step(tmp_path: Path) -> None:
    path = FLOATS["llama"](tmp_path / "m.onnx")
    data = Sentences(path)
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train="lora:r=2,train=B")
    model = pz.load(bundle, threads=1)
    run = tmp_path / "run"
    pz.Trainer(model, pz.MeZO(model, lr=0.1, eps=1e-2), data, steps=3, batch_size=4, run=run).fit()
    outcome = CliRunner().invoke(cli, ["merge", str(run), "-o", str(tmp_path / "first"), "--step", "1"])
    assert outcome.exit_code == 0, outcome.output
    merged = pz.merge(run, tmp_path / "last")
    feed = data.batch(np.arange(8))
    for step, found in ((1, tmp_path / "first"), (3, merged.path)):
        pz.Run(run).replay(tmp_path / f"tuned-{step}", step=step)
        expected = plain(tmp_path / f"tuned-{step}" / "generate.onnx", feed)["logits"]
        agree(plain(found / "generate.onnx", feed)["logits"], expected)
    outcome = CliRunner().invoke(cli, ["merge", str(merged.path), "-o", str(tmp_path / "x"), "--step", "1"])
    assert outcome.exit_code == 2
    assert "--step and --best belong to a run" in outcome.output


def older(bundle: pz.Bundle) -> None:
    """Rewrite the description as it was before it had ``added``."""
    path = bundle.path / DESCRIPTION
    fields = json.loads(path.read_text())
    del fields["added"]
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "train", "change", "fault"),
    [
        (
            "llama, int4",
            "lora",
            None,
            r"q_proj.*lora_A' cannot be merged into '.*', which is quantised \(uint8\): train",
        ),
        ("llama, QDQ", "lora", None, "which is quantised"),
        ("llama", "prefix:2", None, "'prefix:2' cannot be merged: it changes keys and values, and no weight"),
        ("llama", "lora+adapter:2", None, "'adapter:2' cannot be merged: it has a ReLU inside"),
        ("gpt2", "lora:targets=wte", None, "'transformer.wte.lora_A' cannot be merged: '.*wte.weight' is also read by"),
        ("llama", "norm", None, r"no set added tensors to this model, only its own weights were trained \('norm'\)"),
        ("llama", "lora", older, "does not say where .*lora_A' was added.* again with --train lora, which gives"),
    ],
)
def test_what_cannot_be_merged_is_named(
    name: str, train: str, change: Callable[[pz.Bundle], None] | None, fault: str, tmp_path: Path
) -> None:
    path = DECODERS[name](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train=train)
    if change is not None:
        change(bundle)
    with pytest.raises(BundleError, match=fault):
        pz.merge(bundle.path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("kind", "dora", r"added\[0\]: 'kind' is 'dora', expected one of lora, ia3, adapter, prefix"),
        (
            "tensors",
            ["lora_A"],
            r"added\[0\]: 'tensors' is .*, expected names of tensors whose shapes fit to the place",
        ),
        ("count", 63, "expected names of tensors whose shapes fit"),
        ("start", 64, r"'start' is 64, expected an integer of 0 to 63"),
        ("transposed", 0, "'transposed' is 0, expected true or false"),
        ("alpha", "16", "'alpha' is '16', expected a number"),
        ("role", "head", "'role' is 'head', expected one of query, key, value"),
        ("biases", [1], r"'biases' is \[1\], expected a list of names"),
        ("weight", None, "'weight' is None, expected a string"),
    ],
)
def test_a_damaged_description_is_named(field: str, value: object, fault: str, tmp_path: Path) -> None:
    bundle = pz.prepare(FLOATS["llama"](tmp_path / "m.onnx"), tmp_path / "base", task="causal-lm", train="lora+ia3")
    assert pz.Bundle.read(bundle.path).added == bundle.added
    path = bundle.path / DESCRIPTION
    fields = json.loads(path.read_text())
    fields["added"][0][field] = value
    path.write_text(json.dumps(fields))
    with pytest.raises(BundleError, match=fault):
        pz.merge(bundle.path, tmp_path / "merged")


def test_neither_the_base_nor_another_bundle_is_replaced(tmp_path: Path) -> None:
    bundle = pz.prepare(FLOATS["llama"](tmp_path / "m.onnx"), tmp_path / "base", task="causal-lm", train="lora")
    with pytest.raises(BundleError, match="is the base of these weights"):
        pz.merge(bundle.path, bundle.path, overwrite=True)
    pz.merge(bundle.path, tmp_path / "merged")
    with pytest.raises(BundleError, match="already exists"):
        pz.merge(bundle.path, tmp_path / "merged")
    pz.merge(bundle.path, tmp_path / "merged", overwrite=True)
    with pytest.raises(BundleError, match="neither a bundle"):
        pz.merge(tmp_path, tmp_path / "x")
