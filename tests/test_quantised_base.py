"""``prepare(base=...)``: the frozen weights of a float export are quantised, whatever is trained beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from decoders import gpt2_weights, llama_weights, write_gpt2, write_llama
from graphs import MODELS, inputs_of
from test_decoders import blocks
from test_language_models import Sentences

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.formats.safetensors import file_sha256
from pocketzo.graph.blocks import Scheme
from pocketzo.graph.matrices import Matrices
from pocketzo.graph.nbits import quantise


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model.onnx"
    write_llama(path, llama_weights(kv_heads=2), 2)
    return path


def prepare(model: Path, out: Path, **options: Any) -> pz.Bundle:
    return pz.prepare(model, out, **({"task": "causal-lm", "train": "lora:r=2"} | options))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def trained(bundle: pz.Bundle) -> set[str]:
    return {tensor.name for tensor in bundle.tensors if tensor.trainable}


def loss(bundle: pz.Bundle, model: Path) -> float:
    return pz.load(bundle, threads=1).loss(Sentences(model).batch(np.arange(8)))


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_as_near_as_their_bits_allow(bits: Any, size: int, symmetric: bool) -> None:
    count = 200 if symmetric else 256
    rows = np.random.default_rng(1).normal(0.2, 1, (5, count)).astype(np.float32)
    rows[1] = 0
    rows[2] = 1e-42
    blocks = Scheme(bits, size, symmetric).blocks(rows)
    assert (blocks.bits, blocks.size, blocks.offsets is None) == (bits, size, symmetric)
    assert blocks.scales.shape == (5, -(-count // size))
    padded = np.pad(rows, ((0, 0), (0, -count % size))).reshape(5, -1, size)
    steps = np.abs(padded).max(-1) / (1 << bits - 1) if symmetric else np.ptp(padded, axis=-1) / ((1 << bits) - 1)
    worst = np.abs(blocks.array().reshape(padded.shape) - padded).max(-1)
    most = 1.02 if symmetric else 0.51  # the largest number of the other sign is cut; scales have 11 bits
    assert (worst <= most * steps + 1e-40).all()
    assert worst.max() > 0.2 * steps.max()


def test_schemes() -> None:
    with pytest.raises(ValueError, match="expected rows of whole blocks, got 200 numbers"):
        Scheme(4, 128, symmetric=False).blocks(np.ones((2, 200), np.float32))
    assert Scheme.parse("int4") == Scheme(4) == Scheme.parse("int4:block=32")
    assert Scheme.parse("int8:block=128") == Scheme(8, 128)
    for text in "int3", "int4:block=48", "int4:64", "int4:block=", "", "float32":
        with pytest.raises(ValueError, match=r"expected int4 or int8, .* got "):
            Scheme.parse(text)


@pytest.mark.parametrize("bits", [4, 8])
def test_offsets_are_found_in_what_the_quantiser_writes(bits: Any, model: Path, tmp_path: Path) -> None:
    """Of 8 bits, an offset is added to the sum of two planes."""
    quantise(model, tmp_path / "model.onnx", Matrices(Scheme(bits, 32, symmetric=False)))
    bundle = prepare(tmp_path / "model.onnx", tmp_path / "base", train="lora:r=2+norm")
    assert {name.rpartition(".")[2] for name in trained(bundle)} == {"lora_A", "lora_B", "weight"}
    offsets = [tensor for tensor in bundle.frozen if tensor.name.endswith(".offsets")]
    assert len(offsets) > 10
    assert {tensor.reason.partition(":")[0] for tensor in offsets} == {"quantised"}
    assert abs(loss(bundle, model) - loss(prepare(model, tmp_path / "floats"), model)) < 0.2


@pytest.mark.parametrize("base", ["int4:block=128", "int8:block=128"])
def test_rows_that_are_no_whole_blocks(base: str, model: Path, tmp_path: Path) -> None:
    """Products pad them; the table of tokens stays float32, and that is said."""
    notes: list[str] = []
    bundle = prepare(model, tmp_path / "base", base=base, note=notes.append)
    assert "base: embedding tables in float32: 1 of F32" in notes
    assert "GatherBlockQuantized" not in operators(bundle.model_path)
    off = abs(loss(bundle, model) - loss(prepare(model, tmp_path / "floats"), model))
    assert 0 < off < (0.2 if base.startswith("int4") else 0.02)


def test_names_do_not_depend_on_the_base(model: Path, tmp_path: Path) -> None:
    """As exporters name a transposed weight."""
    renamed = onnx.load(model)
    for tensor in renamed.graph.initializer:
        for node in renamed.graph.node:
            if node.op_type == "MatMul" and node.input[1] == tensor.name:
                node.input[1] = node.name.replace("/", ".").strip(".") + ".weight_t"
                tensor.name = node.input[1]
    onnx.save(renamed, tmp_path / "model.onnx")
    names = [
        trained(prepare(tmp_path / "model.onnx", tmp_path / str(base), base=base)) for base in (None, "int4", "int8")
    ]
    assert names[0] == names[1] == names[2]
    assert not any("weight" in name for name in names[0])


# ---- bundles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["int4", "int8", "int4:block=16", "int8:block=64"])
def test_what_is_trained_is_that_of_the_float_base(base: str, model: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    floats = prepare(model, tmp_path / "floats")
    bundle = prepare(model, tmp_path / "base", base=base, note=notes.append)
    assert trained(bundle) == trained(floats)
    assert {tensor.id for tensor in bundle.tensors if tensor.trainable} == {
        tensor.id for tensor in floats.tensors if tensor.trainable
    }
    assert any(line.startswith("base: ") and "quantised as" in line for line in notes)
    for path in bundle.model_path, bundle.generate_path:
        found = operators(path)
        assert "MatMulNBits" in found
        assert "GatherBlockQuantized" in found
    share = bundle.weights_path.stat().st_size / floats.weights_path.stat().st_size
    assert share < (0.35 if base.startswith("int4") else 0.55)
    off = abs(loss(bundle, model) - loss(floats, model))
    assert 0 < off < (0.2 if base.startswith("int4") else 0.02)
    assert not list(tmp_path.glob(".pocketzo-*"))


def test_a_run_trains_and_replays(model: Path, tmp_path: Path) -> None:
    bundle = prepare(model, tmp_path / "base", base="int4", train="lora:r=2,train=B+norm")
    loaded = pz.load(bundle, threads=1)
    optimizer = pz.MeZO(loaded, lr=1e-2, eps=1e-2)
    pz.Trainer(loaded, optimizer, Sentences(model), run=tmp_path / "run", steps=4, batch_size=4).fit()
    pz.Run(tmp_path / "run").replay(tmp_path / "tuned")
    tuned = pz.Bundle.read(tmp_path / "tuned")
    assert file_sha256(tuned.trained_path) == loaded.weights.sha256() != bundle.prepared_sha256
    assert tuned.weights_path.samefile(bundle.weights_path)


def test_norms_of_a_quantised_base_have_a_file_of_their_own(model: Path, tmp_path: Path) -> None:
    lora = prepare(model, tmp_path / "lora", base="int4")
    norm = prepare(model, tmp_path / "norm", base="int4", train="norm", share_base=lora.path)
    assert norm.weights_path.samefile(lora.weights_path)
    assert {path for name, (path, _) in norm.places.items() if name in trained(norm)} == {norm.trained_path}
    again = prepare(model, tmp_path / "again", base="int4", train="norm")
    assert (again.graph_sha256, again.base_sha256, again.adapter) == (
        *(norm.graph_sha256, norm.base_sha256, norm.adapter),
    )


def test_biases_of_gpt2(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "model.onnx", gpt2_weights(), gemm=True)
    bundle = prepare(tmp_path / "model.onnx", tmp_path / "base", base="int4", train="bias")
    floats = prepare(tmp_path / "model.onnx", tmp_path / "floats", train="bias")
    assert trained(bundle) == trained(floats)
    assert 0 < abs(loss(bundle, tmp_path / "model.onnx") - loss(floats, tmp_path / "model.onnx")) < 0.2


@pytest.mark.parametrize("train", ["all", "head", "last:1", "lora+q_proj", "norm+all"])
def test_quantised_weights_are_not_trained(train: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base='int4' quantises the model's matrices, which then cannot be trained"):
        prepare(model, tmp_path / "base", base="int4", train=train)
    assert not (tmp_path / "base").exists()


def test_options_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base: expected int4 or int8, .* got 'int5'"):
        prepare(model, tmp_path / "base", base="int5")
    with pytest.raises(ValueError, match="exclude each other"):
        prepare(model, tmp_path / "base", base="int4", dtype="float16")
    lora = prepare(model, tmp_path / "lora", base="int4")
    with pytest.raises(pz.BundleError, match="other weights than those of this model"):
        prepare(model, tmp_path / "base", base="int8", share_base=lora.path)


def test_what_is_quantised_already_is_refused(model: Path, tmp_path: Path) -> None:
    logging.disable(logging.WARNING)  # onnxruntime's quantiser writes to the root logger
    blocks(model, tmp_path / "model.onnx", 4, "MatMul", "Gather")
    logging.disable(logging.NOTSET)
    with pytest.raises(pz.BundleError, match=r"model\.onnx: there is nothing to quantise"):
        prepare(tmp_path / "model.onnx", tmp_path / "base", base="int4")


def test_the_command(model: Path, tmp_path: Path) -> None:
    def command(*arguments: object) -> tuple[int, str]:
        found = CliRunner().invoke(cli, ["prepare", str(model), "-o", str(tmp_path / "base"), *map(str, arguments)])
        return found.exit_code, found.output

    code, text = command("--task", "causal-lm", "--base", "int4")
    assert code == 1
    assert "train a set that is added" in " ".join(text.split())
    code, text = command("--train", "side-head", "--base", "int4")
    assert code == 1
    assert "base is not an option of train='side-head'" in text
    code, text = command("--task", "causal-lm", "--base", "int4:block=16", "--train", "ia3")
    assert code == 0, text
    assert "quantised as int4 in blocks of 16" in text


@pytest.mark.parametrize("name", ["bert-new", "bert-old"])
def test_an_encoder(name: str, tmp_path: Path) -> None:
    path = MODELS / f"{name}.onnx"
    feed = inputs_of(name) | {"labels": np.arange(len(inputs_of(name)["input_ids"])) % 3}
    losses = []
    cases: list[dict[str, Any]] = [{"base": "int8:block=16"}, {}]
    for options in cases:
        bundle = pz.prepare(path, tmp_path / str(len(options)), train="bias", **options)
        losses.append(pz.load(bundle, threads=1).loss(feed))
        assert ("MatMulNBits" in operators(bundle.model_path)) == ("base" in options)
    assert 0 < abs(losses[0] - losses[1]) < 0.01
