"""Bundles of language models: the training graph gives the losses of the export's logits, and the export generates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from decoders import HIDDEN, VOCABULARY, Array, write_llama
from graphs import MODELS, inputs_of
from onnx import TensorProto, helper, numpy_helper
from test_decoders import FLOATS, LLAMA, MATMULS, batch_of, blocks, dynamic, op_types, plain, qdq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import pocketzo as pz
from pocketzo.cli.prepare import prepare as command
from pocketzo.errors import BundleError
from pocketzo.formats.companions import Companions
from pocketzo.formats.safetensors import file_sha256
from pocketzo.graph.language import LanguageGraph

pytestmark = pytest.mark.usefixtures("quiet_quantiser")

WORDS = [f"w{n}" for n in range(VOCABULARY)]


QUANTISED: dict[str, tuple[Callable[[Path, Path], None], str, float]] = {
    "int4": (lambda source, path: blocks(source, path, 4, "MatMul"), "MatMulNBits", 1e-4),
    "int4 with its table": (
        lambda source, path: blocks(source, path, 4, "MatMul", "Gather"),
        "GatherBlockQuantized",
        1e-4,
    ),
    "int8 in blocks": (lambda source, path: blocks(source, path, 8, "MatMul"), "MatMulNBits", 1e-4),
    "dynamic int8": (dynamic, "DynamicQuantizeLinear", 5e-2),  # activations are rounded to 256 values
    "QDQ": (qdq, "DequantizeLinear", 5e-2),
}
"""By name: what quantises a file, an operator that it leads to, and by how much losses may differ."""


@dataclass
class Sentences:
    """Random sentences as batches of causal-lm: every real token but the first of its sentence is predicted."""

    path: Path
    lengths: Array = field(default_factory=lambda: np.array([7, 5, 6, 7, 3, 7, 4, 6]))

    def __post_init__(self) -> None:
        self.mask = (np.arange(7) < self.lengths[:, None]).astype(np.int64)
        self.ids = np.random.default_rng(9).integers(1, VOCABULARY, self.mask.shape) * self.mask

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    def batch(self, indices: Array) -> pz.Batch:
        ids, mask = self.ids[indices], self.mask[indices]
        rows, columns = np.nonzero(mask[:, 1:])
        arrays = batch_of(self.path, ids, mask) | {
            "positions": rows * ids.shape[1] + columns,
            "targets": ids[rows, columns + 1],
        }
        return pz.Batch(arrays, np.asarray(indices))


def token_losses(logits: Array, batch: pz.Batch) -> Array:
    rows = logits.reshape(-1, VOCABULARY)[batch["positions"]].astype(np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    log_p = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return np.asarray(-log_p[np.arange(len(rows)), batch["targets"]])


def warm(path: Path, data: Sentences) -> dict[str, Array]:
    """Return the outputs for a token and a cache of the tokens before it."""
    ids = data.ids[data.lengths == 7]
    mask = np.ones_like(ids)
    start = plain(path, batch_of(path, ids[:, :-1], mask[:, :-1]))
    return plain(path, batch_of(path, ids[:, -1:], mask, start))


def of_every_token(path: Path, batch: dict[str, Array]) -> list[str]:
    """Return the names of values with an element for every token of a batch and word of the vocabulary."""
    proto = onnx.load(path, load_external_data=False)
    values = [value for node in proto.graph.node for value in node.output if value]
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_empty_tensor_value_info(value) for value in values)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    got = session.run(None, {value.name: batch[value.name] for value in session.get_inputs()})
    size = batch["input_ids"].size * VOCABULARY
    return [name for name, value in zip(values, got, strict=True) if value.size == size and VOCABULARY in value.shape]


def accept(path: Path, folder: Path, tolerance: float, **options: Any) -> pz.Bundle:
    """Prepare a decoder for causal-lm, compare both graphs with the export, train 3 steps and replay the journal."""
    data = Sentences(path)
    everything = data.batch(np.arange(len(data)))
    expected = token_losses(plain(path, everything)["logits"], everything)
    bound = tolerance * np.abs(expected).max()

    bundle = pz.prepare(path, folder / "base", task="causal-lm", **options)
    assert (bundle.loss, bundle.logits) == ("loss", None)
    assert [value.name for value in bundle.outputs] == ["token_losses", "loss"]
    assert not any(value.name.startswith(("past", "use_cache", "labels")) for value in bundle.inputs)
    assert "If" not in op_types(onnx.load(bundle.model_path, load_external_data=False).graph)
    assert bundle.frozen == pz.prepare(path, folder / "other", **options).frozen
    model = pz.load(bundle, threads=1)
    outputs = model.run(everything)
    np.testing.assert_allclose(outputs["token_losses"], expected, rtol=0, atol=bound)
    np.testing.assert_allclose(outputs["loss"], outputs["token_losses"].mean(), rtol=1e-5)
    few = {**everything, "positions": everything["positions"][:2], "targets": everything["targets"][:2]}
    assert of_every_token(bundle.model_path, few) == []
    assert "logits" in of_every_token(bundle.generate_path, few)

    if not options:  # the same nodes, over the same numbers
        for name, value in warm(path, data).items():
            np.testing.assert_array_equal(warm(bundle.generate_path, data)[name], value)
    optimizer = pz.MeZO(model, lr=1e-3, seed=4)
    run = folder / "run"
    pz.Trainer(model, optimizer, data, steps=3, batch_size=4, run=run).fit()
    model.save(folder / "tuned")
    pz.Run(run).replay(folder / "replayed")
    tuned, replayed, base = (folder / name / "weights.safetensors" for name in ("tuned", "replayed", "base"))
    assert file_sha256(tuned) == file_sha256(replayed) != file_sha256(base)

    trained = model.run(everything)["token_losses"]
    assert np.abs(trained - expected).max() > bound / 100
    logits = plain(folder / "tuned" / "generate.onnx", everything)["logits"]
    np.testing.assert_allclose(trained, token_losses(logits, everything), rtol=0, atol=bound)
    return bundle


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_decoder_trains_and_generates(name: str, tmp_path: Path) -> None:
    bundle = accept(FLOATS[name](tmp_path / "m.onnx"), tmp_path, 1e-4)
    assert bundle.task is not None
    assert (bundle.task.name, bundle.task.settings) == ("causal-lm", {"loss": "cross-entropy"})
    assert pz.load(bundle).prepacked  # as no branch is left


@pytest.mark.parametrize(("quantise", "operator", "tolerance"), QUANTISED.values(), ids=QUANTISED.keys())
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "merged gpt2", "genai"])
@pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")
def test_a_quantised_decoder_trains_and_generates(
    name: str, quantise: Callable[[Path, Path], None], operator: str, tolerance: float, tmp_path: Path
) -> None:
    if (name, quantise) == ("merged gpt2", qdq):
        return  # onnxruntime's quantiser leaves branches alone
    path = tmp_path / "m.onnx"
    quantise((FLOATS if quantise is qdq else MATMULS)[name](tmp_path / "float.onnx"), path)
    bundle = accept(path, tmp_path, tolerance)
    assert operator in op_types(onnx.load(bundle.model_path, load_external_data=False).graph)


@pytest.mark.parametrize("name", ["gpt2", "llama", "merged gpt2"])
@pytest.mark.filterwarnings("ignore:this processor does not compute in fp16")
def test_a_decoder_in_float16_trains_and_generates(name: str, tmp_path: Path) -> None:
    accept(FLOATS[name](tmp_path / "m.onnx"), tmp_path, 5e-2, dtype="float16")


def test_plain_onnxruntime_runs_the_training_graph_of_onnx_attention_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    caches = {
        name: [
            helper.make_tensor_value_info(f"{name}.0.{kind}", TensorProto.FLOAT, ["batch", 2, length, 4])
            for kind in ("key", "value")
        ]
        for name, length in (("past_key_values", "past"), ("present", "total"))
    }
    past, present = ([value.name for value in values] for values in caches.values())
    attention: dict[str, Any] = {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
            helper.make_node("Attention", [*["hidden"] * 3, "", *past], ["mixed", *present], **attention),
            helper.make_node("MatMul", ["mixed", "head"], ["logits"]),
        ],
        "attention",
        [tokens, *caches["past_key_values"]],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 40]), *caches["present"]],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in (("embedding", (40, 8)), ("head", (8, 40)))
        ],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm")
    session = ort.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    batch = {"input_ids": rng.integers(0, 40, (3, 5)), "positions": np.arange(4), "targets": np.arange(4)}
    losses = [session.run(["loss"], batch)[0] for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.filterwarnings("ignore:this processor does not compute in fp16")
def test_operators_of_onnxruntime_may_come_without_their_operator_set(tmp_path: Path) -> None:
    path = FLOATS["genai"](tmp_path / "m.onnx")
    model = onnx.load(path)
    del model.opset_import[1:]
    onnx.save(model, path)
    for dtype in ("float32", "float16"):
        bundle = pz.prepare(path, tmp_path / dtype, task="causal-lm", dtype=dtype)
        for graph in (bundle.model_path, bundle.generate_path):
            imports = {entry.domain: entry.version for entry in onnx.load(graph, load_external_data=False).opset_import}
            assert imports["com.microsoft"] == 1


# ---- prompts ---------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, *special: str) -> Path:
    """Write a tokenizer of words between spaces: w0, w1, ..., the last ones replaced by special tokens."""
    words = [*WORDS[: VOCABULARY - len(special)], *special]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


TEMPLATE = "w5 {text} w6"
PROMPT: dict[str, Any] = {"task": "prompt", "template": TEMPLATE, "label_words": ["w9", "w2", "w7"]}


@pytest.mark.parametrize("name", ["gpt2", "llama", "merged gpt2", "genai"])
def test_a_prompt_is_classified_by_the_word_that_follows(name: str, tmp_path: Path) -> None:
    path = FLOATS[name](tmp_path / "m.onnx")
    write_tokenizer(tmp_path)
    notes: list[str] = []
    bundle = pz.prepare(path, tmp_path / "base", **PROMPT, note=notes.append)
    assert notes[0] == f"tokenizer: {tmp_path / 'tokenizer.json'}, as none was given"
    assert (bundle.tokenizer, bundle.labels, bundle.loss, bundle.logits) == (
        "tokenizer.json",
        ("w9", "w2", "w7"),
        "loss",
        "logits",
    )
    assert bundle.task is not None
    assert bundle.task.settings == {
        "labels": ["w9", "w2", "w7"],
        "template": TEMPLATE,
        "label_words": ["w9", "w2", "w7"],
        "label_tokens": [9, 2, 7],
        "mask_token": None,
        "calibration": None,
        "loss": "cross-entropy",
    }
    data = Sentences(path)
    batch = batch_of(path, data.ids, data.mask)
    expected = plain(path, batch)["logits"][np.arange(8), data.lengths - 1][:, [9, 2, 7]]
    feed = batch | {"positions": np.arange(8) * 7 + data.lengths - 1}
    model = pz.load(bundle)
    np.testing.assert_allclose(model.run(feed, ["logits"])["logits"], expected, rtol=1e-4, atol=1e-4)
    labels = np.arange(8) % 3
    log_p = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    assert model.loss(feed | {"labels": labels}) == pytest.approx(-log_p[np.arange(8), labels].mean(), rel=1e-4)
    assert bundle.generate_path.is_file()


@pytest.mark.parametrize("name", ["mlm-old", "mlm-new"])
def test_a_masked_prompt_is_classified_by_the_word_at_the_mask(name: str, tmp_path: Path) -> None:
    """BERT's head: dense, gelu, a norm, the embedding transposed, and a bias."""
    path = MODELS / f"{name}.onnx"
    tokenizer = write_tokenizer(tmp_path, "[MASK]")
    options = PROMPT | {"template": "{text} w6 {mask} w4"}
    bundle = pz.prepare(path, tmp_path / "base", tokenizer=tokenizer, **options, labels=["a", "b", "c"])
    assert bundle.task is not None
    assert bundle.task.settings["mask_token"] == VOCABULARY - 1
    assert (bundle.labels, bundle.generation) == (("a", "b", "c"), None)
    assert {file.name for file in bundle.path.iterdir()} == {
        "bundle.json",
        "model.onnx",
        "probe.npz",
        "tokenizer.json",
        "weights.safetensors",
    }
    inputs = inputs_of(name)
    rows, length = inputs["input_ids"].shape
    feed = inputs | {"positions": np.arange(rows) * length + 1, "labels": np.zeros(rows, np.int64)}
    expected = plain(path, inputs)["logits"][:, 1][:, [9, 2, 7]]
    model = pz.load(bundle)
    np.testing.assert_allclose(model.run(feed)["logits"], expected, rtol=1e-4, atol=1e-5)
    optimizer = pz.MeZO(model, lr=1e-2)
    optimizer.step(lambda model: model.loss(feed))
    assert np.abs(model.run(feed)["logits"] - expected).max() > 1e-3


def test_calibration_subtracts_the_mean_logit_of_each_label_word(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.onnx", LLAMA, 2)
    write_tokenizer(tmp_path)
    texts = [f"w{n} w{n + 1}" for n in range(10, 30)]
    (tmp_path / "texts.tsv").write_text("text\n" + "\n".join(texts) + "\n", encoding="utf-8")
    notes: list[str] = []
    plainly = pz.prepare(path, tmp_path / "plain", **PROMPT)
    bundle = pz.prepare(path, tmp_path / "base", **PROMPT, calibrate=tmp_path / "texts.tsv", note=notes.append)
    ids = np.array([[5, n, n + 1, 6] for n in range(10, 30)])
    batch = batch_of(path, ids, np.ones_like(ids)) | {"positions": np.arange(20) * 4 + 3}
    before = pz.load(plainly).run(batch, ["logits"])["logits"]
    after = pz.load(bundle).run(batch, ["logits"])["logits"]
    assert bundle.task is not None
    values = bundle.task.settings["calibration"]
    np.testing.assert_allclose(values, before.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(after, before - np.array(values), rtol=1e-5, atol=1e-5)
    assert "calibration: w9 " in notes[1]
    assert bundle.base_sha256 == plainly.base_sha256


# ---- what is beside the model ----------------------------------------------------------------------------------------


def companions(folder: Path, **files: object) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("_json", ".json").replace("_jinja", ".jinja")).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config_json": {"eos_token_id": [2, 7]}, "config_json": {"eos_token_id": 3}}, (2, 7)),
        ({"generation_config_json": {}, "config_json": {"eos_token_id": 3}}, (3,)),
        ({"config_json": {"text_config": {"eos_token_id": 4}}}, (4,)),
        ({"genai_config_json": {"model": {"eos_token_id": [5]}}}, (5,)),
        ({"config_json": {"eos_token_id": None}}, ()),
        ({}, ()),
    ],
)
def test_the_tokens_that_end_a_text(files: dict[str, object], eos: tuple[int, ...], tmp_path: Path) -> None:
    companions(tmp_path, **files)
    assert Companions.of(tmp_path / "model.onnx").eos == eos
    (tmp_path / "onnx").mkdir()  # as on the Hub
    assert Companions.of(tmp_path / "onnx" / "model.onnx").eos == eos
    (tmp_path / "other").mkdir()
    assert Companions.of(tmp_path / "other" / "model.onnx").eos == ()


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template_jinja": "a", "tokenizer_config_json": {"chat_template": "b"}}, "a"),
        ({"tokenizer_config_json": {"chat_template": "b"}}, "b"),
        ({"chat_template_json": {"chat_template": "c"}}, "c"),
        (
            {"tokenizer_config_json": {"chat_template": [{"name": n, "template": n} for n in ("tool", "default")]}},
            "default",
        ),
        ({"tokenizer_config_json": {}}, None),
    ],
)
def test_the_chat_template(files: dict[str, object], template: str | None, tmp_path: Path) -> None:
    companions(tmp_path, **files)
    assert Companions.of(tmp_path / "model.onnx").chat_template == template


def test_the_bundle_keeps_what_is_beside_the_model(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.onnx", LLAMA, 2)
    write_tokenizer(tmp_path)
    companions(
        tmp_path,
        config_json={"eos_token_id": 2},
        chat_template_jinja="{{ bos_token }}",
        tokenizer_config_json={"bos_token": {"content": "w1"}, "eos_token": "w2", "pad_token": None},
        special_tokens_map_json={"eos_token": "other", "unk_token": "w0"},
    )
    bundle = pz.prepare(tmp_path / "m.onnx", tmp_path / "base", task="choice", per="token")
    assert bundle.task is not None
    assert (bundle.task.name, bundle.task.settings) == ("choice", {"loss": "cross-entropy", "per": "token"})
    assert bundle.generation is not None
    assert bundle.generation.eos == (2,)
    assert bundle.generation.special_tokens == {"bos_token": "w1", "eos_token": "w2", "unk_token": "w0"}
    assert (bundle.path / "chat_template.jinja").read_text(encoding="utf-8") == "{{ bos_token }}"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config_json": "{"}, r"config\.json: not JSON: .*; mend it or move it away"),
        ({"config_json": [1]}, r"config\.json: not a JSON object"),
        ({"config_json": {"eos_token_id": "2"}}, r"config\.json: 'eos_token_id' must be a token id or a list of them"),
        ({"tokenizer_config_json": {"chat_template": 3}}, r"'chat_template' must be a string, got int"),
    ],
)
def test_a_damaged_file_beside_the_model_is_named(files: dict[str, object], reason: str, tmp_path: Path) -> None:
    companions(tmp_path, **files)
    with pytest.raises(BundleError, match=reason):
        Companions.of(tmp_path / "model.onnx")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"task": "lm"}, ValueError, "task must be 'prompt', 'causal-lm', 'choice' or None, got 'lm'"),
        ({"template": "{text}"}, ValueError, "template is an option of the task 'prompt', and the task is None"),
        ({"task": "choice", "label_words": ["a", "b"]}, ValueError, "label_words is an option of the task 'prompt'"),
        ({"task": "prompt", "per": "token", "train": "all"}, ValueError, "per is an option of the task 'choice'"),
        ({"task": "choice", "per": "word"}, ValueError, "per must be 'sum' or 'token', got 'word'"),
        ({"task": "causal-lm", "loss": "mse"}, ValueError, "the loss of the task 'causal-lm' is cross-entropy"),
        ({"task": "causal-lm", "labels": ["a", "b"]}, ValueError, "the task 'causal-lm' has none"),
        ({"task": "prompt", "template": "{text}", "train": "all"}, ValueError, "needs a template and label words"),
        (PROMPT | {"label_words": ["w1"]}, ValueError, "two or more, a word for each class"),
        (PROMPT | {"label_words": "w1"}, TypeError, "label_words must be a sequence of str"),
        (PROMPT | {"labels": ["a", "b"]}, ValueError, "2 labels and 3 label_words"),
        (PROMPT | {"label_words": ["w1", "w2 w3"]}, ValueError, r"'w2 w3'.* \[2, 3\].* expected one"),
        (PROMPT | {"label_words": ["w1", "x"]}, ValueError, "'x' is unknown to the tokenizer"),
        (PROMPT | {"template": "{text} {mask}"}, BundleError, "no mask token, and the template has {mask}"),
        (PROMPT | {"calibrate": "no.tsv"}, BundleError, r"no\.tsv: no such file"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    write_llama(tmp_path / "m.onnx", LLAMA, 2)
    write_tokenizer(tmp_path)
    with pytest.raises(error, match=reason):
        pz.prepare(tmp_path / "m.onnx", tmp_path / "base", **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "tokenizer.json"]


def test_a_prompt_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.onnx", LLAMA, 2)
    with pytest.raises(BundleError, match=r"m\.onnx: a prompt needs the model.s tokenizer.* give --tokenizer"):
        pz.prepare(tmp_path / "m.onnx", tmp_path / "base", **PROMPT)


def without_head(path: Path) -> None:
    """As optimum's task feature-extraction exports a decoder."""
    model = onnx.load(write_llama(path, LLAMA, 2))
    hidden = next(node.input[0] for node in model.graph.node if "logits" in node.output)
    del model.graph.output[0]
    shape = ("batch_size", "sequence_length", HIDDEN)
    model.graph.output.append(helper.make_tensor_value_info("last_hidden_state", onnx.TensorProto.FLOAT, shape))
    model.graph.node.append(helper.make_node("Identity", [hidden], ["last_hidden_state"]))
    onnx.save(model, path)


def last_token(path: Path) -> None:
    """As onnxruntime-genai's prune_lm_head; the output is declared as if it had all."""
    model = onnx.load(write_llama(path, LLAMA, 2))
    head = next(node for node in model.graph.node if "logits" in node.output)
    last = [numpy_helper.from_array(np.array([n]), f"n{n}") for n in (-1, 1, 2**40)]
    model.graph.initializer.extend(last)
    node = helper.make_node("Slice", [head.input[0], "n-1", f"n{2**40}", "n1"], ["last"])
    model.graph.node.insert(len(model.graph.node) - 1, node)
    head.input[0] = "last"
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (without_head, r"this graph has 'last_hidden_state'.* exported without its output projection; export it with"),
        (last_token, r"'logits' is \[2, 1, 40\] for tokens \[2, 8\], and a loss needs .* without prune_lm_head"),
    ],
)
def test_an_export_without_all_logits_is_refused(write: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    write(tmp_path / "m.onnx")
    with pytest.raises(BundleError, match=reason):
        pz.prepare(tmp_path / "m.onnx", tmp_path / "base", task="causal-lm")
    assert not (tmp_path / "base").exists()


def test_a_training_graph_that_differs_from_the_export_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama(tmp_path / "m.onnx", LLAMA, 2)
    expected = LanguageGraph.expected  # as if the graph gathered the positions before
    monkeypatch.setattr(
        LanguageGraph, "expected", lambda self, logits, feed: expected(self, np.roll(logits, 1, 1), feed)
    )
    with pytest.raises(BundleError, match="a fault of PocketZO: the output 'token_losses' is off by"):
        pz.prepare(tmp_path / "m.onnx", tmp_path / "base", task="causal-lm")


def test_weights_that_the_training_graph_does_not_read_are_frozen(tmp_path: Path) -> None:
    """A second output, as a value head, is kept for generating only."""
    path = write_llama(tmp_path / "m.onnx", LLAMA, 2)
    model = onnx.load(path)
    hidden = next(node.input[0] for node in model.graph.node if "logits" in node.output)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((HIDDEN, 3), np.float32) / 7, "value.weight"))
    model.graph.node.append(helper.make_node("MatMul", [hidden, "value.weight"], ["value"]))
    model.graph.output.append(helper.make_tensor_value_info("value", onnx.TensorProto.FLOAT, ("b", "s", 3)))
    onnx.save(model, path)
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm")
    assert [tensor.reason for tensor in bundle.frozen if tensor.name == "value.weight"] == [
        "unused: the training graph does not read it"
    ]
    pz.load(bundle)
    data = Sentences(path)
    for name, value in warm(path, data).items():
        np.testing.assert_array_equal(warm(bundle.generate_path, data)[name], value)
    with pytest.raises(pz.DeadWeightError, match=r"'value\.weight' cannot be trained \(unused"):
        pz.prepare(path, tmp_path / "other", task="causal-lm", train="value")


def test_the_command_takes_the_issues_example(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.onnx", LLAMA, 2)
    write_tokenizer(tmp_path, "Review:", "Sentiment:", "negative", "positive")
    arguments = ["--task", "prompt", "--template", r"Review: {text}\nSentiment:", "--label-words", "negative,positive"]
    done = CliRunner().invoke(command, [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "base"), *arguments])
    assert done.exit_code == 0, done.output
    task = pz.Bundle.read(tmp_path / "base").task
    assert task is not None
    assert task.settings["template"] == "Review: {text}\nSentiment:"
    assert task.settings["label_tokens"] == [38, 39]
