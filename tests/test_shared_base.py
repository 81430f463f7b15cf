"""A set that is added has a file of its own, and bundles share the weights of their base."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from decoders import gpt2_weights, write_gpt2
from graphs import MODELS, inputs_of
from test_language_models import Sentences

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.formats.safetensors import file_sha256, map_tensors
from pocketzo.runtime.loader import Loader

BERT = MODELS / "bert-new.onnx"
SET = "lora:r=2+norm"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pz.Bundle:
    return pz.prepare(BERT, tmp_path_factory.mktemp("whole") / "all")


@pytest.fixture
def added(whole: pz.Bundle, tmp_path: Path) -> pz.Bundle:
    return pz.prepare(BERT, tmp_path / "added", train=SET, share_base=whole.path)


def feed() -> dict[str, Any]:
    inputs = inputs_of("bert-new")
    return inputs | {"labels": np.arange(len(inputs["input_ids"])) % 3}


def change(model: pz.Model) -> None:
    for number, name in enumerate(sorted(names(model.bundle))):
        model.weights[name] = model.weights[name] + np.float32(0.01 * (number + 1))


def names(bundle: pz.Bundle) -> set[str]:
    return {tensor.name for tensor in bundle.tensors if tensor.trainable}


def same_file(*bundles: pz.Bundle) -> bool:
    return len({bundle.weights_path.stat().st_ino for bundle in bundles}) == 1


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def test_the_base_is_the_same_for_all_sets(whole: pz.Bundle, added: pz.Bundle, tmp_path: Path) -> None:
    other = pz.prepare(BERT, tmp_path / "other", train="ia3")
    assert {bundle.base_sha256 for bundle in (whole, added, other)} == {file_sha256(whole.weights_path)}
    assert same_file(whole, added)
    assert not same_file(whole, other)
    assert whole.adapter is None
    tensors = map_tensors(added.trained_path)
    assert tensors.keys() == names(added)
    base = map_tensors(added.weights_path)
    for name in tensors.keys() & base.keys():  # the norms
        np.testing.assert_array_equal(tensors[name], base[name])
    assert {name for name, (path, _) in added.places.items() if path == added.trained_path} == names(added)
    assert [spec.name for spec in added.tensors] == list(added.places)


def test_all_layouts_compute_the_same(whole: pz.Bundle, added: pz.Bundle) -> None:
    expected = pz.load(whole, threads=1, prepack=False).loss(feed())
    over, plain = pz.load(added, threads=1), pz.load(added, threads=1, prepack=False)
    constants, _ = Loader(
        added, threads=1, prepack="auto", verify="auto", max_memory=None, forward_seconds={}
    )._load_with_constants("for the test")
    assert (over.prepacked, plain.prepacked) == (True, False)
    for model in over, plain, constants:
        assert set(model.weights.image.views) == names(added)
        assert model.loss(feed()) == pytest.approx(expected, rel=1e-5)
        for name, (path, _) in added.places.items():
            np.testing.assert_array_equal(model.weights[name], map_tensors(path)[name])
        before = model.loss(feed())
        change(model)
        assert abs(model.loss(feed()) - before) > 1e-4
    assert over.loss(feed()) == pytest.approx(plain.loss(feed()), rel=1e-5)
    with pytest.raises(ValueError, match=r"is frozen: it stays in .*weights\.safetensors"):
        over.weights[next(iter(over.weights.keys() - names(added)))] = 0


def test_a_tuned_copy_has_an_adapter_of_its_own(added: pz.Bundle, tmp_path: Path) -> None:
    model = pz.load(added, threads=1)
    change(model)
    model.save(tmp_path / "tuned")
    tuned = pz.Bundle.read(tmp_path / "tuned")
    assert same_file(added, tuned)
    assert (tuned.base_sha256, tuned.adapter) == (added.base_sha256, added.adapter)
    assert file_sha256(tuned.trained_path) != tuned.prepared_sha256 == file_sha256(added.trained_path)
    assert pz.load(tuned, threads=1).loss(feed()) == model.loss(feed())
    shutil.rmtree(added.path)
    assert pz.load(tuned, threads=1).loss(feed()) == model.loss(feed())


def test_without_links_the_base_is_copied_and_that_is_said(
    added: pz.Bundle, whole: pz.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    model = pz.load(added, threads=1)
    with pytest.warns(UserWarning, match=r"tuned: its weights\.safetensors is a copy of .* Operation not permitted"):
        model.save(tmp_path / "tuned")
    with pytest.warns(UserWarning, match=r"again: its weights\.safetensors is a copy of "):
        pz.prepare(BERT, tmp_path / "again", train=SET, share_base=whole.path)
    copies = pz.Bundle.read(tmp_path / "tuned"), pz.Bundle.read(tmp_path / "again")
    assert {file_sha256(copy.weights_path) for copy in copies} == {added.base_sha256}
    assert not same_file(added, copies[0])


def test_a_base_that_does_not_fit_is_refused(whole: pz.Bundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share_base is for sets that are added"):
        pz.prepare(BERT, tmp_path / "new", train="norm", share_base=whole.path)
    half = pz.prepare(BERT, tmp_path / "half", dtype="float16")
    for other in half.path, pz.prepare(MODELS / "gpt2-new.onnx", tmp_path / "old").path:
        with pytest.raises(pz.BundleError, match="other weights than those of this model"):
            pz.prepare(BERT, tmp_path / "new", train=SET, share_base=other)
    with pytest.raises(pz.BundleError, match="no such bundle"):
        pz.prepare(BERT, tmp_path / "new", train=SET, share_base=tmp_path / "none")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["missing", "header", "cut", "tensors", "other"])
def test_a_damaged_adapter_is_named(added: pz.Bundle, what: str) -> None:
    data, path = added.trained_path.read_bytes(), added.trained_path
    path.unlink()
    match what:
        case "header":
            path.write_bytes(data.replace(b"lora_A", b"lora_C", 1))
        case "cut":
            path.write_bytes(data[:-4])
        case "other":
            path.write_bytes(added.weights_path.read_bytes())
        case "tensors":
            path.write_bytes(data)
            described = json.loads((added.path / "bundle.json").read_text())
            described["tensors"].pop()
            del described["added"]
            described["trainable"][-1]["tensors"] = described["trainable"][-1]["tensors"][:1]
            (added.path / "bundle.json").write_text(json.dumps(described))
    with pytest.raises(pz.BundleError, match=r"adapter\.safetensors"):
        pz.Bundle.read(added.path)


def test_a_run_replays_and_its_snapshots_are_small(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_gpt2(path, gpt2_weights(), gemm=False)
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train="lora:r=2")
    model = pz.load(bundle, threads=1)
    optimizer = pz.MeZO(model, lr=1e-2, eps=1e-2)
    run = tmp_path / "run"
    pz.Trainer(model, optimizer, Sentences(path), run=run, steps=4, batch_size=4, snapshot_every=2).fit()
    (snapshot,) = (run / "snapshots").iterdir()
    assert (snapshot / "weights.safetensors").read_bytes() == b"".join(model.weights._bytes())
    assert (snapshot / "weights.safetensors").stat().st_size == bundle.trained_path.stat().st_size

    recorded = pz.Run(run).recipe.model
    assert (recorded.weights_sha256, recorded.adapter_sha256) == (bundle.base_sha256, bundle.prepared_sha256)
    pz.Run(run).replay(tmp_path / "tuned")
    tuned = pz.Bundle.read(tmp_path / "tuned")
    assert file_sha256(tuned.trained_path) == model.weights.sha256()
    assert same_file(bundle, tuned)
    with pytest.raises(pz.JournalError, match=r"adapter\.safetensors: not the adapter that the run .* started from"):
        pz.Run(run).base(tuned.path)


def test_the_commands(whole: pz.Bundle, tmp_path: Path) -> None:
    def command(*arguments: object) -> str:
        found = CliRunner().invoke(cli, list(map(str, arguments)))
        assert found.exit_code == 0, found.output
        return found.output

    command("prepare", BERT, "-o", tmp_path / "base", "--train", "lora", "--share-base", whole.path)
    assert same_file(whole, pz.Bundle.read(tmp_path / "base"))
    assert json.loads(command("info", tmp_path / "base", "--json"))["tuned"] is False
    model = pz.load(tmp_path / "base", threads=1)
    change(model)
    model.save(tmp_path / "tuned")
    assert json.loads(command("info", tmp_path / "tuned", "--json"))["tuned"] is True
