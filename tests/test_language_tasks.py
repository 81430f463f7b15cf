"""Prompts, language modelling and choices: which tokens count, in every padded batch, and a batch in parts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoders import VOCABULARY, Array
from graphs import MODELS, model_of, node, weight
from test_decoders import FLOATS, batch_of, plain
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

import pocketzo as pz
from pocketzo.data.examples import Example
from pocketzo.data.load import encode_texts, load_dataset
from pocketzo.errors import DataError
from pocketzo.formats.safetensors import file_sha256
from pocketzo.runtime.slices import LOGITS_MEMORY
from pocketzo.tasks.causal_lm import TOKEN_LOSSES
from pocketzo.tasks.objective import Objective, metric_objective
from pocketzo.tasks.parts import parts, run
from pocketzo.tasks.prompt import label_tokens, with_template
from pocketzo.tasks.registry import task_of

pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")

START, END = VOCABULARY - 2, VOCABULARY - 1
Mode = str
MODES = ["no special tokens", "start", "start and end"]
CHATML = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} w9 {% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def write_tokenizer(folder: Path, mode: Mode = "no special tokens", *, pad: int | None = None) -> Tokenizer:
    """Write a tokenizer of words between spaces: w0 to w29, user, assistant, w32 to w37, <s> and </s>."""
    names = {f"w{n}": n for n in range(VOCABULARY - 2) if n not in (30, 31)}
    names |= {"user": 30, "assistant": 31, "<s>": START, "</s>": END}
    tokenizer = Tokenizer(WordLevel(names, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if mode != MODES[0]:
        single = "<s> $A" + " </s>" * (mode == MODES[2])
        tokenizer.post_processor = TemplateProcessing(
            single=single, pair=f"{single} $B:1", special_tokens=[("<s>", START), ("</s>", END)]
        )
    if pad is not None:
        tokenizer.enable_padding(pad_id=pad, pad_token="w7", direction="left")  # the direction must not come through
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def prepared(
    folder: Path, task: Any, mode: Mode = MODES[0], *, name: str = "llama", chat: str | None = None, **options: Any
) -> pz.Bundle:
    """Prepare a tiny decoder; its export is m.onnx in the same folder."""
    path = FLOATS[name](folder / "m.onnx")
    write_tokenizer(folder, mode)
    if chat is not None:
        (folder / "chat_template.jinja").write_text(chat)
    return pz.prepare(path, folder / "base", task=task, **options)


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def log_softmax(rows: Array) -> Array:
    rows = rows.astype(np.float64)
    rows = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True)))


def losses_by_hand(path: Path, ids: Sequence[int], counted: Sequence[int]) -> Array:
    """Return the losses of some tokens of one text, from all logits of the export."""
    row = np.array([ids])
    log_p = log_softmax(plain(path, batch_of(path, row, np.ones_like(row)))["logits"][0])
    return np.array([-log_p[at - 1, ids[at]] for at in counted])


# ---- which tokens count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "ids", "counted"),
    [
        (
            {"text": words(1, 2, 3)},
            {"": [1, 2, 3], "<": [START, 1, 2, 3], "<>": [START, 1, 2, 3, END]},
            {"": 2, "<": 3, "<>": 4},
        ),
        (
            {"prompt": words(4, 5), "completion": " w6"},
            {"": [4, 5, 6], "<": [START, 4, 5, 6], "<>": [START, 4, 5, 6]},
            {"": 1, "<": 1, "<>": 1},
        ),
    ],
    ids=["text", "completion"],
)
def test_the_tokens_of_texts_and_completions(
    record: dict[str, str], ids: dict[str, list[int]], counted: dict[str, int], tmp_path: Path
) -> None:
    """A tokenizer's first token stays; the end that it appends is part of a text, but not of a prompt or completion."""
    for mode, key in zip(MODES, ids, strict=True):
        folder = tmp_path / mode
        folder.mkdir()
        bundle = prepared(folder, "causal-lm", mode)
        batch = load_dataset(lines(folder / "d.jsonl", record), bundle).batch(np.array([0]))
        assert batch["input_ids"].tolist() == [ids[key]]
        assert batch["targets"].tolist() == ids[key][-counted[key] :]
        last = len(ids[key]) - 1
        assert batch["positions"].tolist() == list(range(last - counted[key], last))


def test_a_completion_ends_with_the_token_that_ends_a_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 3]}))
    bundle = prepared(tmp_path, "causal-lm")
    data = load_dataset(lines(tmp_path / "d.jsonl", {"prompt": "w1", "completion": " w2"}, {"text": "w1 w2"}), bundle)
    assert data.batch(np.array([0]))["targets"].tolist() == [2, END]
    assert data.batch(np.array([1]))["targets"].tolist() == [2]


def test_a_completion_that_shares_a_token_with_its_prompt_is_tokenised_by_itself(tmp_path: Path) -> None:
    """As when text is generated: the model has seen the tokens of the prompt alone."""
    bundle = prepared(tmp_path, "causal-lm")
    data = load_dataset(lines(tmp_path / "d.jsonl", {"prompt": "w1 w2", "completion": "3 w4"}), bundle)
    batch = data.batch(np.array([0]))
    assert batch["input_ids"].tolist() == [[1, 2, 0, 4]]  # not w23; 3 is no word
    assert batch["targets"].tolist() == [0, 4]


@pytest.mark.parametrize(
    "chat",
    [
        CHATML,
        CHATML.replace("{{ m.content }} w9", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} w9"
                       "{% endgeneration %}{% else %}{{ m.content }} w9{% endif %}"),
        # Answers before the last one are written without their first word, as reasoning is left out.
        CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}w8 {% endif %}{{ m.content }}"),
        CHATML.replace("{{ 'assistant ' }}", "{{ 'assistant w3 ' }}"),  # a prompt that begins to reason
    ],
    ids=["prefixes", "generation", "left out", "another prompt"],
)  # fmt: skip
def test_only_the_assistants_turns_of_a_chat_count(chat: str, tmp_path: Path) -> None:
    bundle = prepared(
        tmp_path, "causal-lm", MODES[2], chat=chat
    )  # the template alone says what special tokens there are
    messages = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
        {"role": "user", "content": "w7"},  # after the last answer nothing matters
    ]
    batch = load_dataset(lines(tmp_path / "d.jsonl", {"messages": messages}), bundle).batch(np.array([0]))
    assert batch["input_ids"].tolist() == [[30, 1, 2, 9, 31, 3, 9, 30, 4, 9, 31, 5, 6, 9]]
    assert batch["targets"].tolist() == [3, 9, 5, 6, 9]
    last = load_dataset(lines(tmp_path / "d.jsonl", {"messages": messages[:4]}), bundle).batch(np.array([0]))
    expected = [3, 9, 8, 5, 6, 9] if "w8" in chat else [3, 9, 5, 6, 9]
    assert last["targets"].tolist() == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user", "content": "w1"}]}, "'messages': no message has the role 'assistant'"),
        ({"messages": ["w1"]}, "'messages': message 0 is no object with a 'role' and a 'content'"),
        ({"messages": []}, "'messages': no message has the role 'assistant'"),
        ({"prompt": "w1"}, "no 'completion' among the columns 'prompt'"),
        ({"prompt": "w1", "completion": " "}, "'completion' is empty"),
        ({"text": 1}, "'text' must be a string, found int"),
        ({"text": "w1"}, "the text has no token that is predicted from one before it"),
        ({"label": 1}, "no 'text' among the columns 'label'"),
        ({"prompt": words(*range(1, 7)), "completion": " w7 w8"}, "8 tokens, and the model takes at most 7, so that "
         "the completion would be cut"),
        ({"messages": [{"role": "user", "content": words(*range(1, 5))}, {"role": "assistant", "content": "w5"}]},
         "9 tokens, and the model takes at most 7, so that the assistant's last message would be cut"),
    ],
)  # fmt: skip
def test_an_example_that_cannot_be_learnt_is_named_with_its_line(record: object, reason: str, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", chat=CHATML, max_length=7)
    with pytest.raises(DataError) as caught:
        load_dataset(lines(tmp_path / "d.jsonl", {"text": "w1 w2"}, record), bundle)
    assert str(caught.value).startswith(f"{tmp_path / 'd.jsonl'}, line 2: {reason}")


def test_a_chat_template_that_changes_answers_is_refused(tmp_path: Path) -> None:
    bundle = prepared(
        tmp_path, "causal-lm", chat="{% for m in messages %}{{ loop.revindex }} {{ m.content | upper }} {% endfor %}"
    )
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(DataError, match=r"changes message 1, the assistant's, .* use a template that marks it"):
        load_dataset(lines(tmp_path / "d.jsonl", {"messages": messages * 2}), bundle)


def test_a_long_text_is_cut_and_counted(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", MODES[2], max_length=4)
    data = load_dataset(lines(tmp_path / "d.jsonl", {"text": words(1, 2, 3, 4, 5)}, {"text": "w6"}), bundle)
    assert data.cut == 1
    assert data.batch(np.array([0]))["input_ids"].tolist() == [[START, 1, 2, 3]]
    assert data.batch(np.array([1]))["targets"].tolist() == [6, END]


@pytest.mark.parametrize("mode", MODES)
def test_a_text_file_is_cut_into_windows(mode: Mode, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", mode, max_length=4)
    path = tmp_path / "d.txt"
    path.write_text("w1 w2\r\nw3\n\nw4 w5 w6 w7 w8 w9\n")
    data = load_dataset(path, bundle)
    first = [] if mode == MODES[0] else [START]
    size = 4 - len(first)
    windows = [[*first, *range(at, min(at + size, 10))] for at in range(1, 10, size)]
    if not first:
        windows.pop()  # one token, which nothing predicts
    batches = [data.batch(np.array([index])) for index in range(len(data))]
    assert [batch["input_ids"][0].tolist() for batch in batches] == windows
    assert [batch["targets"].tolist() for batch in batches] == [window[1:] for window in windows]
    assert data.where(1) == f"{path}, line 4"
    assert data.cut == 0


def test_a_text_file_needs_a_length_and_its_task(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    path = tmp_path / "d.txt"
    path.write_text("w1 w2 w3")
    with pytest.raises(DataError, match=r"windows of the bundle's max_length tokens, and it has none: .*--max-length"):
        load_dataset(path, bundle)
    path.write_bytes(b"w1\n\xff\n")
    other = pz.prepare(tmp_path / "m.onnx", tmp_path / "short", task="causal-lm", max_length=4)
    with pytest.raises(DataError, match=r"d\.txt, line 2: not UTF-8: byte 0xff"):
        load_dataset(path, other)


def test_arrays_of_tokens(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    ids = np.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = (ids > 0).astype(np.int64)
    labels = np.array([[-100, -100, 3, 4], [-100, 6, -100, -100]])
    for marks, targets in ((None, [2, 3, 4, 6]), (labels, [3, 4, 6])):
        arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        arrays |= {} if marks is None else {"labels": marks}
        np.savez(tmp_path / "d.npz", **arrays)
        batch = load_dataset(tmp_path / "d.npz", bundle).batch(np.array([0, 1]))
        assert batch["targets"].tolist() == targets
        assert batch["positions"].tolist() == [0, 1, 2, 4][-len(targets) :]
    records = ({"prompt": "w1 w2", "completion": " w3 w4"}, {"text": "w5 w6"})
    same = load_dataset(lines(tmp_path / "d.jsonl", *records), bundle)
    assert load_dataset(tmp_path / "d.npz", bundle).fingerprint == same.fingerprint

    folder = tmp_path / "prompt"
    folder.mkdir()
    prompt = prepared(folder, "prompt", **PROMPT)
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=mask, labels=np.array([1, 0]))
    batch = load_dataset(tmp_path / "d.npz", prompt).batch(np.array([1, 0]))
    assert (batch["positions"].tolist(), batch["labels"].tolist()) == ([1, 7], [0, 1])


@pytest.mark.parametrize(
    ("task", "change", "reason"),
    [
        (
            "causal-lm",
            {"labels": [[-100, 3], [-100, 4]]},
            "row 0: 'labels' must be the tokens of 'input_ids'",
        ),
        ("causal-lm", {"labels": [[1, -100], [-100, 4]]}, "row 0: there is no token that counts"),
        ("causal-lm", {"labels": [1, 2]}, "array 'labels' must be integers of the shape of 'input_ids'"),
        ("causal-lm", {"attention_mask": [[1, 1], [0, 1]]}, "row 1: 'attention_mask' begins with padding"),
        ("causal-lm", {"attention_mask": [[1, 1], [1, 0]]}, "row 1: there is no token that counts"),
        ("choice", {}, "an example of the task 'choice' has several rows: write the data as .jsonl"),
    ],
)
def test_arrays_that_cannot_be_learnt(task: str, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, task)
    arrays = {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 1]]} | change
    given: dict[str, Any] = {name: np.array(values) for name, values in arrays.items()}
    np.savez(tmp_path / "d.npz", **given)
    with pytest.raises(DataError, match=re.escape(reason)):
        load_dataset(tmp_path / "d.npz", bundle)


# ---- prompts ---------------------------------------------------------------------------------------------------------

TEMPLATE = "w20 {text} w21 w22"
PROMPT: dict[str, Any] = {"template": TEMPLATE, "label_words": ["w10", "w11"], "labels": ["no", "yes"]}


@pytest.mark.parametrize("mode", MODES)
def test_the_text_of_a_prompt_is_cut_and_never_its_template(mode: Mode, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "prompt", mode, max_length=6, **PROMPT)
    path = tmp_path / "d.jsonl"
    data = load_dataset(lines(path, *({"text": words(*range(1, 1 + n)), "label": n % 2} for n in (1, 5))), bundle)
    first = [] if mode == MODES[0] else [START]
    room = 3 - len(first)
    batch = data.batch(np.array([1, 0]))
    assert batch["input_ids"].tolist() == [
        [*first, 20, *range(1, 1 + room), 21, 22],
        [*first, 20, 1, 21, 22, *[0] * (room - 1)],
    ]
    assert (batch["positions"] % 6).tolist() == [5, 6 - room]
    assert (data.cut, batch["labels"].tolist()) == (1, [1, 1])
    with pytest.raises(DataError, match=r"line 1: a maximum length of 3 tokens leaves no room for the text"):
        load_dataset(path, pz.prepare(tmp_path / "m.onnx", tmp_path / "short", task="prompt", max_length=3, **PROMPT))


def test_of_a_pair_the_longer_text_is_cut(tmp_path: Path) -> None:
    options = PROMPT | {"template": "w20 {pair} w21 {text} w22"}
    bundle = prepared(tmp_path, "prompt", max_length=7, **options)
    record = {"text": words(1, 2, 3, 4, 5), "text_pair": " w6 w7 ", "label": "yes"}
    data = load_dataset(lines(tmp_path / "d.jsonl", record), bundle)
    assert data.batch(np.array([0]))["input_ids"].tolist() == [[20, 6, 7, 21, 1, 2, 22]]
    with pytest.raises(DataError, match=r"line 1: no 'text_pair' .*, and the template has \{pair\}"):
        load_dataset(lines(tmp_path / "d.jsonl", {"text": "w1", "label": 0}), bundle)


def test_the_spaces_around_a_text_are_left_out(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "prompt", **PROMPT | {"template": "w20 {text}, {pair}: {other}"})
    tokenizer = bpe()
    (got,) = task_of(bundle).encode(tokenizer, [Example(" a b\n", "\tc ", 0)], None)
    assert got.rows[0].ids == tokenizer.encode("w20 a b, c: {other}").ids


def test_a_masked_prompt_counts_at_the_templates_own_mask(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({f"w{n}": n for n in range(39)} | {"[MASK]": 39}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.post_processor = TemplateProcessing(
        single="w1 $A w2", pair="w1 $A w2 $B:1", special_tokens=[("w1", 1), ("w2", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    bundle = pz.prepare(
        MODELS / "mlm-new.onnx",
        tmp_path / "base",
        tokenizer=tmp_path / "tokenizer.json",
        task="prompt",
        template="{text} w6 {mask} w4",
        label_words=["w9", "w7"],
        max_length=8,
    )
    first = with_template(bundle, tokenizer, "{mask} {text}")
    assert encode_texts(["w10 [MASK]"], first).batch(np.array([0]))["positions"].tolist() == [1]
    data = encode_texts(["w10 [MASK] w12 w13 w14", "w10"], bundle)
    batch = data.batch(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[1, 10, 39, 12, 6, 39, 4, 2], [1, 10, 6, 39, 4, 2, 0, 0]]
    assert batch["positions"].tolist() == [5, 8 + 3]
    task = task_of(bundle)
    model = pz.load(bundle)
    everything = run(model, task, batch, ["logits"])["logits"]
    for index in range(2):
        alone = run(model, task, data.batch(np.array([index])), ["logits"])["logits"]
        np.testing.assert_allclose(alone[0], everything[index], rtol=1e-5, atol=1e-6)


def bpe(*merges: str) -> Tokenizer:
    """Return a byte-level tokenizer with some words, each with the space before it, as Ġ."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate(alphabet)}
    pairs = []
    for word in merges:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                pairs.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_label_words_are_the_tokens_that_they_are_in_the_template() -> None:
    tokenizer = bpe("Ġgood", "Ġbad", "good", "bad")
    of = {word: tokenizer.token_to_id(word) for word in ("good", "Ġgood", "bad", "Ġbad", "a", "b")}
    spaced, bare = (of["Ġgood"], of["Ġbad"]), (of["good"], of["bad"])
    texts = ["good", "bad"]
    assert label_tokens(tokenizer, "Review: {text}\nSentiment:", texts) == spaced
    assert label_tokens(tokenizer, "Review: {text}\nSentiment:", [" good", " bad"]) == spaced
    assert label_tokens(tokenizer, "Review: {text}\nSentiment:\n", texts) == bare
    assert label_tokens(tokenizer, "{text}", texts) == spaced
    assert label_tokens(tokenizer, "{text} It was {mask}.", texts) == spaced
    assert label_tokens(tokenizer, "{text} {mask}", texts) == spaced
    assert label_tokens(tokenizer, "{mask}: {text}", texts) == bare
    assert label_tokens(tokenizer, "{text} It was({mask})", texts) == bare
    assert label_tokens(tokenizer, "{text}", ["a", "b"]) == (of["a"], of["b"])  # with a space they are two tokens


@pytest.mark.parametrize(
    ("template", "words", "reason"),
    [
        (
            "{text}:",
            ["good", "better"],
            r"'better' is the tokens \[\d+, .*\] after ':', expected one: choose another",
        ),
        ("{text}: ", ["good", "bad"], "'good' takes the white space into its token with which the template '{text}: '"),
        ("{text}:", ["good", " good"], r"'good' and ' good' are both token \d+"),
        ("Review:", ["good", "bad"], "the template 'Review:' has no place for the text: write {text} there"),
        ("{text} {text}", ["good", "bad"], r"has {text} more than once"),
    ],
)
def test_a_label_word_that_is_not_one_token_is_refused(template: str, words: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("{text}", r"\{text\}").replace("(", r"\(")):
        label_tokens(bpe("Ġgood", "Ġbad", "good", "bad"), template, words)


# ---- padding, parts and values ---------------------------------------------------------------------------------------

COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": words(1, 2, 3, 4, 5), "completion": " w6"},
    {"prompt": "w7", "completion": " w8 w9 w10 w11"},
    {"text": words(*range(12, 20))},
    {"prompt": "w20", "completion": " w21"},
    {"text": "w22 w23"},
    {"prompt": words(24, 25, 26), "completion": " w27 w28 w29"},
]
CHOICES: list[dict[str, Any]] = [
    {"context": "w1 w2", "choices": [" w3", " w4 w5 w6", " w7"], "label": 1},
    {"context": "w8", "choices": [" w9", " w10"], "label": 0},
    {"context": words(11, 12, 13, 14), "choices": [" w15 w16", " w17"], "label": " w17"},
    {"context": "w18 w19", "choices": [" w20 w21", " w22", " w23", " w24 w25"], "label": 3},
]
PROMPTS: list[dict[str, Any]] = [{"text": words(*range(1, 2 + n)), "label": n % 2} for n in (4, 0, 7, 2, 1)]
DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "causal-lm": (COMPLETIONS, {}),
    "choice": (CHOICES, {}),
    "prompt": (PROMPTS, PROMPT),
}


@pytest.mark.parametrize("name", FLOATS)
def test_a_loss_is_the_same_alone_and_in_any_padded_batch(name: str, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", name=name)
    data = load_dataset(lines(tmp_path / "d.jsonl", *COMPLETIONS), bundle)
    model, path = pz.load(bundle), tmp_path / "m.onnx"
    everything = data.batch(np.arange(6))
    together = model.run(everything)[TOKEN_LOSSES]
    rows = everything["positions"] // everything["input_ids"].shape[1]
    for index in range(6):
        batch = data.batch(np.array([index]))
        alone = model.run(batch)[TOKEN_LOSSES]
        np.testing.assert_allclose(alone, together[rows == index], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(
            alone,
            losses_by_hand(path, batch["input_ids"][0].tolist(), (batch["positions"] + 1).tolist()),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("pad", [None, 7], ids=["no pad token", "pads on the left"])
def test_padding_is_on_the_right_by_any_token(pad: int | None, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    write_tokenizer(bundle.path, pad=pad)
    batch = load_dataset(lines(tmp_path / "d.jsonl", *COMPLETIONS), bundle).batch(np.array([4, 1]))
    fill = 0 if pad is None else pad
    assert batch["input_ids"].tolist() == [[22, 23, fill, fill, fill], [7, 8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert (batch["positions"].tolist(), batch["targets"].tolist()) == ([0, 5, 6, 7, 8], [23, 8, 9, 10, 11])


def test_a_padding_token_beyond_the_embedding_does_not_matter(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    write_tokenizer(bundle.path, pad=VOCABULARY)
    batch = load_dataset(lines(tmp_path / "d.jsonl", *COMPLETIONS), bundle).batch(np.array([4, 1]))
    assert batch["input_ids"][0].tolist() == [22, 23, 0, 0, 0]


@pytest.mark.parametrize("name", ["llama", "genai", "gpt2", "qwen2-vl"])
@pytest.mark.parametrize("task", DATA)
def test_parts_give_the_loss_and_metrics_of_the_whole_batch(task: str, name: str, tmp_path: Path) -> None:
    records, options = DATA[task]
    bundle = prepared(tmp_path, task, name=name, **options)
    data = load_dataset(lines(tmp_path / "d.jsonl", *records), bundle)
    model, made = pz.load(bundle), task_of(bundle)
    assert made.vocabulary == VOCABULARY
    batch = data.batch(np.arange(len(data)))
    whole = Objective(metric_objective("loss", bundle), made)
    assert len(parts(made, batch)) == 1
    loss, width = whole(model, batch), batch["input_ids"].shape[1]
    outputs = whole.forward(model, batch)
    counts = []
    for positions in (1, 2, 3, 5):
        memory = 4 * positions * max(VOCABULARY, 96 * width)
        cut = parts(made, batch, memory)
        counts.append(len(cut))
        assert sorted(np.concatenate([part.at for part in cut]).tolist()) == list(range(batch["positions"].size))
        assert all(part.batch["attention_mask"].any(axis=0).all() for part in cut)  # no column of padding alone
        assert Objective(metric_objective("loss", bundle), made, memory)(model, batch) == pytest.approx(loss, rel=1e-6)
        for output, values in run(model, made, batch, list(outputs), memory).items():
            np.testing.assert_allclose(values, outputs[output], rtol=1e-5, atol=2e-6)
        result = pz.evaluate(model, data, batch_size=len(data), activation_memory=memory)
        assert result == pytest.approx(pz.evaluate(model, data, batch_size=len(data)), rel=1e-6)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2


def test_parts_hold_as_many_logits_as_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    data = load_dataset(lines(tmp_path / "d.jsonl", *COMPLETIONS), bundle)
    batch, task = data.batch(np.arange(6)), task_of(bundle)
    assert LOGITS_MEMORY == 32_000_000
    monkeypatch.setattr("pocketzo.tasks.parts.LOGITS_MEMORY", 4 * VOCABULARY * 5)
    cut = parts(task, batch)
    found = [(part.batch["input_ids"].shape, part.batch["targets"].size) for part in cut]
    assert found == [((2, 2), 2), ((2, 6), 5), ((1, 6), 3), ((1, 8), 7)]  # a row of 7 is too large, and a part


def test_classification_is_run_in_parts_if_a_figure_is_given(tmp_path: Path) -> None:
    bundle = pz.prepare(MODELS / "bert-new.onnx", tmp_path / "base")
    model, task = pz.load(bundle), task_of(bundle)
    rng = np.random.default_rng(3)
    ids = rng.integers(1, 60, (7, 6))
    batch = {
        "input_ids": ids,
        "attention_mask": (np.arange(6) < rng.integers(2, 7, 7)[:, None]).astype(np.int64),
        "token_type_ids": np.zeros_like(ids),
        "labels": rng.integers(0, 3, 7),
    }
    batch = {name: values for name, values in batch.items() if name in {spec.name for spec in bundle.inputs}}
    whole = model.run(batch)
    assert len(parts(task, batch)) == 1
    assert len(parts(task, batch, 1)) == 7
    got = run(model, task, batch, None, 1)
    np.testing.assert_allclose(got["logits"], whole["logits"], rtol=1e-5, atol=1e-6)
    assert float(got["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)


def test_an_output_that_is_of_no_example_cannot_be_joined(tmp_path: Path) -> None:
    model = model_of(
        tmp_path / "m.onnx",
        [node("MatMul", "x fc.weight", "logits"), node("ReduceMean", "logits", "mean", axes=[0], keepdims=1)],
        [weight("fc.weight", 4, 3)],
        outputs=[("logits", ("batch", 3)), ("mean", (1, 3))],
    )
    bundle = pz.prepare(model, tmp_path / "base")
    batch: dict[str, Array] = {"x": np.ones((4, 4), np.float32), "labels": np.zeros(4, np.int64)}
    loaded, task = pz.load(bundle), task_of(bundle)
    assert run(loaded, task, batch, ["logits"], 1)["logits"].shape == (4, 3)
    assert run(loaded, task, batch, ["mean"])["mean"].shape == (1, 3)
    three = {name: values[:3] for name, values in batch.items()}
    with pytest.raises(ValueError, match=r"'mean', \[1, 3\] for 2 examples, cannot be joined from parts"):
        run(loaded, task, three, ["mean"], 8)


def test_labels_of_a_prompt_belong_to_positions(tmp_path: Path) -> None:
    """A caller's own batch may have two prompts in a row of tokens, or none."""
    bundle = prepared(tmp_path, "prompt", **PROMPT)
    model, task = pz.load(bundle), task_of(bundle)
    ids = np.arange(1, 13).reshape(3, 4)
    batch = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(4), (3, 1)),
        "positions": np.array([11, 1, 3, 9]),
        "labels": np.array([0, 1, 1, 0]),
    }
    whole = model.run(batch)
    assert len(parts(task, batch, 1)) == 2
    got = run(model, task, batch, None, 1)
    np.testing.assert_allclose(got["logits"], whole["logits"], rtol=1e-5, atol=1e-6)
    assert float(got["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)


@pytest.mark.parametrize("per", ["sum", "token"])
def test_choices_are_scored_as_by_hand(per: str, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "choice", MODES[2], per=per)
    data = load_dataset(lines(tmp_path / "d.jsonl", *CHOICES), bundle)
    assert data.lengths is not None
    assert data.lengths.tolist() == [6, 3, 7, 5]
    crosses, right = [], []
    for record in CHOICES:
        before = [START, *(int(word[1:]) for word in record["context"].split())]
        scores = []
        for choice in record["choices"]:
            ids = [*before, *(int(word[1:]) for word in choice.split())]
            losses = losses_by_hand(tmp_path / "m.onnx", ids, range(len(before), len(ids)))
            scores.append(-losses.sum() if per == "sum" else -losses.mean())
        label = record["choices"].index(record["label"]) if isinstance(record["label"], str) else record["label"]
        crosses.append(-log_softmax(np.array(scores))[label])
        right.append(np.argmax(scores) == label)
    for size in (1, 3, 4):
        result = pz.evaluate(pz.load(bundle), data, batch_size=size)
        assert result["loss"] == pytest.approx(np.mean(crosses), rel=1e-5)
        assert (result["accuracy"], result["count"]) == (np.mean(right), 4)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"context": "w1", "choices": [" w2"], "label": 0}, "'choices' must be a list of two texts or more, found 1"),
        ({"context": "w1", "choices": "w2", "label": 0}, "'choices' must be a list of two texts or more, found str"),
        ({"context": "w1", "choices": [" w2", 3], "label": 0}, "'choices' must hold strings, found int"),
        ({"context": "w1", "choices": [" w2", " w3"], "label": 2}, "the label is 2, and there are 2 choices, from 0"),
        ({"context": "w1", "choices": [" w2", " w3"], "label": "w2"}, "the label must be the number of a choice"),
        ({"context": "w1", "choices": [" w2", " w3"]}, "no 'label' among the columns"),
        ({"context": "w1", "label": 0}, "no 'choices' among the columns"),
        ({"context": words(1, 2, 3), "choices": [" w2", " w3 w4"], "label": 0}, "5 tokens, and the model takes at most "
         "4, so that choice 1 would be cut"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_learnt_is_named_with_its_line(record: object, reason: str, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "choice", max_length=4)
    good = {"context": "w1", "choices": [" w2", " w3"], "label": 0}
    with pytest.raises(DataError) as caught:
        load_dataset(lines(tmp_path / "d.jsonl", good, record), bundle)
    assert str(caught.value).startswith(f"{tmp_path / 'd.jsonl'}, line 2: {reason}")


def test_choices_without_labels_have_no_metrics(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "choice")
    record = {"context": "w1", "choices": [" w2", " w3"]}
    data = load_dataset(lines(tmp_path / "d.jsonl", record), bundle, require_labels=False)
    with pytest.raises(pz.TrainingError, match="the data has no labels"):
        pz.evaluate(pz.load(bundle), data)


def test_perplexity_and_loss_are_of_all_tokens_that_count(tmp_path: Path) -> None:
    """Not the mean of the batches' means: batches have different numbers of tokens."""
    bundle = prepared(tmp_path, "causal-lm")
    data = load_dataset(lines(tmp_path / "d.jsonl", *COMPLETIONS), bundle)
    model = pz.load(bundle)
    losses = model.run(data.batch(np.arange(6)))[TOKEN_LOSSES].astype(np.float64)
    for size in (1, 4):
        result = pz.evaluate(model, data, batch_size=size)
        assert result == pytest.approx(
            {"count": 6, "loss": losses.mean(), "perplexity": math.exp(losses.mean())}, rel=1e-6
        )


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", DATA)
@pytest.mark.parametrize("method", [pz.MeZO, pz.FZOO])
def test_a_run_resumes_and_replays_to_the_same_bits(
    task: str, method: Callable[..., pz.Optimizer], tmp_path: Path
) -> None:
    records, options = DATA[task]
    bundle = prepared(tmp_path, task, **options)
    data = load_dataset(lines(tmp_path / "d.jsonl", *records), bundle)
    memory = 4 * 96 * 12

    def trainer(run: Path) -> pz.Trainer:
        model = pz.load(bundle, threads=1)
        return pz.Trainer(
            model,
            method(model, lr=1e-3, seed=4),
            data,
            eval=data,
            steps=6,
            batch_size=4,
            run=run,
            activation_memory=memory,
        )

    whole = trainer(tmp_path / "whole")
    whole.fit()
    whole.model.save(tmp_path / "tuned")
    broken = trainer(tmp_path / "broken")
    broken.callback = lambda progress: setattr(broken, "stop_requested", progress.info.step == 2)
    broken.fit()
    assert 0 < broken.optimizer.step_number < 6
    resumed = pz.Trainer.resume(tmp_path / "broken", data, eval=data)
    assert resumed.loop.activation_memory == resumed.objective.activation_memory == memory
    resumed.fit()
    resumed.model.save(tmp_path / "resumed")
    pz.Run(tmp_path / "whole").replay(tmp_path / "replayed")
    hashes = {file_sha256(tmp_path / name / "weights.safetensors") for name in ("tuned", "resumed", "replayed")}
    assert len(hashes) == 1
    assert hashes != {file_sha256(bundle.weights_path)}
    assert resumed.evaluations.keys() == {0, 6}
    assert resumed.evaluations[6] == whole.evaluations[6]


def test_a_run_learns_a_completion(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    data = load_dataset(lines(tmp_path / "d.jsonl", *COMPLETIONS), bundle)
    model = pz.load(bundle)
    before = pz.evaluate(model, data)["loss"]
    pz.Trainer(model, pz.FZOO(model, lr=2e-2, eps=1e-2, seed=1), data, steps=40, batch_size=6).fit()
    assert pz.evaluate(model, data)["loss"] < before - 0.5


def test_a_template_is_tried_on_the_same_bundle(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "prompt", **PROMPT)
    tokenizer = write_tokenizer(tmp_path)
    other = with_template(bundle, tokenizer, "w23 {text} w24")
    data = load_dataset(lines(tmp_path / "d.jsonl", *PROMPTS), other)
    assert data.batch(np.array([1]))["input_ids"].tolist() == [[23, 1, 24]]
    with pytest.raises(ValueError, match=r"has a \{mask\}, unlike the bundle's"):
        with_template(bundle, tokenizer, "{text} {mask}")
    causal = pz.prepare(tmp_path / "m.onnx", tmp_path / "lm", task="causal-lm")
    with pytest.raises(ValueError, match=r"templates belong to the task 'prompt', and the bundle's is 'causal-lm'"):
        with_template(causal, tokenizer, "{text}")


def test_a_text_that_is_too_long_for_the_model_is_named(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", name="gpt2")  # of 32 positions
    records = [COMPLETIONS[0], {"text": words(*([1] * 34))}]
    data = load_dataset(lines(tmp_path / "d.jsonl", *records), bundle)
    with pytest.raises(DataError, match=r"line 2: 34 tokens, and the model takes at most 32: .*--max-length 32"):
        pz.evaluate(pz.load(bundle), data)
