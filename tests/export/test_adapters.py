"""Adapters by the libraries that they are for: PEFT over the checkpoint, and llama.cpp's file through gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import numpy.typing as npt
import peft
import pytest
import test_checkpoint as encoders
import test_decoders_export as decoders
import tiny_encoders
import torch
from tiny_decoders import COMMON, VOCABULARY
from transformers import LlamaConfig

import pocketzo as pz
from pocketzo.errors import BundleError
from pocketzo.export import export as export_model

Array = npt.NDArray[Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*prepacked, which is slower"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft with transformers 5.24
]


def tune(bundle: pz.Bundle, folder: Path) -> Path:
    """Save a bundle with random numbers added to what is trained."""
    rng = np.random.default_rng(8)
    model = pz.load(bundle, threads=1)
    for tensor in bundle.tensors:
        if tensor.trainable:
            model.weights[tensor.name] = (model.weights[tensor.name] + 0.1 * rng.normal(size=tensor.shape)).astype("f4")
    model.save(folder)
    return folder


def agree(found: Array, expected: Array, base: Array) -> None:
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-4 * largest
    assert np.abs(base - expected).max() > 1e-2 * largest


IDS = np.random.default_rng(3).integers(0, VOCABULARY, (2, 9))
ONES = np.ones_like(IDS)


@pytest.mark.parametrize(
    ("family", "train"),
    [
        ("llama", "lora:r=4"),
        ("llama", "ia3"),
        ("gpt2", "lora:r=2,alpha=3"),
        ("gpt2", "lora:r=2,targets=attn.q_proj|o_proj|up_proj|down_proj"),
        ("gpt2", "ia3"),
        ("qwen2", "lora:r=3,targets=_proj+lora:r=2,targets=lm_head"),
        ("phi3", "lora:r=2"),
        ("gemma3", "lora:r=2,layers=1"),
        ("opt", "lora:r=2,targets=fc|out_proj"),
    ],
)
def test_peft_loads_a_decoders_adapter(family: str, train: str, tmp_path: Path) -> None:
    exported = decoders.export(family, tmp_path)
    bundle = pz.prepare(exported.path, tmp_path / "base", task="causal-lm", train=train)
    tuned = tune(bundle, tmp_path / "tuned")
    pz.write_adapter(tuned, tmp_path / "peft", kind="peft", checkpoint=tmp_path / "checkpoint")
    base = decoders.expected(exported.model, IDS, ONES)
    model = peft.PeftModel.from_pretrained(exported.model, str(tmp_path / "peft"))
    wanted, _ = decoders.Graph(tuned / "generate.onnx").run(IDS, ONES)
    agree(decoders.expected(model.eval(), IDS, ONES), wanted, base)
    if family != "phi3":  # the checkpoint alone shows that one module has queries, keys and values
        pz.write_adapter(tuned, tmp_path / "unchecked", kind="peft")
        files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("peft", "unchecked")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_was_trained_beside_integers_fits_the_checkpoint(tmp_path: Path) -> None:
    exported = decoders.export("llama", tmp_path)
    export_model(tmp_path / "checkpoint", tmp_path / "int4.onnx", dtype="int4")
    bundle = pz.prepare(tmp_path / "int4.onnx", tmp_path / "base", task="causal-lm", train="lora:r=2")
    tuned = tune(bundle, tmp_path / "tuned")
    pz.write_adapter(tuned, tmp_path / "peft", kind="peft", checkpoint=tmp_path / "checkpoint")
    base = decoders.expected(exported.model, IDS, ONES)
    model = peft.PeftModel.from_pretrained(exported.model, str(tmp_path / "peft")).eval()
    wanted, _ = decoders.Graph(tuned / "generate.onnx").run(IDS, ONES)
    found = decoders.expected(model, IDS, ONES)
    assert np.abs(found - wanted).max() < 0.5 * np.abs(base - wanted).max()  # the rest is what 4 bits round


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("train", ["lora:r=2", "ia3", "lora:r=2,targets=dense"])
def test_peft_loads_an_encoders_adapter(head: str, train: str, tmp_path: Path) -> None:
    model = tiny_encoders.model_of("bert", head)
    tiny_encoders.save(tmp_path / "checkpoint", model)
    export_model(tmp_path / "checkpoint", tmp_path / "m.onnx")
    tuned = tune(pz.prepare(tmp_path / "m.onnx", tmp_path / "base", train=train), tmp_path / "tuned")
    pz.write_adapter(tuned, tmp_path / "peft", kind="peft", checkpoint=tmp_path / "checkpoint")
    batch = encoders.batch_of(model, 1, 9) | {"labels": np.zeros(1, np.int64)}
    if head == "ForMaskedLM":
        batch["labels"] = batch["input_ids"]
    base = encoders.expected(model, batch)
    tuned_model = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft")).eval()
    agree(encoders.expected(tuned_model, batch), encoders.run(tuned / "model.onnx", batch)["logits"], base)


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


def with_adapter(model: Any, base: Path, adapter: Path, arch: str) -> Array:
    """Return logits of a model with the numbers of a GGUF file, to which an adapter was added as llama.cpp does.

    The sums are in the file's layout. From there they get into the model as transformers' loader gets them.
    """
    reader = gguf.GGUFReader(adapter)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    assert (facts["general.type"], facts["adapter.type"], facts["general.architecture"]) == ("adapter", "lora", arch)
    matrices = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), model.config.num_hidden_layers
    )
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(base).tensors}
    used = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, last = name.rpartition(".")
            there = f"{names.get_name(module)}.{last}"
            a, b = (matrices.get(f"{there}.lora_{part}") for part in "ab")
            if a is None or b is None:
                continue
            used.add(there)
            assert a.shape[1] == stored[there].shape[1]  # as llama.cpp checks them
            assert b.shape[0] == stored[there].shape[0]
            whole = stored[there] + facts["adapter.lora.alpha"] / b.shape[1] * (b @ a)
            _, undo = gguf_files._changes(arch, there, model.config)
            parameter.copy_(torch.from_numpy(np.array(undo(whole), np.float32)))
    assert len(used) == len(matrices) / 2
    return decoders.expected(model, IDS, ONES)


@pytest.mark.parametrize(
    ("arch", "train"),
    [
        ("llama", "lora:r=4"),
        ("llama", "lora:r=4,targets=_proj"),
        ("qwen2", "lora:r=2,alpha=5,targets=[qk]_proj+lora:r=3,targets=down_proj"),
        ("gpt2", "lora:r=2"),
        ("phi3", "lora:r=2"),
    ],
)
def test_llama_cpps_adapter_gives_the_same_logits(arch: str, train: str, tmp_path: Path) -> None:
    exported = decoders.export(arch, tmp_path)
    facts = {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2}
    if arch == "gpt2":
        facts["attention.head_count_kv"] = 4
    base = tmp_path / "model.gguf"
    gguf_files.write(base, arch, exported.model, facts, pre=None)  # F32: the model's numbers stay
    tuned = tune(pz.prepare(exported.path, tmp_path / "base", task="causal-lm", train=train), tmp_path / "tuned")
    wanted, _ = decoders.Graph(tuned / "generate.onnx").run(IDS, ONES)
    before = decoders.expected(exported.model, IDS, ONES)
    state = {name: value.clone() for name, value in exported.model.state_dict().items()}
    for name, source in (("folder", tmp_path / "checkpoint"), ("file", base)):
        exported.model.load_state_dict(state)
        pz.write_adapter(tuned, tmp_path / name, kind="gguf", checkpoint=source)
        agree(with_adapter(exported.model, base, tmp_path / name / "adapter.gguf", arch), wanted, before)


def test_what_llama_cpp_cannot_hold_is_named(tmp_path: Path) -> None:
    exported = decoders.export("llama", tmp_path)
    bundle = pz.prepare(exported.path, tmp_path / "base", task="causal-lm", train="ia3")
    with pytest.raises(BundleError, match=r"'ia3' does not fit into llama\.cpp's adapters"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="gguf", checkpoint=tmp_path / "checkpoint")
    bundle = pz.prepare(exported.path, tmp_path / "lora", task="causal-lm", train="lora")
    with pytest.raises(ValueError, match="'gguf' needs the checkpoint"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="gguf")
    other = gguf_files.model_of(LlamaConfig(**COMMON | {"num_hidden_layers": 2, "hidden_size": 128}))
    facts = {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2}
    gguf_files.write(tmp_path / "other.gguf", "llama", other, facts, pre=None)
    with pytest.raises(BundleError, match=r"attn_q.weight is \(128, 128\), expected \(64, 64\), the shape of"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="gguf", checkpoint=tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(BundleError, match="damaged or not a GGUF file"):
        pz.write_adapter(bundle.path, tmp_path / "out", kind="gguf", checkpoint=tmp_path / "other.gguf")
    assert not (tmp_path / "out").exists()
