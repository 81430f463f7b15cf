"""Adapters of other libraries, as far as numpy and onnxruntime can read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import safetensors.numpy
from click.testing import CliRunner
from decoders import Array
from test_decoders import plain
from test_language_models import Sentences
from test_merge import agree, tune
from test_trainable import DECODERS

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.errors import BundleError
from pocketzo.formats.safetensors import write

pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")


def tuned_decoder(name: str, train: str, folder: Path) -> Path:
    bundle = pz.prepare(DECODERS[name](folder / "m.onnx"), folder / "base", task="causal-lm", train=train)
    return tune(bundle, folder / "tuned")


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def change_of(config: dict[str, Any], tensors: dict[str, Array], module: str) -> Array:
    """Return what a LoRA of PEFT adds to a weight [out, in]."""
    a, b = (tensors[f"base_model.model.{module}.lora_{matrix}.weight"] for matrix in "AB")
    rank = config["rank_pattern"].get(module.replace(".", r"\."), config["r"])
    alpha = config["alpha_pattern"].get(module.replace(".", r"\."), config["lora_alpha"])
    assert len(a) == rank
    return np.asarray(alpha / rank * (b @ a))


def test_the_parts_of_a_projection_become_one_pair(tmp_path: Path) -> None:
    tuned = tuned_decoder("gpt2", "lora:r=2,alpha=3", tmp_path)
    pz.write_adapter(tuned, tmp_path / "peft", kind="peft")
    config, tensors = read_peft(tmp_path / "peft")
    modules = [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
    assert sorted(config["target_modules"]) == modules
    assert (config["peft_type"], config["task_type"], config["fan_in_fan_out"]) == ("LORA", "CAUSAL_LM", True)
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert len(tensors) == 4
    own = pz.Bundle.read(tuned).map_tensors()
    for module in modules:
        expected = np.zeros((192, 64), np.float32)
        for role, start in (("query", 0), ("value", 128)):
            a, b = (own[f"{module}.{role}.lora_{matrix}"] for matrix in "AB")
            expected[start : start + 64] = 1.5 * (a @ b).T
        np.testing.assert_allclose(change_of(config, tensors, module), expected, rtol=1e-5, atol=1e-6)


def test_ranks_and_alphas_that_differ_are_patterns(tmp_path: Path) -> None:
    tuned = tuned_decoder("llama", "lora:r=2,targets=q_proj+lora:r=3,alpha=7,targets=v_proj", tmp_path)
    pz.write_adapter(tuned, tmp_path / "peft", kind="peft")
    config, tensors = read_peft(tmp_path / "peft")
    own = pz.Bundle.read(tuned).map_tensors()
    for name, scale in (("q_proj", 8), ("v_proj", 7 / 3)):
        module = f"model.layers.1.self_attn.{name}"
        a, b = (own[f"{module}.MatMul.lora_{matrix}"] for matrix in "AB")
        np.testing.assert_allclose(change_of(config, tensors, module), scale * (a @ b).T, rtol=1e-5, atol=1e-6)


def test_factors_of_parts_are_ones_elsewhere(tmp_path: Path) -> None:
    tuned = tuned_decoder("gpt2", "ia3", tmp_path)
    pz.write_adapter(tuned, tmp_path / "peft", kind="peft")
    config, tensors = read_peft(tmp_path / "peft")
    assert config["feedforward_modules"] == [f"transformer.h.{layer}.mlp.c_proj" for layer in range(2)]
    own = pz.Bundle.read(tuned).map_tensors()
    stem = "transformer.h.0.attn.c_attn"
    expected = np.concatenate([np.ones(64), own[f"{stem}.key.ia3"], own[f"{stem}.value.ia3"]])[:, None]
    np.testing.assert_array_equal(tensors[f"base_model.model.{stem}.ia3_l"], expected.astype(np.float32))
    inner = tensors["base_model.model.transformer.h.1.mlp.c_proj.ia3_l"]
    np.testing.assert_array_equal(inner, own["transformer.h.1.mlp.c_proj.ia3"][None])


def with_adapter(folder: Path, graph: str, feed: Mapping[str, Array], *, active: bool) -> dict[str, Array]:
    """Run a graph in plain onnxruntime."""
    adapter = ort.LoraAdapter()
    adapter.Load(str(folder / "adapter.onnx_adapter"))
    options = ort.RunOptions()
    if active:
        options.add_active_adapter(adapter)
    session = ort.InferenceSession(folder / graph, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    given = {value.name: feed[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, given, options), strict=True))


@pytest.mark.parametrize(
    ("name", "train"),
    [("gpt2", "lora:r=2"), ("llama", "ia3+norm"), ("llama, int4", "lora:train=B+adapter:3"), ("llama", "prefix:2")],
)
def test_onnxruntime_takes_its_adapter(name: str, train: str, tmp_path: Path) -> None:
    """The graph beside it computes the base without, and what was tuned with the adapter."""
    path = DECODERS[name](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train=train)
    data, run, out = Sentences(path), tmp_path / "run", tmp_path / "ort"
    model = pz.load(bundle, threads=1)
    pz.Trainer(model, pz.MeZO(model, lr=0.05, eps=1e-2), data, steps=3, batch_size=4, run=run).fit()
    pz.Run(run).replay(tmp_path / "tuned")
    outcome = CliRunner().invoke(cli, ["adapter", str(run), "-o", str(out), "--format", "onnx"])
    assert outcome.exit_code == 0, outcome.output
    feed = data.batch(np.arange(8))
    for file in ("model.onnx", "generate.onnx"):
        found, base = (with_adapter(out, file, feed, active=active) for active in (True, False))
        expected, before = (plain(folder / file, feed) for folder in (tmp_path / "tuned", bundle.path))
        for key, value in expected.items():
            agree(found[key], value)
            agree(base[key], before[key])
        assert max(np.abs(value - before[key]).max() for key, value in expected.items()) > 1e-4


def checkpoint_of(folder: Path, model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    folder.mkdir()
    config = {"model_type": model_type, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder / "model.safetensors", [(name, np.zeros(shape, np.float16)) for name, shape in shapes.items()])
    return folder


def test_a_joined_projection_is_taken_apart_for_its_checkpoint(tmp_path: Path) -> None:
    """genai joins what the checkpoint has as three modules."""
    tuned = tuned_decoder("genai", "lora:r=2", tmp_path)
    names = {f"model.layers.{n}.self_attn.{name}_proj.weight": (size, 64) for n in range(2) for name, size in SIZES}
    source = checkpoint_of(tmp_path / "llama", "llama", names)
    pz.write_adapter(tuned, tmp_path / "peft", kind="peft", checkpoint=source)
    config, tensors = read_peft(tmp_path / "peft")
    own = pz.Bundle.read(tuned).map_tensors()
    for part, role in (("q", "query"), ("v", "value")):
        a, b = (own[f"model.layers.1.self_attn.qkv_proj.MatMul.{role}.lora_{matrix}"] for matrix in "AB")
        expected = 8 * (a @ b).T
        np.testing.assert_allclose(
            change_of(config, tensors, f"model.layers.1.self_attn.{part}_proj"), expected, rtol=1e-5, atol=1e-6
        )
    assert config["base_model_name_or_path"] == str(source)


SIZES = ("q", 64), ("k", 32), ("v", 32)


@pytest.mark.parametrize(
    ("name", "train", "kind", "fault"),
    [
        (
            "llama",
            "prefix:2",
            "peft",
            "'prefix:2' does not fit into one of PEFT's adapters of LoRA: take --format onnx",
        ),
        ("llama", "adapter:2", "peft", "'adapter:2' does not fit into one of PEFT's adapters"),
        ("llama", "ia3+lora", "peft", "'lora' does not fit into one of PEFT's adapters of .IA.3"),
        ("llama", "lora+norm", "peft", "norm.weight' is trained beside what was added.* 'pocketzo merge' keeps it"),
        ("llama", "norm", "onnx", "no set added tensors to this model"),
    ],
)
def test_what_an_adapter_cannot_hold_is_named(name: str, train: str, kind: Any, fault: str, tmp_path: Path) -> None:
    bundle = pz.prepare(DECODERS[name](tmp_path / "m.onnx"), tmp_path / "base", task="causal-lm", train=train)
    with pytest.raises(BundleError, match=fault):
        pz.write_adapter(bundle.path, tmp_path / "out", kind=kind)
    assert not (tmp_path / "out").exists()


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    bundle = pz.prepare(DECODERS["llama"](tmp_path / "m.onnx"), tmp_path / "base", task="causal-lm", train="lora")
    other = checkpoint_of(tmp_path / "other", "llama", {"model.layers.0.self_attn.q_proj.weight": (128, 64)})
    with pytest.raises(BundleError, match=r"has no module for .*q_proj.MatMul.lora_A.*weight of 64 x 64; expected the"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="peft", checkpoint=other)
    with pytest.raises(BundleError, match="no such checkpoint"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="peft", checkpoint=tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"config\.json: no such file"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="peft", checkpoint=tmp_path)
    with pytest.raises(BundleError, match="already exists; choose another folder"):
        pz.write_adapter(bundle.path, tmp_path / "base", kind="peft")
    with pytest.raises(ValueError, match="kind must be 'peft', 'onnx', 'gguf', got 'lora'"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a checkpoint belongs to"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="onnx", checkpoint=other)
    notes: list[str] = []
    pz.write_adapter(bundle.path, tmp_path / "out", kind="peft", note=notes.append)
    assert len(notes) == 1
