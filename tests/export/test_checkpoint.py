"""Folders of checkpoints, through the public function, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import tiny_encoders as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import FAMILIES, HEADS, POSITIONS, VOCABULARY
from tokenizers import Tokenizer
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration

import pocketzo as pz
from pocketzo import Error
from pocketzo.export import export as export_model

Array = npt.NDArray[Any]
TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")


def export(folder: Path, **options: Any) -> tuple[Path, list[str]]:
    lines: list[str] = []
    out = folder.parent / "out" / "model.onnx"
    export_model(folder, out, note=lines.append, **options)
    return out, lines


def batch_of(model: Any, rows: int, length: int, seed: int = 5) -> dict[str, Array]:
    """Return random tokens; all rows but the first are padded on the right, the last one to a single token."""
    rng, padding = np.random.default_rng(seed), model.config.pad_token_id
    lengths = np.linspace(length, 1, rows).astype(int)[:, None] if rows > 1 else np.array([[length]])
    mask = (np.arange(length) < lengths).astype(np.int64)
    ids = np.where(mask > 0, rng.integers(0, VOCABULARY, mask.shape), padding)
    kinds = rng.integers(0, getattr(model.config, "type_vocab_size", 1), mask.shape)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}


def run(path: Path, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph as its users do, with all optimisations."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(
        zip(names, session.run(names, {each.name: batch[each.name] for each in session.get_inputs()}), strict=True)
    )


def expected(model: Any, batch: Mapping[str, Array]) -> Array:
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 1) > 1:
        names.append("token_type_ids")
    with torch.no_grad():
        found: Array = model(**{name: torch.from_numpy(batch[name]) for name in names})[0].numpy()
    return found


def off(found: Array, wanted: Array, mask: Array) -> float:
    there = mask > 0 if found.ndim == 3 else ...
    return float(np.abs(found - wanted)[there].max() / np.abs(wanted).max())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, Path]]:
    """Return a function that exports the model of a family and a head, once."""

    @cache
    def of(family: str, head: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(family) / "checkpoint"
        model = tiny.model_of(family, head)
        tiny.save(folder, model)
        return model, export(folder)[0]

    return of


@pytest.fixture(params=[(family, head) for family in FAMILIES for head in HEADS], ids="".join)
def encoder(request: pytest.FixtureRequest, exported: Callable[[str, str], tuple[Any, Path]]) -> tuple[Any, Path]:
    return exported(*request.param)


def test_outputs_are_those_of_transformers(encoder: tuple[Any, Path]) -> None:
    """With other rows and lengths than the graph was traced with, up to the last position."""
    model, path = encoder
    family = model.config.model_type
    name = "last_hidden_state" if type(model).__name__.endswith("Model") else "logits"
    longest = POSITIONS - 2 if family in ("mpnet", "roberta") else POSITIONS
    differences = []
    for shape in ((3, 11), (1, 1), (4, longest)):
        batch = batch_of(model, *shape)
        found = run(path, batch)
        assert list(found) == [name]
        wanted = expected(model, batch)
        assert found[name].shape == wanted.shape
        differences.append(off(found[name], wanted, batch["attention_mask"]))
    print(f"{type(model).__name__}: {max(differences):.1e}")
    assert max(differences) <= TOLERANCE


def test_inputs_and_names_of_an_encoder(encoder: tuple[Any, Path]) -> None:
    model, path = encoder
    graph = onnx.load(path, load_external_data=False).graph
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if model.config.model_type in ("albert", "bert", "electra") else []
    assert [value.name for value in graph.input] == names
    assert {value.type.tensor_type.elem_type for value in graph.input} == {onnx.TensorProto.INT64}
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == 1 and np.prod(tensor.dims) > 1}
    assert floats <= model.state_dict().keys()
    assert len(floats) == len(read(model))


def test_all_weights_of_an_encoder_can_be_trained(encoder: tuple[Any, Path]) -> None:
    model, path = encoder
    bundle = pz.prepare(path, path.parent / "base", overwrite=True)
    trainable = sum(int(np.prod(tensor.shape)) for tensor in bundle.tensors if tensor.sets)
    assert trainable == sum(parameter.numel() for parameter in read(model))
    assert {tensor.reason.split(":")[0] for tensor in bundle.frozen} <= {"buffer", "constant"}
    pz.load(bundle)  # which checks that all of them are live


def read(model: Any) -> list[Any]:
    """Return the parameters that the outputs depend on: hidden states on no pooler."""
    bare = type(model).__name__.endswith("Model")
    return [each for name, each in model.named_parameters() if not (bare and name.startswith("pooler."))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_model_is_prompted(tmp_path: Path, family: str, exported: Any) -> None:
    model, path = exported(family, "ForMaskedLM")
    bundle = pz.prepare(
        path, tmp_path / "base", task="prompt", template="{text} it was {mask} .", label_words=["terrible", "good"]
    )
    tokenizer = Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    data = tmp_path / "data.jsonl"
    texts = ["the film", "a bad film of the bad it is good"]
    data.write_text("".join(json.dumps({"text": text, "label": "good"}) + "\n" for text in texts))
    model_of_bundle = pz.load(bundle)
    found = pz.evaluate(model_of_bundle, pz.load_dataset(data, bundle))["loss"]
    losses = []
    for text in texts:
        ids = np.array([tokenizer.encode(f"{text} it was [MASK] .").ids])
        at = ids[0].tolist().index(tokenizer.token_to_id("[MASK]"))
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        bad, good = (expected(model, batch)[0, at, tokenizer.token_to_id(word)] for word in ("terrible", "good"))
        losses.append(np.logaddexp(bad, good) - good)
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_is_trained(tmp_path: Path, family: str, exported: Any) -> None:
    model, path = exported(family, "ForSequenceClassification")
    bundle = pz.prepare(path, tmp_path / "base", tokenizer=path.with_name("tokenizer.json"), labels=["a", "b", "c"])
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\nthe film was good\ta\na bad film\tb\nit is\tc\n")
    examples, loaded = pz.load_dataset(data, bundle), pz.load(bundle)
    before = pz.evaluate(loaded, examples)["loss"]
    batch = examples.batch(np.arange(3))
    logits = expected(model, {**batch, "token_type_ids": np.zeros_like(batch["input_ids"])}).astype(float)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert before == pytest.approx(-np.log(shares[np.arange(3), np.arange(3)]).mean(), rel=1e-4)
    optimizer = pz.MeZO(loaded, lr=1e-4, eps=1e-3, seed=3)
    for _ in range(30):
        optimizer.step(lambda model: pz.evaluate(model, examples)["loss"])
    assert pz.evaluate(loaded, examples)["loss"] < before


# ---- sentence-transformers -------------------------------------------------------------------------------------------

MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
OF_OLD = "sentence_transformers.models."


def save_sentence(folder: Path, model: Any, pooling: dict[str, Any], *more: str, inner: str = "") -> None:
    """Write a folder as sentence-transformers lays it out, with the transformer in a folder of its own or not."""
    tiny.save(folder / inner, model)
    modules = [
        ("Transformer", inner),
        ("Pooling", "1_Pooling"),
        *((kind, f"{i}_{kind}") for i, kind in enumerate(more, 2)),
    ]
    (folder / "modules.json").write_text(
        json.dumps([{"idx": i, "path": path, "type": OF_OLD + kind} for i, (kind, path) in enumerate(modules)])
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for kind, path in modules[2:]:
        (folder / path).mkdir()
        if kind == "Dense":
            config = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.Tanh"}
            (folder / path / "config.json").write_text(json.dumps(config))
            rng = torch.Generator().manual_seed(4)
            weights = {"linear.weight": torch.randn(8, 32, generator=rng), "linear.bias": torch.randn(8, generator=rng)}
            save_file(weights, folder / path / "model.safetensors")


def pooled(hidden: Array, mask: Array, mode: str) -> Array:
    rows = [row[:count] for row, count in zip(hidden, mask.sum(1), strict=True)]
    return np.array([{"mean": row.mean(0), "cls": row[0], "max": row.max(0)}[mode] for row in rows])


@pytest.mark.parametrize(
    ("pooling", "modes", "more", "inner"),
    [
        (MEAN, ["mean"], ["Normalize"], ""),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ["cls", "max"], [], "0_Transformer"),
        ({"pooling_mode": "mean"}, ["mean"], ["Dense"], ""),
    ],
)
def test_sentence_embeddings(
    tmp_path: Path, pooling: dict[str, Any], modes: list[str], more: list[str], inner: str
) -> None:
    """The checkpoint names a class with a head, as all-mpnet-base-v2 does, and has none."""
    model, folder = tiny.model_of("mpnet", "Model"), tmp_path / "checkpoint"
    save_sentence(folder, model, pooling, *more, inner=inner)
    settings = folder / inner / "config.json"
    settings.write_text(settings.read_text().replace("MPNetModel", "MPNetForMaskedLM"))
    path, _ = export(folder)
    batch = batch_of(model, 3, 11)
    found = run(path, batch)
    assert list(found) == ["last_hidden_state", "sentence_embedding"]
    hidden = expected(model, batch)
    assert off(found["last_hidden_state"], hidden, batch["attention_mask"]) <= TOLERANCE
    wanted = np.concatenate([pooled(hidden, batch["attention_mask"], mode) for mode in modes], axis=1)
    if "Dense" in more:
        weights = load_file(folder / "2_Dense" / "model.safetensors")
        wanted = np.tanh(wanted @ weights["linear.weight"].numpy().T + weights["linear.bias"].numpy())
        names = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
        assert "2_Dense.linear.weight" in names
    if "Normalize" in more:
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found["sentence_embedding"], wanted, rtol=1e-4, atol=1e-5)
    assert path.with_name("tokenizer.json").is_file()
    bundle = pz.prepare(path, tmp_path / "base")
    assert bundle.loss is None
    np.testing.assert_allclose(
        pz.load(bundle).run({each.name: batch[each.name] for each in bundle.inputs})["sentence_embedding"],
        wanted,
        rtol=1e-4,
        atol=1e-5,
    )


def test_other_modules_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({"pooling_mode": "lasttoken"}, [], "pooling by \\['lasttoken'\\] is not supported; expected cls, max or mean"),
        ({"pooling_mode_weightedmean_tokens": True}, [], "pooling by \\['weightedmean_tokens'\\] is not supported"),
        ({}, [], "pooling by nothing is not supported"),
        (MEAN, ["LayerNorm"], "the module 'LayerNorm' of sentence-transformers is not supported"),
    ]
    for number, (pooling, more, text) in enumerate(cases):
        folder = tmp_path / str(number)
        save_sentence(folder, tiny.model_of("bert", "Model"), pooling, *more)
        refused(folder, text)
    (folder / "modules.json").write_text('[{"path": "", "type": "a.StaticEmbedding"}]')
    refused(folder, "expected a first module 'Transformer', got StaticEmbedding")
    (folder / "modules.json").write_text("[{}]")
    refused(folder, r"modules\.json: damaged: expected a list of modules with type and path")


# ---- types of weights; test_decoders_export.py has the graphs of decoders --------------------------------------------


def test_a_checkpoint_of_16_bits(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = gguf_files.model_of(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint")
    path, lines = export(tmp_path / "checkpoint")
    assert lines[-1].startswith("outputs differ from those of transformers by ")
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert stored["model.embed_tokens.weight"] == onnx.TensorProto.FLOAT
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm")
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (2, 9))
    batch = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(9)[None].repeat(2, 0),
        "positions": np.array([8, 17]),
        "targets": np.array([1, 2]),
    }
    found = pz.load(bundle).run(batch)["token_losses"]
    with torch.no_grad():
        logits = model.float()(torch.from_numpy(ids)).logits[:, -1]
    np.testing.assert_allclose(found, -torch.log_softmax(logits, -1)[[0, 1], [1, 2]].numpy(), rtol=1e-4)


def test_an_encoder_in_float16(tmp_path: Path) -> None:
    model = tiny.model_of("mpnet", "ForSequenceClassification")
    tiny.save(tmp_path / "checkpoint", model)
    path, _ = export(tmp_path / "checkpoint", dtype="float16")
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {stored[name] for name, _ in model.named_parameters()} == {onnx.TensorProto.FLOAT16}
    batch = batch_of(model, 3, 11)
    assert off(run(path, batch)["logits"], expected(model, batch), batch["attention_mask"]) < 0.02


def test_an_encoder_is_quantised(tmp_path: Path) -> None:
    model = tiny.model_of("bert", "ForMaskedLM")
    tiny.save(tmp_path / "checkpoint", model)
    path, lines = export(tmp_path / "checkpoint", dtype="int8")
    assert lines[0].startswith("14 matrices quantised as Q8_0: 14 of F32; error ")
    batch = batch_of(model, 3, 11)
    difference = off(run(path, batch)["logits"], expected(model, batch), batch["attention_mask"])
    assert 1e-4 < difference < 0.05


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_vocabulary_becomes_tokenizer_json(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    tiny.model_of("bert", "Model").save_pretrained(folder)
    words = [*tiny.SPECIAL.values(), "good", "film", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    path, _ = export(folder)
    tokenizer = Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    assert tokenizer.encode("Good films").tokens == ["[CLS]", "good", "film", "##s", "[SEP]"]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    tiny.model_of("bert", "Model").save_pretrained(folder)
    path, lines = export(folder)
    assert f"{folder} has no tokenizer, so no tokenizer.json is written" in lines
    assert sorted(each.name for each in path.parent.iterdir()) == ["config.json", "model.onnx", "model.onnx.data"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(folder: Path, text: str) -> None:
    with pytest.raises(Error, match=text) as caught:
        export(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not (folder.parent / "out").exists()


def changed(folder: Path, **settings: Any) -> Path:
    """Return a copy of a checkpoint with other settings."""
    copy = folder.with_name(f"changed{len(list(folder.parent.iterdir()))}")
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return copy


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    tiny.save(folder, tiny.model_of("bert", "Model"))
    refused(changed(folder, model_type="bart"), "model_type 'bart' is not supported; expected one of albert, bert")
    refused(changed(folder, model_type=None), "model_type None is not supported")
    refused(
        changed(folder, architectures=["BertForQuestionAnswering"]),
        "the class 'BertForQuestionAnswering' in 'architectures' is not supported; of bert, these are: "
        "BertForMaskedLM, BertForSequenceClassification, BertModel",
    )
    refused(changed(folder, architectures=["BertForTokenClassification"]), "the class 'BertForTokenClassification'")
    refused(changed(folder, architectures=None), "the class 'None' in 'architectures'")
    refused(changed(folder, quantization_config={"quant_method": "gptq"}), "a quantised checkpoint is not supported")
    refused(
        changed(folder, architectures=["BertForSequenceClassification"]),
        "has no tensor for 2 parameters of BertForSequenceClassification, such as 'classifier.bias'",
    )
    refused(changed(folder, hidden_size=48), "transformers cannot load it")
    refused(changed(folder, num_hidden_layers=2), "no tensor for 16 parameters of BertModel, such as 'encoder.layer.1")

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    t5.save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "model_type 't5' is not supported; expected one of albert, bert, .*, qwen3")


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    tiny.save(folder, tiny.model_of("bert", "Model"))
    weights = (folder / "model.safetensors").read_bytes()
    for content in (weights[:-100], weights[:100], b"", b"no" + weights):
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, "transformers cannot load it")
    (folder / "model.safetensors").unlink()
    refused(folder, "transformers cannot load it")
    (folder / "model.safetensors").write_bytes(weights)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer[:100])
    refused(folder, "transformers cannot load its tokenizer")
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json: damaged, or not JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, r"config\.json: damaged: expected an object")
    (folder / "config.json").unlink()
    refused(folder, r"has no config\.json; expected a checkpoint's folder, as save_pretrained writes it")


def test_where_an_export_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    tiny.save(folder, tiny.model_of("bert", "Model"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Error, match="in the checkpoint's folder, whose settings would be replaced; choose another"):
        export_model(folder, folder / "model.onnx")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(FileNotFoundError):
        export_model(tmp_path / "none", tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()


def test_a_difference_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketzo.export import _encoder_graph

    tiny.save(tmp_path / "bert", tiny.model_of("bert", "Model"))
    write = _encoder_graph.write_encoder_graph

    def wrong(encoder: Any, target: Path) -> None:
        write(encoder, target)
        encoder.model.embeddings.LayerNorm.bias += 1e-3

    monkeypatch.setattr(_encoder_graph, "write_encoder_graph", wrong)
    with pytest.raises(Error, match="the graph's outputs differ from those of transformers by"):
        export(tmp_path / "bert")
    assert not list((tmp_path / "out").iterdir())


def test_the_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from pocketzo.cli.app import cli

    tiny.save(tmp_path / "bert", tiny.model_of("bert", "ForSequenceClassification"))
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"")
    command = ["export", str(tmp_path / "bert"), "-o", str(out)]
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 1
    assert "already exists; choose another file, or replace it with --force" in found.stderr
    found = CliRunner().invoke(cli, [*command, "--force"])
    assert found.exit_code == 0, found.output
    assert found.stdout.splitlines() == [
        f"{out}: written, with tokenizer.json beside it",
        f"next: pocketzo prepare {out} -o base --tokenizer {out.with_name('tokenizer.json')}",
    ]
    assert found.stderr.splitlines()[-1].startswith("outputs differ from those of transformers by ")
