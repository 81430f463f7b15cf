"""Runs that begin from an adapter of PEFT: its numbers, replay and resume bit for bit, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from decoders import Array
from test_adapter import read_peft, tuned_decoder
from test_language_models import Sentences

import pocketzo as pz
from pocketzo.errors import BundleError, JournalError
from pocketzo.formats.safetensors import file_sha256, read_floats

pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")


def adapter_of(name: str, train: str, folder: Path) -> tuple[pz.Bundle, Path, Path]:
    """Return a base bundle, a tuned one, and its adapter."""
    tuned = tuned_decoder(name, train, folder)
    pz.write_adapter(tuned, folder / "peft", kind="peft")
    return pz.Bundle.read(folder / "base"), tuned, folder / "peft"


@pytest.mark.parametrize("name", ["gpt2", "llama", "genai", "llama, int4"])
def test_an_adapter_that_left_comes_back(name: str, tmp_path: Path) -> None:
    base, tuned, adapter = adapter_of(name, "lora:r=2,alpha=3", tmp_path)
    model = pz.load(base, threads=1)
    pz.load_adapter(model, adapter)
    expected = pz.Bundle.read(tuned).map_tensors()
    for tensor in base.tensors:
        if tensor.trainable:
            np.testing.assert_array_equal(model.weights[tensor.name], expected[tensor.name])


def test_one_pair_begins_all_parts_of_a_projection(tmp_path: Path) -> None:
    """PEFT's own LoRA of c_attn has one A for queries, keys and values, and columns that the set has not."""
    _, _, adapter = adapter_of("gpt2", "lora:r=2,targets=c_attn", tmp_path)
    bundle = pz.prepare(tmp_path / "m.onnx", tmp_path / "parts", task="causal-lm", train="lora:r=2")
    model = pz.load(bundle, threads=1)
    with pytest.raises(
        BundleError, match=r"changes columns of 'transformer.h.0.attn.c_attn' that no set of .* targets=c_"
    ):
        pz.load_adapter(model, adapter)
    assert model.init == {}
    _, tensors = read_peft(adapter)
    for key, value in tensors.items():
        if key.endswith("lora_B.weight"):
            value[64:128] = 0
    safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")
    pz.load_adapter(model, adapter)
    a, b = (tensors[f"base_model.model.transformer.h.1.attn.c_attn.lora_{matrix}.weight"] for matrix in "AB")
    for role, start in (("query", 0), ("value", 128)):
        np.testing.assert_array_equal(model.weights[f"transformer.h.1.attn.c_attn.{role}.lora_A"], a.T)
        np.testing.assert_array_equal(
            model.weights[f"transformer.h.1.attn.c_attn.{role}.lora_B"], b[start : start + 64].T
        )


@pytest.mark.parametrize("snapshot_every", [None, 2])
def test_a_run_keeps_what_it_began_with(snapshot_every: int | None, tmp_path: Path) -> None:
    base, _, adapter = adapter_of("llama", "lora:r=2", tmp_path)
    data, run = Sentences(tmp_path / "m.onnx"), tmp_path / "run"
    model = pz.load(base, threads=1)
    pz.load_adapter(model, adapter)

    def trainer(model: pz.Model) -> pz.Trainer:
        optimizer = pz.MeZO(model, lr=0.05, eps=1e-2)
        return pz.Trainer(model, optimizer, data, steps=4, batch_size=4, run=run, snapshot_every=snapshot_every)

    first = trainer(model)
    first.callback = lambda progress: setattr(first, "stop_requested", progress.info.step == 2)
    first.fit()
    assert pz.Run(run).steps == 3
    assert pz.Run(run).recipe.model.init_sha256 == file_sha256(run / "init.safetensors")
    resumed = pz.Trainer.resume(run, data)
    resumed.fit()
    pz.Run(run).replay(tmp_path / "replayed")
    pz.Run(run).replay(tmp_path / "begun", step=0)
    assert resumed.model.weights.sha256() == file_sha256(pz.Bundle.read(tmp_path / "replayed").trained_path)
    begun = pz.Bundle.read(tmp_path / "begun").map_tensors()
    assert all(np.array_equal(begun[name], value) for name, value in model.init.items())
    merged = pz.merge(run, tmp_path / "merged")
    assert not merged.added

    content = (run / "init.safetensors").read_bytes()
    (run / "init.safetensors").write_bytes(content[:-1] + b"?")
    with pytest.raises(JournalError, match=r"init.safetensors: not the values that the run began with: SHA-256 is"):
        pz.Run(run).replay(tmp_path / "x", step=0)
    (run / "init.safetensors").unlink()
    with pytest.raises(
        JournalError, match=r"init.safetensors: missing; the run began from an adapter, and replay needs"
    ):
        pz.Run(run).replay(tmp_path / "x", step=0)


def test_weights_that_were_changed_after_the_adapter_are_refused(tmp_path: Path) -> None:
    base, _, adapter = adapter_of("llama", "lora:r=2", tmp_path)
    model = pz.load(base, threads=1)
    pz.load_adapter(model, adapter)
    name = next(iter(model.init))
    model.weights[name] = model.init[name] + 1
    data = Sentences(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="the weights in memory are not those of"):
        pz.Trainer(model, pz.MeZO(model, lr=0.05, eps=1e-2), data, steps=4, run=tmp_path / "run").fit()
    assert not (tmp_path / "run" / "journal.pzj").exists()


def test_an_adapter_in_bfloat16_is_read(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(1).normal(size=(3, 5)).astype(ml_dtypes.bfloat16)
    data = values.tobytes()
    header = json.dumps({"a": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    np.testing.assert_array_equal(read_floats(tmp_path / "x.safetensors")["a"], values.astype(np.float32))


def config(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def tensors(change: Callable[[dict[str, Array]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = safetensors.numpy.load_file(path)
        change(found)
        safetensors.numpy.save_file(found, path)

    return edit


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (config(peft_type="IA3"), "is an adapter of 'IA3', expected LoRA"),
        (config(use_dora=True), "is an adapter of DoRA, expected LoRA"),
        (config(lora_alpha=32), r"alpha / r is 32 / 2, and 16 / 2 of 'lora:r=2': prepare the .* lora:r=2,alpha=32"),
        (config(use_rslora=True), r"alpha / r is "),
        (config(r=4), "'model.layers.0.self_attn.q_proj' is of rank 4, and its A of 2"),
        (config(r="2"), "'r' of 'model.layers.0.self_attn.q_proj' is '2', expected a number greater than 0"),
        (tensors(lambda found: found.pop(f"{Q0}.lora_A.weight")), "A and B of .*q_proj' are not both there"),
        (
            tensors(lambda found: [found.pop(f"{Q0}.lora_{matrix}.weight") for matrix in "AB"]),
            r"has no matrices for 'model.layers.0.self_attn.q_proj.MatMul.lora_A' of a projection of 64 x 64, but for",
        ),
        (
            tensors(lambda found: found.update({f"{Q0}.lora_B.weight": np.zeros((65, 2), np.float32)})),
            r"has no matrices for .*q_proj.* but for .*q_proj of 64 x 65",
        ),
        (
            tensors(lambda found: found.update({f"head.lora_{m}.weight": np.zeros((2, 2), np.float32) for m in "AB"})),
            r"changes 'head', which no set of .* does: prepare the model with the targets and layers of the adapter",
        ),
        (
            tensors(lambda found: found.update({"classifier.weight": np.zeros((2, 2), np.float32)})),
            "'classifier.weight' is no matrix A or B of LoRA: a run begins from these alone",
        ),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"adapter_config.json: no such file"),
        (lambda folder: (folder / "adapter_config.json").write_text("["), "adapter_config.json: not JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "save the adapter with safe_serialization"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(edit: Callable[[Path], object], fault: str, tmp_path: Path) -> None:
    base, _, adapter = adapter_of("llama", "lora:r=2", tmp_path)
    edit(adapter)
    model = pz.load(base, threads=1)
    with pytest.raises(BundleError, match=fault):
        pz.load_adapter(model, adapter)
    assert model.init == {}
    assert model.weights.sha256() == file_sha256(base.trained_path)


@pytest.mark.parametrize(
    ("train", "fault"),
    [
        ("lora:r=4", r"is of rank 2, and 'lora:r=4' of rank 4: prepare the model with --train lora:r=2,alpha=16"),
        ("lora:r=2,train=B", r"has another A than .*q_proj.MatMul.lora_A', which .* freezes: .*alpha=16,train=AB"),
        ("ia3", "has no set 'lora' that .*peft could be the beginning of"),
        ("norm", "no set added tensors to this model"),
    ],
)
def test_a_set_that_does_not_fit_is_named(train: str, fault: str, tmp_path: Path) -> None:
    _, _, adapter = adapter_of("llama", "lora:r=2", tmp_path)
    model = pz.load(pz.prepare(tmp_path / "m.onnx", tmp_path / "other", task="causal-lm", train=train), threads=1)
    with pytest.raises(BundleError, match=fault):
        pz.load_adapter(model, adapter)
