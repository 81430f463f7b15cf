"""Sets of ``--train``: they begin as the base, train, replay bit for bit, and plain onnxruntime agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import safetensors.numpy
from cut_minilm import cut
from decoders import HEADS, SIZE, VOCABULARY, Array
from graphs import MODELS, inputs_of, linear, model_of, node, weight
from test_decoders import FLOATS, MATMULS, batch_of, plain
from test_language_models import QUANTISED, Sentences, token_losses, warm

import pocketzo as pz
from pocketzo.errors import BundleError
from pocketzo.export.bert import build_onnx
from pocketzo.formats.safetensors import file_sha256
from pocketzo.kernels import noise

pytestmark = [
    pytest.mark.usefixtures("quiet_quantiser"),
    pytest.mark.filterwarnings("ignore:.*prepacked, which is slower"),
]


def write_quantised(name: str, of: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        source = MATMULS[of](path.with_name("source.onnx"))
        QUANTISED[name][0](source, path)
        return path

    return write


DECODERS: dict[str, Callable[[Path], Path]] = FLOATS | {
    f"{of}, {name}": write_quantised(name, of)
    for of in ("llama", "gpt2", "genai")
    for name in ("int4", "int8 in blocks", "dynamic int8", "QDQ")
}
SOME_QUANTISED = ["llama, int4", "gpt2, dynamic int8", "genai, QDQ"]
ADDED = ["lora:r=2", "ia3", "adapter:4"]


def unoptimised(path: Path, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph as it is: fusions that an added node prevents round otherwise."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: feed[v.name] for v in session.get_inputs()}), strict=True))


def stored(bundle: pz.Bundle) -> dict[str, Array]:
    """Return the tensors of a bundle by name, from all its files."""
    return {
        spec.name: safetensors.numpy.load_file(path)[spec.name]
        for spec, (path, _) in zip(bundle.tensors, bundle.places.values(), strict=True)
    }


def check_training(bundle: pz.Bundle, folder: Path, data: Any) -> pz.Model:
    """Train 3 steps, and check that they move the sets alone, and that the journal gives the same again."""
    model = pz.load(bundle, threads=1)
    pz.Trainer(model, pz.MeZO(model, lr=1e-2, seed=4), data, steps=3, batch_size=4, run=folder / "run").fit()
    model.save(folder / "tuned")
    before, after = (stored(one) for one in (bundle, pz.Bundle.read(folder / "tuned")))
    moved = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert moved == {tensor.name for tensor in bundle.tensors if tensor.trainable}
    pz.Run(folder / "run").replay(folder / "replayed")
    tuned, replayed = (pz.Bundle.read(folder / name) for name in ("tuned", "replayed"))
    assert file_sha256(tuned.trained_path) == file_sha256(replayed.trained_path)
    if bundle.adapter is not None:
        for copy in tuned, replayed:
            assert copy.weights_path.samefile(bundle.weights_path)
    return model


@pytest.mark.parametrize(
    ("name", "train"),
    [(name, train) for train in ADDED for name in (DECODERS if train == ADDED[0] else [*FLOATS, *SOME_QUANTISED])],
)
def test_a_set_is_added_to_a_decoder(name: str, train: str, tmp_path: Path) -> None:
    path = DECODERS[name](tmp_path / "m.onnx")
    data = Sentences(path)
    everything = data.batch(np.arange(len(data)))
    base = pz.prepare(path, tmp_path / "base", task="causal-lm", train="norm")
    bundle = pz.prepare(path, tmp_path / "added", task="causal-lm", train=train)
    assert set(bundle.trainable) == {train}
    assert all(tensor.dtype == "float32" for tensor in bundle.tensors if tensor.trainable)
    frozen = {tensor.name for tensor in bundle.frozen}
    assert {tensor.name for tensor in base.tensors if tensor.trainable} <= frozen

    for file in ("model.onnx", "generate.onnx"):
        expected = unoptimised(base.path / file, everything)
        for key, value in unoptimised(bundle.path / file, everything).items():
            np.testing.assert_array_equal(value, expected[key])

    model = check_training(bundle, tmp_path, data)
    tolerance = next((bound for kind, (_, _, bound) in QUANTISED.items() if name.endswith(kind)), 1e-4)
    trained = model.run(everything)["token_losses"]
    bound = tolerance * np.abs(trained).max()
    assert np.abs(trained - pz.load(base, threads=1).run(everything)["token_losses"]).max() > 1e-5
    logits = plain(tmp_path / "tuned" / "generate.onnx", everything)["logits"]
    np.testing.assert_allclose(trained, token_losses(logits, everything), rtol=0, atol=bound)


def words_of(name: str) -> tuple[dict[str, Array], str]:
    """Return a batch of an encoder with labels, and its path."""
    inputs = inputs_of(name)
    return inputs | {"labels": np.arange(len(inputs["input_ids"])) % 3}, str(MODELS / f"{name}.onnx")


@pytest.mark.parametrize("train", [*ADDED, "lora:r=2,layers=1,train=B+norm", "last:1+head"])
@pytest.mark.parametrize("name", ["bert-old", "bert-new"])
def test_a_set_of_an_encoder_learns(name: str, train: str, tmp_path: Path) -> None:
    feed, path = words_of(name)
    bundle = pz.prepare(path, tmp_path / "base", train=train)
    assert set(bundle.trainable) == set(train.split("+"))
    base = pz.prepare(path, tmp_path / "all")
    for key, value in unoptimised(bundle.model_path, feed).items():
        np.testing.assert_array_equal(value, unoptimised(base.model_path, feed)[key])
    model = pz.load(bundle, threads=1)
    before = model.loss(feed)
    optimizer = pz.MeZO(model, lr=1.0 if train == "ia3" else 0.05, eps=1e-2, seed=3)
    for _ in range(60):
        optimizer.step(lambda model: model.loss(feed))
    assert model.loss(feed) < before - 1e-3


def test_the_sets_of_an_encoder(tmp_path: Path) -> None:
    path = MODELS / "bert-old.onnx"
    bundle = pz.prepare(path, tmp_path / "base", train="head+last:1+norm+bias")
    sets = {name: set(names) for name, names in bundle.trainable.items()}
    assert sets["head"] == {f"{n}.{kind}" for n in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    every = {tensor.name for tensor in bundle.tensors} | {tensor.name for tensor in bundle.frozen}
    assert sets["last:1"] == {name for name in every if name.startswith("bert.encoder.layer.1.")}
    assert sets["norm"] == {name for name in every if ".LayerNorm." in name}
    assert sets["bias"] == {name for name in every if name.endswith(".bias")}


@pytest.mark.parametrize(
    ("name", "train", "names"),
    [
        ("llama", "lora:layers=1", {"q_proj.MatMul", "v_proj.MatMul"}),
        ("llama", "lora:targets=gate|o_proj,layers=1", {"o_proj.MatMul", "gate_proj.MatMul"}),
        ("gpt2", "lora:layers=1", {"c_attn.query", "c_attn.value"}),
        ("gpt2", "lora:layers=1,targets=c_attn", {"c_attn"}),
        ("genai", "lora:layers=1", {"qkv_proj.MatMul.query", "qkv_proj.MatMul.value"}),
    ],
)
def test_targets_and_layers(name: str, train: str, names: set[str], tmp_path: Path) -> None:
    bundle = pz.prepare(FLOATS[name](tmp_path / "m.onnx"), tmp_path / "base", task="causal-lm", train=train)
    added = {tensor.name for tensor in bundle.tensors if tensor.trainable}
    assert all(".1." in tensor for tensor in added)
    ends = {f"{end}.lora_{matrix}" for end in names for matrix in "AB"}
    assert {next(end for end in ends if tensor.endswith(end)) for tensor in added} == ends
    assert len(added) == len(ends)


def test_the_product_of_matrices_is_added_to_their_columns_only(tmp_path: Path) -> None:
    """With B of the queries of one layer set, the first layer's cache of keys and values stays, and logits change as
    those of the export with the sum as its weight."""
    path = FLOATS["gpt2"](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train="lora:r=4,alpha=2")
    tensors = stored(bundle)
    rng = np.random.default_rng(1)
    model = pz.load(bundle, threads=1)
    merged = onnx.load(path)
    weights = {tensor.name: tensor for tensor in merged.graph.initializer}
    stem = "transformer.h.0.attn.c_attn"
    whole = onnx.numpy_helper.to_array(weights[f"{stem}.weight"]).copy()
    for role, start in (("query", 0), ("value", 128)):
        up = rng.normal(size=(4, 64)).astype(np.float32)
        model.weights[f"{stem}.{role}.lora_B"] = up
        whole[:, start : start + 64] += 0.5 * tensors[f"{stem}.{role}.lora_A"] @ up
    weights[f"{stem}.weight"].CopyFrom(onnx.numpy_helper.from_array(whole, f"{stem}.weight"))
    onnx.save(merged, tmp_path / "merged.onnx")
    data = Sentences(path)
    everything = data.batch(np.arange(len(data)))
    expected = token_losses(plain(tmp_path / "merged.onnx", everything)["logits"], everything)
    np.testing.assert_allclose(model.run(everything)["token_losses"], expected, rtol=1e-4, atol=1e-4)


def test_matrices_begin_as_the_formats_say(tmp_path: Path) -> None:
    path = FLOATS["llama"](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train="lora:r=3,train=B")
    tensors = stored(bundle)
    drawn = [tensor for tensor in bundle.tensors if tensor.name.endswith("lora_A")]
    assert len(drawn) == 4
    for tensor in drawn:
        z = noise(64 * 3, seed=0, tensor=tensor.id, draw=2**64 - 1)
        np.testing.assert_array_equal(tensors[tensor.name], (z * np.float32(1 / np.sqrt(3 * 64))).reshape(64, 3))
        assert not tensor.trainable
        assert [one.reason for one in bundle.frozen if one.name == tensor.name] == ["request: train=lora:r=3,train=B"]
    again = pz.prepare(path, tmp_path / "again", task="causal-lm", train="+".join(bundle.trainable))
    assert (again.base_sha256, again.adapter) == (bundle.base_sha256, bundle.adapter)


def test_float16_weights_keep_float32_matrices(tmp_path: Path) -> None:
    path = FLOATS["llama"](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", dtype="float16", train="lora+ia3+adapter:2")
    assert {tensor.dtype for tensor in bundle.tensors if tensor.trainable} == {"float32"}
    assert {tensor.dtype for tensor in bundle.tensors} == {"float32", "float16"}
    base = pz.prepare(path, tmp_path / "half", task="causal-lm", dtype="float16")
    feed = Sentences(path).batch(np.arange(8))
    got, expected = (unoptimised(one.model_path, feed)["token_losses"] for one in (bundle, base))
    np.testing.assert_array_equal(got, expected)


# ---- a prefix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen2-vl", "qwen3", "llama, int4"])
def test_a_prefix_begins_as_tokens_in_front(name: str, tmp_path: Path) -> None:
    path = DECODERS[name](tmp_path / "m.onnx")
    data = Sentences(path)
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train="prefix:3")
    assert all(tensor.name.startswith("prefix.past_key_values.") for tensor in bundle.tensors if tensor.trainable)
    front = np.argsort(noise(VOCABULARY, seed=0, tensor=0xFFFFFFFF, draw=2**64 - 1), kind="stable")[:3]
    ids = np.concatenate([np.tile(front, (8, 1)), data.ids], axis=1)
    mask = np.concatenate([np.ones((8, 3), np.int64), data.mask], axis=1)
    expected = plain(path, batch_of(path, ids, mask))
    everything = data.batch(np.arange(8))
    losses = pz.load(bundle, threads=1).run(everything)["token_losses"]
    np.testing.assert_allclose(losses, token_losses(expected["logits"][:, 3:], everything), rtol=1e-3, atol=1e-4)

    full = data.lengths == 7  # a cache of the tokens before has no prefix
    last = warm(bundle.generate_path, data)
    np.testing.assert_allclose(last["logits"][:, 0], expected["logits"][full, -1], rtol=1e-3, atol=1e-4)
    for key, value in last.items():
        if key != "logits":
            np.testing.assert_allclose(value, expected[key][full][:, :, 3:], rtol=1e-3, atol=1e-4)
    check_training(bundle, tmp_path, data)


# ---- what is refused -------------------------------------------------------------------------------------------------


def fused(path: Path) -> Path:
    """An Attention of onnxruntime, which has the weights of all three."""
    tensors = [weight("qkv.weight", 8, 24), weight("qkv.bias", 24), weight("fc.weight", 8, 3)]
    nodes = [
        node("Attention", "x qkv.weight qkv.bias", "a", domain="com.microsoft", num_heads=2),
        node("MatMul", "a fc.weight", "logits"),
    ]
    return model_of(
        path,
        nodes,
        tensors,
        inputs=(("x", onnx.TensorProto.FLOAT, ("batch", "sequence", 8)),),
        outputs=[("logits", ("batch", "sequence", 3))],
    )


def interleaved(path: Path) -> Path:
    """GPT-NeoX: queries, keys and values of each head follow each other."""
    model = onnx.load(FLOATS["gpt2"](path))
    for split in [one for one in model.graph.node if one.op_type == "Split"]:
        at = list(model.graph.node).index(split)
        shape = onnx.numpy_helper.from_array(np.array([0, 0, HEADS, 3, SIZE]), f"{split.output[0]}.shape")
        rows = onnx.numpy_helper.from_array(np.array([0, 0, HEADS * SIZE]), f"{split.output[0]}.rows")
        model.graph.initializer.extend([shape, rows])
        new = [node("Reshape", f"{split.input[0]} {shape.name}", f"{split.output[0]}.heads")]
        for index, output in enumerate(split.output):
            number = onnx.numpy_helper.from_array(np.array(index), f"{output}.number")
            model.graph.initializer.append(number)
            new += [
                node("Gather", f"{new[0].output[0]} {number.name}", f"{output}.part", axis=3),
                node("Reshape", f"{output}.part {rows.name}", output),
            ]
        model.graph.node.remove(split)
        for one in reversed(new):
            model.graph.node.insert(at, one)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("write", "train", "fault"),
    [
        (linear, "lora", "train='lora': no attention was found in the graph: name the projections by targets=REGEX"),
        (linear, "lora:targets=nothing", "'targets' matches none of 1 projections, such as 'fc.weight'"),
        (linear, "ia3", "no layers were found"),
        (linear, "adapter:2", "no layers were found"),
        (linear, "head", "no layers were found"),
        (linear, "bias", "train='bias': the graph has no such weights that can be trained; they are 'fc.weight'"),
        (linear, "lora:targets=fc+lora:targets=f", r"adds 'fc.lora_A', as 'lora:targets=fc' does"),
        (
            fused,
            "lora",
            r"the query of layer 0 was not found, as node 'node_a' \(Attention\) multiplies by its weights",
        ),
        (
            interleaved,
            "lora",
            "'transformer.h.0.attn.c_attn.weight' are mixed with those of other roles: name projections",
        ),
        (FLOATS["llama"], "lora:layers=2-", "layers=2-: the model has 2 layers, 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    write: Callable[[Path], Path], train: str, fault: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.onnx")
    with pytest.raises(BundleError, match=fault):
        pz.prepare(path, tmp_path / "out", train=train)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("merged gpt2", "one of its branches has no cache: export the decoder without merging"),
        ("genai", "GroupQueryAttention takes no past of texts of different lengths"),
        ("gpt2, dynamic int8", "the model rounds all tokens of a batch together"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(name: str, fault: str, tmp_path: Path) -> None:
    path = DECODERS[name](tmp_path / "m.onnx")
    with pytest.raises(BundleError, match=f"train='prefix:3' is not possible here: {fault}"):
        pz.prepare(path, tmp_path / "out", task="causal-lm", train="prefix:3")
    with pytest.raises(ValueError, match="train='prefix:3' is for a decoder that is prepared with a task"):
        pz.prepare(path, tmp_path / "out", train="prefix:3")
    with pytest.raises(BundleError, match="the graph has no inputs past_key_values"):
        pz.prepare(MODELS / "gpt2-new.onnx", tmp_path / "out", task="causal-lm", train="prefix:3")


def test_a_projection_of_all_three_takes_one_pair_of_matrices(tmp_path: Path) -> None:
    bundle = pz.prepare(
        interleaved(tmp_path / "m.onnx"), tmp_path / "out", task="causal-lm", train="lora:targets=c_attn"
    )
    assert {tensor.shape for tensor in bundle.tensors if tensor.trainable} == {(64, 8), (8, 192)}
    pz.load(bundle, threads=1)


@pytest.mark.parametrize("train", ["lora+ia3+adapter:4", "head"])
def test_minilm_takes_sets(train: str, tmp_path: Path) -> None:
    build_onnx(cut(tmp_path), tmp_path / "m.onnx", 3)
    bundle = pz.prepare(tmp_path / "m.onnx", tmp_path / "base", train=train)
    if train == "head":
        assert all(name.startswith("classifier") for name in bundle.trainable["head"])
        return
    base = pz.prepare(tmp_path / "m.onnx", tmp_path / "all")
    assert base.probe is not None
    got, expected = (unoptimised(one.model_path, base.probe)["logits"] for one in (bundle, base))
    np.testing.assert_array_equal(got, expected)
    assert len(bundle.trainable["lora"]) == len(bundle.trainable["adapter:4"]) == 4
    assert len(bundle.trainable["ia3"]) == 3
    pz.load(bundle, threads=1)
