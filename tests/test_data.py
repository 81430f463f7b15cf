from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from described import CLS, PAD, SEP, WORDS, described_bundle, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx import save as save_model
from sizes import full_or_small
from tokenizers import Tokenizer

import pocketzo as pz
from pocketzo.data.batch import Batch
from pocketzo.data.columns import Columns
from pocketzo.data.dataset import Dataset
from pocketzo.data.load import encode_texts, load_dataset
from pocketzo.errors import BundleError, DataError, MissingExtraError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.embeddings import embedding_rows


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path)
    return path


MakeBundle = Callable[..., Bundle]


@pytest.fixture(scope="session")
def make_bundle(tokenizer_path: Path) -> MakeBundle:
    return lambda path=tokenizer_path.parent, **options: described_bundle(path, **options)


@pytest.fixture(scope="session")
def bundle(make_bundle: MakeBundle) -> Bundle:
    return make_bundle()


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def everything(data: Dataset) -> Batch:
    return data.batch(np.arange(len(data)))


def assert_same(left: Dataset, right: Dataset) -> None:
    one, two = everything(left), everything(right)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name, strict=True)


TEXTS = ["a good film", "the film is not good , it is bad", 'he said " one , two " twice', "a"]
LABELS = [1, 0, 0, 1]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["right", "left"])
@pytest.mark.parametrize("pairs", [False, True])
def test_batches_are_what_the_tokenizers_library_pads(
    tmp_path: Path, tokenizer_path: Path, make_bundle: MakeBundle, direction: str, pairs: bool
) -> None:
    oracle = Tokenizer.from_file(str(tokenizer_path))
    oracle.enable_truncation(9)
    oracle.enable_padding(pad_id=PAD, pad_type_id=1, pad_token="[PAD]", direction=direction)
    oracle.save(str(tmp_path / "tokenizer.json"))
    rows = [(text, other) for text, other in zip(TEXTS, reversed(TEXTS), strict=True)]
    lines = [
        {"text": text, "label": label} | ({"text_pair": other} if pairs else {})
        for (text, other), label in zip(rows, LABELS, strict=True)
    ]
    path = write(tmp_path, "train.jsonl", "\n".join(map(json.dumps, lines)))
    data = load_dataset(path, make_bundle(path=tmp_path, max_length=9))

    for indices in ([0, 1, 2, 3], [3], [3, 0, 3]):
        expected = oracle.encode_batch([rows[i] if pairs else rows[i][0] for i in indices])
        batch = data.batch(np.array(indices))
        assert list(batch) == ["input_ids", "attention_mask", "token_type_ids", "labels"]
        np.testing.assert_array_equal(batch.examples, np.array(indices), strict=True)
        np.testing.assert_array_equal(batch["input_ids"], [e.ids for e in expected])
        np.testing.assert_array_equal(batch["attention_mask"], [e.attention_mask for e in expected])
        np.testing.assert_array_equal(batch["token_type_ids"], [e.type_ids for e in expected])
        np.testing.assert_array_equal(batch["labels"], np.array(LABELS)[indices])
        assert all(values.dtype == np.int64 and values.flags.c_contiguous for values in batch.values())
    assert data.lengths is not None
    assert data.lengths.max() == 9
    assert data.lengths.tolist() == [sum(e.attention_mask) for e in oracle.encode_batch(rows if pairs else TEXTS)]
    assert data.labels == ("negative", "positive")


@pytest.mark.parametrize("pad", ["[PAD]", "<pad>", None])
def test_pad_id_without_padding_settings(
    tmp_path: Path, tokenizer_path: Path, make_bundle: MakeBundle, pad: str | None
) -> None:
    settings = json.loads(tokenizer_path.read_text())
    settings["padding"] = None
    vocabulary = settings["model"]["vocab"]
    number = vocabulary.pop("[PAD]")
    vocabulary[pad or "[Z]"] = number
    write(tmp_path, "tokenizer.json", json.dumps(settings))
    ids = everything(encode_texts(["a", "a b"], make_bundle(path=tmp_path)))["input_ids"]
    assert ids[0, -1] == (PAD if pad else 0)


def test_truncation_without_maximum_is_the_tokenizers_own(make_bundle: MakeBundle) -> None:
    assert everything(encode_texts(["a b a b a b"], make_bundle(max_length=None)))["input_ids"].shape == (1, 3)


def test_truncation_keeps_the_tokenizers_direction(
    tmp_path: Path, tokenizer_path: Path, make_bundle: MakeBundle
) -> None:
    oracle = Tokenizer.from_file(str(tokenizer_path))
    oracle.no_padding()
    oracle.enable_truncation(4, direction="left")
    oracle.save(str(tmp_path / "tokenizer.json"))
    data = encode_texts(["a good film"], make_bundle(path=tmp_path, max_length=4))
    assert everything(data)["input_ids"].tolist() == [oracle.encode("a good film").ids]


def test_chunks_keep_the_order(bundle: Bundle) -> None:
    texts = [" ".join(WORDS[: 1 + i % 7]) for i in range(1000)]
    data = encode_texts(texts, bundle)
    assert data.lengths is not None
    assert data.lengths.tolist() == [3 + i % 7 for i in range(1000)]
    for i in (0, 255, 256, 257, 999):
        one = encode_texts([texts[i]], bundle)
        np.testing.assert_array_equal(data.batch(np.array([i]))["input_ids"], everything(one)["input_ids"])


def test_inputs_are_the_models(make_bundle: MakeBundle) -> None:
    shape = ("batch", "sequence")
    bundle = make_bundle(inputs={"position_ids": ("int64", shape), "input_ids": ("int32", shape)})
    batch = everything(encode_texts(["a", "a good film"], bundle))
    assert list(batch) == ["position_ids", "input_ids"]
    assert batch["input_ids"].dtype == np.int32
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3, 4]
    assert batch["position_ids"][0, :3].tolist() == [0, 1, 2]


def test_fixed_sizes(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(
        inputs={"input_ids": ("int64", (2, 8)), "attention_mask": ("int64", (2, 8)), "labels": ("int64", (2,))}
    )
    data = encode_texts(["a", "a b a b a b a b a b a b", "b"], bundle)
    batch = data.batch(np.array([0, 1]))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8)
    assert batch["attention_mask"].sum(axis=1).tolist() == [3, 8]
    with pytest.raises(DataError, match=r"input 'input_ids' takes batches of exactly 2, got 3"):
        everything(data)


def test_a_batch_knows_its_examples_and_shows_the_model_none_of_it(tiny_bundle: Path, tiny_data: Path) -> None:
    model = pz.load(tiny_bundle, threads=1)
    batch = pz.load_dataset(tiny_data, model.bundle).batch(np.array([7, 0, 7], np.uint8))
    np.testing.assert_array_equal(batch.examples, np.array([7, 0, 7]), strict=True)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert len(batch) == 3
    assert "examples" not in batch
    assert "input_ids int64[3, 8]" in repr(batch)
    assert model.loss(batch) == model.loss(dict(batch))


@pytest.mark.parametrize("indices", [[], [[0]], [0.0], [True], [-1], [4]])
def test_bad_indices(bundle: Bundle, indices: list[Any]) -> None:
    with pytest.raises(ValueError, match="indices must be"):
        encode_texts(TEXTS, bundle).batch(np.array(indices))


def test_encode_texts_refuses_a_bare_string(bundle: Bundle) -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        encode_texts("a good film", bundle)
    with pytest.raises(DataError, match="texts: no examples"):
        encode_texts([], bundle)
    with pytest.raises(DataError, match="texts, number 2: 'text' is empty"):
        encode_texts(["a", " "], bundle)


# --- the formats ------------------------------------------------------------------------------------------------------


def sources(folder: Path) -> dict[str, Path]:
    """Write the same examples in every format and every dress."""
    names = ["negative", "positive"]
    rows = list(zip(TEXTS, LABELS, strict=True))
    table = "".join(f"{text}\t{label}\n" for text, label in rows)
    quoted = io.StringIO()
    csv.writer(quoted).writerows(rows)
    crossed = io.StringIO()
    csv.writer(crossed, lineterminator="\n").writerows([("id", "Label", " Sentence"), *((7, y, x) for x, y in rows)])
    lines = [json.dumps({"text": text, "label": label, "id": 3}) for text, label in rows]
    content = {
        "plain.tsv": table,
        "named.tsv": "".join(f"{text}\t{names[label]}\n" for text, label in rows),
        "header.tsv": "sentence\tlabel\n" + table,
        "crlf.TSV": "\ufeff" + table.replace("\n", "\r\n"),
        "no_last_newline.tsv": table.rstrip("\n"),
        "blank_end.tsv": table + "\n\r\n\n",
        "plain.csv": quoted.getvalue(),
        "mac.csv": quoted.getvalue().replace("\r\n", "\r"),
        "header.csv": "\ufefftext,label\r\n" + quoted.getvalue() + "\r\n",
        "crossed.csv": crossed.getvalue(),
        "plain.jsonl": "\n".join(lines) + "\n\n",
        "crlf.jsonl": "\ufeff" + "\r\n".join(lines),
        "named.jsonl": "\n".join(json.dumps({"Sentence": text, "label": names[label]}) for text, label in rows),
    }
    return {name: write(folder, name, text) for name, text in content.items()}


def test_same_content_same_batches_and_fingerprint(tmp_path: Path, bundle: Bundle) -> None:
    paths = sources(tmp_path)
    first = load_dataset(paths["plain.jsonl"], bundle)
    assert len(first) == 4
    ids = np.array(everything(first)["input_ids"])
    mask = np.array(everything(first)["attention_mask"])
    paths["ids.npz"] = tmp_path / "ids.npz"
    np.savez(paths["ids.npz"], labels=np.array(LABELS, np.uint8), attention_mask=mask.astype(bool), input_ids=ids)
    for name, path in paths.items():
        data = load_dataset(path, bundle)
        assert_same(first, data)
        assert data.fingerprint == first.fingerprint, name


def test_fingerprint_tells_what_training_sees(tmp_path: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    variants = {
        "base": '{"text": "a b", "label": 0}\n{"text": "a", "label": 1}',
        "label": '{"text": "a b", "label": 1}\n{"text": "a", "label": 1}',
        "order": '{"text": "a", "label": 1}\n{"text": "a b", "label": 0}',
        "word": '{"text": "a b", "label": 0}\n{"text": "b", "label": 1}',
        "cut": '{"text": "a", "label": 0}\n{"text": "b a", "label": 1}',
        "pair": '{"text": "a b", "label": 0}\n{"text": "a", "label": 1, "text_pair": "b"}',
        "unlabelled": '{"text": "a b"}\n{"text": "a"}',
    }
    seen = {
        load_dataset(write(tmp_path, f"{name}.jsonl", text), bundle, require_labels=False).fingerprint
        for name, text in variants.items()
    }
    seen.add(load_dataset(tmp_path / "base.jsonl", make_bundle(max_length=3)).fingerprint)
    assert len(seen) == len(variants) + 1
    assert all(len(mark) == 64 and int(mark, 16) >= 0 for mark in seen)


def test_fingerprint_never_changes(tmp_path: Path, bundle: Bundle) -> None:
    # Journals carry it. By hand, over the fields in the order of their names.
    path = write(tmp_path, "one.tsv", "a b\t1\n")
    expected = hashlib.sha256(
        b'[{"input_ids": 5, "attention_mask": 0, "token_type_ids": 0}, false]'
        + (b'["input_ids", "int32", [4]]' + np.array([CLS, 6, 7, SEP], "<i4").tobytes())
        + (b'["labels", "int64", [1]]' + np.array([1], "<i8").tobytes())
        + (b'["lengths", "int32", [1]]' + np.array([4], "<i4").tobytes())
    )
    assert load_dataset(path, bundle).fingerprint == expected.hexdigest()


# Characters that JSON and CSV can hold: all but lone surrogates.
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(
    max_examples=full_or_small(60, 10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.tuples(any_text, st.integers(0, 1)), min_size=1, max_size=8))
def test_any_text_survives_any_format(tmp_path: Path, bundle: Bundle, rows: list[tuple[str, int]]) -> None:
    expected = encode_texts([text for text, _ in rows], bundle)
    for escape in (True, False):
        lines = (json.dumps({"text": text, "label": label}, ensure_ascii=escape) for text, label in rows)
        data = load_dataset(write(tmp_path, "a.jsonl", "\n".join(lines)), bundle)
        np.testing.assert_array_equal(everything(data)["input_ids"], everything(expected)["input_ids"])
        assert everything(data)["labels"].tolist() == [label for _, label in rows]
    quoted = io.StringIO()
    csv.writer(quoted).writerows([("text", "label"), *rows])
    assert_same(data, load_dataset(write(tmp_path, "a.csv", quoted.getvalue()), bundle))

    plain = [(text.replace("\t", " ").replace("\n", " ") + ".", label) for text, label in rows]
    path = write(tmp_path, "a.tsv", "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *plain]))
    expected = encode_texts([text for text, _ in plain], bundle)
    np.testing.assert_array_equal(
        everything(load_dataset(path, bundle))["input_ids"], everything(expected)["input_ids"]
    )


def test_tsv_is_verbatim(tmp_path: Path, bundle: Bundle) -> None:
    texts = ['"one" two', 'one "two', "one\\ttwo", "one \r two", "one \u2028 two", '""']
    path = write(tmp_path, "a.tsv", "".join(f"{text}\t0\n" for text in texts))
    np.testing.assert_array_equal(
        everything(load_dataset(path, bundle))["input_ids"], everything(encode_texts(texts, bundle))["input_ids"]
    )


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ("text\tlabel\na\t1\n", 1),
        ("LABEL\tid\tSentence1\n1\t7\ta\n", 1),
        ("sentence\t1\na\t1\n", 2),  # a cell alone does not make a header of two columns
        ("label\t1\na\t1\n", 2),
        ("text label\t1\na\t1\n", 2),
    ],
)
def test_header_by_names_alone(tmp_path: Path, bundle: Bundle, content: str, count: int) -> None:
    assert len(load_dataset(write(tmp_path, "a.tsv", content), bundle)) == count


def test_pairs(tmp_path: Path, bundle: Bundle) -> None:
    expected = load_dataset(write(tmp_path, "a.jsonl", '{"text": "a", "text_pair": "b", "label": 1}'), bundle)
    assert everything(expected)["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    for name, content in {
        "a.tsv": "a\tb\t1\n",
        "b.tsv": "label\tsentence1\tsentence2\n1\ta\tb\n",
        "c.csv": "text_pair,text,label\nb,a,positive\n",
    }.items():
        assert load_dataset(write(tmp_path, name, content), bundle).fingerprint == expected.fingerprint


def test_given_columns(tmp_path: Path, bundle: Bundle) -> None:
    expected = load_dataset(write(tmp_path, "a.tsv", "a\tb\t1\n"), bundle)
    columns = Columns(text="Q", text_pair="A", label="y")
    for name, content in {
        "b.tsv": "text\ty\tA\tQ\none\t1\tb\ta\n",
        "c.jsonl": '{"text": "one", "Q": "a", "A": "b", "y": "positive"}',
    }.items():
        assert load_dataset(write(tmp_path, name, content), bundle, columns=columns).fingerprint == expected.fingerprint


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_without_labels(tmp_path: Path, bundle: Bundle, name: str) -> None:
    path = write(tmp_path, name, "a good film\na bad film\n")
    data = load_dataset(path, bundle, require_labels=False)
    assert data.label_ids is None
    assert list(everything(data)) == ["input_ids", "attention_mask", "token_type_ids"]
    assert data.fingerprint == encode_texts(["a good film", "a bad film"], bundle).fingerprint
    with pytest.raises(DataError, match="line 1: 1 column and no header that names text and label: name its columns"):
        load_dataset(path, bundle)


def test_labels_that_are_there_are_read(tmp_path: Path, bundle: Bundle) -> None:
    path = write(tmp_path, "a.tsv", "a\t1\nb\t0\n")
    data = load_dataset(path, bundle, require_labels=False)
    assert data.label_ids is not None
    assert data.label_ids.tolist() == [1, 0]
    assert data.label_ids.dtype == np.int64


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "classes", "label", "expected"),
    [
        (("negative", "positive"), 2, "positive", 1),
        (("negative", "positive"), 2, 1, 1),
        (("negative", "positive"), 2, "1", 1),
        (("1", "2", "3"), 3, "1", 0),  # the names are numbers, so a number is a name
        (("1", "2", "3"), 3, 1, 0),
        (None, 3, 2, 2),
        (None, "classes", 77, 77),
    ],
)
def test_labels(
    tmp_path: Path,
    make_bundle: MakeBundle,
    names: tuple[str, ...] | None,
    classes: int | str,
    label: Any,
    expected: int,
) -> None:
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "a", "label": label}))
    data = load_dataset(path, make_bundle(labels=names, classes=classes))
    assert everything(data)["labels"].tolist() == [expected]


@pytest.mark.parametrize(
    ("names", "classes", "label", "reason"),
    [
        (("negative", "positive"), 2, "Positive", "unknown label 'Positive': expected 'negative', 'positive', 0 to 1"),
        (("negative", "positive"), 2, 2, "unknown label '2'"),
        (("negative", "positive"), 2, -1, "unknown label '-1'"),
        (("1", "2", "3"), 3, 0, "unknown label '0': expected '1', '2', '3'$"),
        (tuple(f"n{i}" for i in range(77)), 77, "x", r"'n9', \.\.\., 0 to 76"),
        (None, 3, 3, "unknown label '3': expected 0 to 2"),
        (None, 3, "positive", "unknown label 'positive': expected 0 to 2"),
        (None, "classes", -1, "unknown label '-1': expected an integer from 0"),
        (None, "classes", "\u0661", "expected an integer from 0"),
        (None, 3, 1.0, "the label must be a name or an integer, found float"),
        (None, 3, True, "the label must be a name or an integer, found bool"),
        (None, 3, [1], "the label must be a name or an integer, found list"),
    ],
)
def test_bad_labels(
    tmp_path: Path, make_bundle: MakeBundle, names: tuple[str, ...] | None, classes: int | str, label: Any, reason: str
) -> None:
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "a", "label": label}))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 1: .*{reason}"):
        load_dataset(path, make_bundle(labels=names, classes=classes))


# --- bad files --------------------------------------------------------------------------------------------------------

BAD = [
    # name, content, what the message says after the file's path
    ("a.tsv", "a\t1\nb\n", ", line 2: found 1 of 2 fields (text, label)"),
    ("b.tsv", "a\t1\nb\t1\t\n", ", line 2: found 3 of 2 fields (text, label)"),
    ("c.tsv", "a\t1\n \t1\n", ", line 2: 'text' is empty"),
    ("d.tsv", "a\t1\n\nb\t1\n\n", ", line 2: empty line"),
    ("e.tsv", "a\t1\nb\tx\nb\n\t1\nb\ty\n", ", line 2: unknown label 'x': expected 'negative', 'positive', 0 to 1"),
    ("f.tsv", b"a\t1\n\xe9t\xe9\t1\n", ", line 2: not UTF-8: byte 0xe9"),
    ("g.tsv", "a\tb\tc\t1\n", ", line 1: 4 columns and no header that names text and label"),
    ("h.tsv", "text\ttext\tlabel\na\tb\t1\n", ", line 1: the header names 'text' more than once"),
    ("i.tsv", "text\tsentence2\na\tb\n", ", line 2: no 'label' among the columns 'text', 'sentence2'"),
    ("j.tsv", "a\t \t1\n", ", line 1: 'text_pair' is empty"),
    ("k.tsv", "a\t\n", ", line 1: unknown label ''"),
    ("l.tsv", "text\tlabel\n".encode("utf-16-le"), ": every second byte is zero, as in UTF-16"),
    ("p.tsv", "a\t1\n".encode("utf-16")[:-1], ": damaged UTF-16"),
    ("q.tsv", b"\xef\xbb\xbfa\t1\r\n\xc3\xa9\xe9\t1\n", ", line 2: not UTF-8: byte 0xe9 at offset 10 of the file"),
    ("r.tsv", gzip.compress(b"a\t1\n"), ": compressed by gzip: unpack it by gunzip"),
    ("s.tsv", b"PK\x03\x04", ": a zip archive, as spreadsheets (.xlsx) are"),
    ("t.tsv", "a\t1\rb\tx\r", ", line 2: unknown label 'x'"),
    (
        "u.tsv",
        "id\treview\tkind\n1\ta\t1\n",
        ", line 1: unknown label 'kind': expected 'negative', 'positive', 0 to 1. "
        "If this row is a header, name its columns: --text-column, --text-pair-column, --label-column",
    ),
    (
        "v.tsv",
        "text,label\na,1\n",
        ", line 1: 1 column and no header that names text and label: if ',' separates the "
        "columns, say so by --delimiter ','",
    ),
    (
        "w.csv",
        "text\tlabel\na\t1\n",
        ", line 1: 1 column and no header that names text and label: if tab separates the "
        "columns, say so by --delimiter tab",
    ),
    ("x.csv", "a;1\nb;0\n", ", line 1: 1 column and no header that names text and label: if ';' separates the columns"),
    (
        "y.csv",
        "Text,text,label\na,b,1\n",
        ", line 1: the columns 'Text' and 'text' differ only in case or spaces: choose",
    ),
    (
        "z.csv",
        "review,label\na,1\n",
        ", line 1: unknown label 'label': expected 'negative', 'positive', 0 to 1. If this "
        "row is a header, name its columns: --text-column",
    ),
    ("m.tsv", "", ": no examples"),
    ("n.tsv", "\n\n", ": no examples"),
    ("o.tsv", "text\tlabel\n", ": no examples"),
    ("a.csv", "a,1\nb\n", ", line 2: found 1 of 2 fields (text, label)"),
    ("b.csv", '"a\nb",1\n"c\n\nd",1\n"",1\n', ", line 6: 'text' is empty"),
    ("c.csv", 'a,1\n"b"c,1\nd,1\n', ", line 2: not CSV: ',' expected after '\"'"),
    ("d.csv", 'a,1\n"b,1\nc,1\n', ", line 2: not CSV: unexpected end of data: a double quote is not closed"),
    ("e.csv", b'a,1\n"b\n\xff",1\n', ", line 2: not UTF-8: byte 0xff"),
    ("g.csv", "a,1\n\nb,1\n", ", line 2: empty line"),
    (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": "a"\n',
        ", line 2: not JSON: Expecting ',' delimiter at column 13",
    ),
    ("b.jsonl", '["a", 1]\n', ", line 1: not a JSON object: list"),
    ("c.jsonl", '{"txt": "a", "label": 1}\n', ", line 1: no 'text' among the columns 'txt', 'label'"),
    ("d.jsonl", "{}\n", ", line 1: no 'text' among the columns (none)"),
    ("e.jsonl", '{"text": "a"}\n', ", line 1: no 'label' among the columns 'text'"),
    ("f.jsonl", '{"text": "a", "label": null}\n', ", line 1: 'label' is null"),
    (
        "o.jsonl",
        '{"text": "a", "text": "b", "label": 1}\n',
        ", line 1: not JSON that can be read: the key 'text' is there",
    ),
    (
        "p.jsonl",
        '{"text": "a", "Text": "b", "label": 1}\n',
        ", line 1: the columns 'text' and 'Text' differ only in case",
    ),
    ("g.jsonl", '{"text": 3, "label": 1}\n', ", line 1: 'text' must be a string, found int"),
    (
        "h.jsonl",
        '{"text": "a", "label": 1, "text_pair": ["b"]}\n',
        ", line 1: 'text_pair' must be a string, found list",
    ),
    ("i.jsonl", '{"text": "a\\ud800", "label": 1}\n', ", line 1: not a character: U+D800"),
    ("j.jsonl", b'{"text": "a\xff", "label": 1}\n', ", line 1: not UTF-8: byte 0xff"),
    ("k.jsonl", "[" * 100_000 + "\n", ", line 1: not JSON that can be read"),
    ("l.jsonl", '{"text": "a", "label": ' + "1" * 5000 + "}\n", ", line 1: not JSON that can be read"),
    ("m.jsonl", '{"text": "a", "label": 1}\n\n{"text": "a", "label": 1}\n', ", line 2: empty line"),
    ("n.jsonl", "\n", ": no examples"),
    ("a.txt", "a\t1\n", ": unknown kind of file '.txt': expected .jsonl, .tsv, .csv or .npz"),
    ("a", "a\t1\n", ": unknown kind of file '': expected .jsonl, .tsv, .csv or .npz"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_files(tmp_path: Path, bundle: Bundle, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_dataset(path, bundle)
    assert str(caught.value).startswith(f"{path}{message}")


READ = [
    ("a.tsv", "a good film\t1\r\nb\t0\r\n".encode("utf-16"), Columns()),
    ("b.csv", "text,label\na good film,1\nb,0\n".encode("utf-32"), Columns()),
    (
        "c.jsonl",
        codecs.BOM_UTF16_BE + '{"text": "a good film", "label": 1}\n{"text": "b", "label": 0}'.encode("utf-16-be"),
        Columns(),
    ),
    ("d.tsv", b"a good film\t1\rb\t0", Columns()),
    ("e.jsonl", b'{"text": "a good film", "label": 1}\r{"text": "b", "label": 0}\r', Columns()),
    ("f.csv", b"a good film,1\rb,0\r", Columns()),
    ("g.csv", b"text;label\n'a good film';1\nb;0\n".replace(b"'", b'"'), Columns(delimiter=";")),
    ("h.tsv", b"text|label\na good film|1\nb|0\n", Columns(delimiter="|")),
    ("i.csv", b"review,kind\na good film,1\nb,0\n", Columns(text="review", label="kind")),
    ("j.csv", b"Text,text,label\nx,a good film,1\nx,b,0\n", Columns(text="text")),
]


@pytest.mark.parametrize(("name", "content", "columns"), READ, ids=[name for name, _, _ in READ])
def test_files_of_other_programs(tmp_path: Path, bundle: Bundle, name: str, content: bytes, columns: Columns) -> None:
    data = load_dataset(write(tmp_path, name, content), bundle, columns=columns)
    assert data.fingerprint == load_dataset(write(tmp_path, "as.tsv", "a good film\t1\nb\t0\n"), bundle).fingerprint


def test_a_cr_in_a_file_with_line_feeds_is_part_of_the_text(tmp_path: Path, make_bundle: MakeBundle) -> None:
    path = write(tmp_path, "a.tsv", "a\rb\t1\nb\t0\n")
    assert len(load_dataset(path, make_bundle())) == 2


@pytest.mark.parametrize("content", ["good\t1\rbad\t0\n", "good\t1\rbad\t0\ra\t1\r\n", "a\t1\n\rb\t0\rgood\t1\n"])
def test_rows_that_carriage_returns_separate_are_not_one(tmp_path: Path, bundle: Bundle, content: str) -> None:
    number = content.count("\n")
    with pytest.raises(DataError, match=rf"line {number}: several rows, separated by carriage returns"):
        load_dataset(write(tmp_path, "a.tsv", content), bundle)


def test_quoted_columns_of_another_delimiter(tmp_path: Path, bundle: Bundle) -> None:
    path = write(tmp_path, "a.csv", '"text";"label"\n"good";1\n')
    with pytest.raises(
        DataError, match=r"line 1: not CSV: .*; if ',' is not what separates the columns, .* --delimiter"
    ):
        load_dataset(path, bundle)


def test_a_csv_field_may_be_long_and_the_limit_of_the_process_stays(tmp_path: Path, bundle: Bundle) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", "a,1\n" + "b " * 100_000 + ",0\n")
    data = load_dataset(path, bundle)
    assert data.lengths is not None
    assert data.lengths.tolist() == [3, 64]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n"])
def test_bad_delimiters(delimiter: str) -> None:
    with pytest.raises(ValueError, match="the delimiter must be one character"):
        Columns(delimiter=delimiter)


def test_the_first_bad_line_and_the_number_of_others(tmp_path: Path, bundle: Bundle) -> None:
    path = write(tmp_path, "a.tsv", "a\t1\nb\tx\nb\t1\n\t1\nb\n")
    with pytest.raises(DataError, match=r"line 2: unknown label 'x': .* \(and 2 other bad lines\)$"):
        load_dataset(path, bundle)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.npz"])
def test_missing_file_and_folder(tmp_path: Path, bundle: Bundle, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: No such file or directory$"):
        load_dataset(tmp_path / name, bundle)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: Is a directory$"):
        load_dataset(tmp_path / name, bundle)


@pytest.mark.parametrize(
    ("name", "content", "columns", "reason"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": 1}',
            Columns(text="Q"),
            "line 1: no 'Q' among the columns 'text', 'label'",
        ),
        ("a.jsonl", '{"text": "a", "label": 1}', Columns(text_pair="A"), "line 1: no 'A' among"),
        ("a.jsonl", '{"text": "a", "label": 1}', Columns(label="y"), "line 1: no 'y' among"),
        ("a.tsv", "a\t1\n", Columns(text="Q"), "line 1: no 'Q' among the columns 'a', '1'"),
        ("a.tsv", "q\tlabel\na\t1\n", Columns(text="Q"), "line 1: no 'Q' among the columns 'q', 'label'"),
        ("a.tsv", "text\tlabel\na\t1\n", Columns(text_pair="A"), "line 1: no 'A' among"),
        ("a.tsv", "text\tlabel\na\t1\n", Columns(label="y"), "line 1: no 'y' among"),
    ],
)
def test_given_columns_must_be_there(
    tmp_path: Path, bundle: Bundle, name: str, content: str, columns: Columns, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        load_dataset(write(tmp_path, name, content), bundle, columns=columns)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["a", None], "line 2: no 'label' among the columns 'text'"),
        ([None, "positive"], "line 2: a label, where the lines before have none"),
    ],
)
def test_some_labels_are_neither_all_nor_none(
    tmp_path: Path, bundle: Bundle, lines: list[str | None], reason: str
) -> None:
    records = [{"text": "a"} | ({"label": 1} if label else {}) for label in lines]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, records)))
    with pytest.raises(DataError, match=reason):
        load_dataset(path, bundle, require_labels=False)


@pytest.mark.parametrize(("max_length", "text", "fits"), [(2, "a\t1", False), (3, "a\t1", True), (3, "a\tb\t1", False)])
def test_no_room_for_the_text(tmp_path: Path, make_bundle: MakeBundle, max_length: int, text: str, fits: bool) -> None:
    path = write(tmp_path, "a.tsv", text)
    bundle = make_bundle(max_length=max_length)
    if fits:
        assert everything(load_dataset(path, bundle))["input_ids"].shape == (1, 3)
    else:
        with pytest.raises(DataError, match=f"line 1: a maximum length of {max_length} tokens leaves no room"):
            load_dataset(path, bundle)


def test_text_without_a_token(tmp_path: Path, tokenizer_path: Path, make_bundle: MakeBundle) -> None:
    settings = json.loads(tokenizer_path.read_text())
    settings["post_processor"] = None
    write(tmp_path, "tokenizer.json", json.dumps(settings))
    path = write(tmp_path, "a.tsv", "a\t1\n\x01\t1\nb\tx\n")
    with pytest.raises(DataError, match=r"line 2: the tokenizer finds no token in the text \(and 1 other bad line\)"):
        load_dataset(path, make_bundle(path=tmp_path))


# --- token ids and other arrays ---------------------------------------------------------------------------------------


def save(folder: Path, **arrays: Any) -> Path:
    path = folder / "a.npz"
    np.savez(path, **arrays)
    return path


IDS = np.array([[2, 6, 3, 9], [2, 6, 7, 3]])


def test_npz_masks(tmp_path: Path, bundle: Bundle) -> None:
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 1]])
    data = load_dataset(save(tmp_path, input_ids=IDS, attention_mask=mask, labels=[0, 1]), bundle)
    assert data.lengths is not None
    assert data.lengths.tolist() == [3, 4]
    batch = everything(data)
    np.testing.assert_array_equal(batch["input_ids"], IDS)  # the 9 is taken for the padding
    np.testing.assert_array_equal(batch["attention_mask"], mask)
    np.testing.assert_array_equal(batch["token_type_ids"], 0 * IDS)
    assert data.batch(np.array([0]))["input_ids"].tolist() == [[2, 6, 3]]


def test_npz_without_mask_is_all_tokens(tmp_path: Path, bundle: Bundle) -> None:
    batch = everything(load_dataset(save(tmp_path, input_ids=IDS, label=["positive", "negative"]), bundle))
    assert batch["attention_mask"].all()
    assert batch["labels"].tolist() == [1, 0]


def test_npz_left_padded(tmp_path: Path, bundle: Bundle) -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    types = np.array([[0, 0, 0, 1], [0, 0, 1, 1]])
    arrays = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": types}
    batch = everything(load_dataset(save(tmp_path, **arrays), bundle, require_labels=False))
    for name, values in arrays.items():
        np.testing.assert_array_equal(batch[name], values)


def test_npz_token_inputs_that_the_model_lacks_are_dropped(tmp_path: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(inputs={"input_ids": ("int64", ("batch", 6)), "labels": ("int64", ("batch",))})
    path = save(tmp_path, input_ids=IDS, attention_mask=np.ones_like(IDS), token_type_ids=IDS, labels=[0, 1])
    data = load_dataset(path, bundle)
    batch = everything(data)
    assert list(batch) == ["input_ids", "labels"]
    np.testing.assert_array_equal(batch["input_ids"], np.pad(IDS, ((0, 0), (0, 2))))
    assert load_dataset(save(tmp_path, input_ids=IDS, labels=[0, 1]), bundle).fingerprint == data.fingerprint


def vision(make_bundle: MakeBundle) -> Bundle:
    inputs: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "pixels": ("float32", ("batch", 3, "height")),
        "kind": ("int64", ("batch",)),
        "labels": ("int64", ("batch",)),
    }
    return make_bundle(inputs=inputs, tokenizer=None)


def test_npz_of_other_arrays(tmp_path: Path, make_bundle: MakeBundle) -> None:
    pixels = np.asfortranarray(np.random.default_rng(0).random((5, 3, 2), np.float32))
    path = save(tmp_path, pixels=pixels, kind=np.arange(5, dtype=np.int8), labels=[0, 1, 1, 0, 1])
    data = load_dataset(path, vision(make_bundle))
    assert len(data) == 5
    assert data.lengths is None
    batch = data.batch(np.array([4, 0, 4]))
    np.testing.assert_array_equal(batch["pixels"], pixels[[4, 0, 4]], strict=True)
    np.testing.assert_array_equal(batch["kind"], np.array([4, 0, 4]), strict=True)
    assert batch["labels"].tolist() == [1, 0, 1]
    assert all(values.flags.c_contiguous for values in batch.values())
    pixels[2, 1, 1] += 1
    changed = save(tmp_path, pixels=pixels, kind=np.arange(5), labels=[0, 1, 1, 0, 1])
    assert load_dataset(changed, vision(make_bundle)).fingerprint != data.fingerprint


def test_labels_that_are_no_classes_are_an_array_like_others(tmp_path: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(inputs={"input_ids": ("int64", ("b", "s")), "labels": ("float32", ("b",))})
    data = load_dataset(save(tmp_path, input_ids=IDS, labels=np.array([0.5, 2], np.float32)), bundle)
    assert everything(data)["labels"].tolist() == [0.5, 2]
    assert data.label_ids is None
    with pytest.raises(DataError, match="nothing here can fill the model's input 'labels'"):
        load_dataset(write(tmp_path, "a.tsv", "a\t1\n"), bundle)


def token_model(make_bundle: MakeBundle) -> Callable[[], Bundle]:
    return lambda: make_bundle(task="token-classification", labels=None)


RAGGED = np.array([[2, 6, 3, 5, 5], [2, 6, 7, 3, 5]])
KEPT = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_every_array_with_the_axis_of_tokens_is_cut_alike(tmp_path: Path, make_bundle: MakeBundle) -> None:
    rng = np.random.default_rng(0)
    flat = ("batch", "sequence")
    inputs = {
        **dict.fromkeys(("input_ids", "attention_mask", "position_ids"), ("int64", flat)),
        "bias": ("float32", ("batch", 1, "sequence", "sequence")),
        "table": ("float32", ("batch", "sequence", 5)),
        "features": ("float32", ("batch", 5)),
        "labels": ("float32", ("batch", "MatMullogits_dim_1")),
    }
    arrays = {
        "input_ids": RAGGED,
        "attention_mask": KEPT,
        "position_ids": KEPT.cumsum(axis=1) - 1,
        "bias": rng.random((2, 1, 5, 5), np.float32),
        "table": np.asfortranarray(rng.random((2, 5, 5), np.float32)),
        "features": rng.random((2, 5), np.float32),
        "labels": rng.random((2, 5), np.float32),
    }
    bundle = make_bundle(inputs=inputs, labels=None, tokenizer=None)
    data = load_dataset(save(tmp_path, **arrays), bundle)
    cut: dict[str, Any] = {"bias": np.s_[:, :, :3, :3], "table": np.s_[:, :3], "features": np.s_[:]}
    batch = data.batch(np.array([0]))
    for name, values in arrays.items():
        np.testing.assert_array_equal(batch[name], values[:1][cut.get(name, np.s_[:, :3])], err_msg=name)
        assert batch[name].flags.c_contiguous
    assert data.batch(np.array([0, 1]))["bias"].shape == (2, 1, 4, 4)

    short = arrays | {"table": arrays["table"][:, :4]}
    with pytest.raises(
        DataError, match=r"'table' is of shape \[2, 4, 5\], expected 5 along axis 1, 'sequence', as in 'inp"
    ):
        load_dataset(save(tmp_path, **short), bundle)


def test_labels_of_tokens_are_cut_to_the_longest_row(tmp_path: Path, make_bundle: MakeBundle) -> None:
    labels = np.where(KEPT == 1, 1, -100)
    data = load_dataset(
        save(tmp_path, input_ids=RAGGED, attention_mask=KEPT, labels=labels), token_model(make_bundle)()
    )
    assert data.batch(np.array([0]))["labels"].tolist() == [[1, 1, 1]]
    assert data.batch(np.array([0, 1]))["labels"].tolist() == labels[:, :4].tolist()


@pytest.mark.parametrize("size", ["?", "height"])
def test_nothing_is_cut_if_an_axis_may_be_that_of_tokens(tmp_path: Path, make_bundle: MakeBundle, size: str) -> None:
    inputs = {
        **dict.fromkeys(("input_ids", "attention_mask"), ("int64", ("batch", size if size == "?" else "sequence"))),
        "pixels": ("float32", ("batch", 3, size)),
        "labels": ("int64", ("batch",)),
    }
    pixels = np.ones((2, 3, 5), np.float32)
    arrays = {"input_ids": RAGGED, "attention_mask": KEPT, "pixels": pixels, "labels": [0, 1]}
    path = save(tmp_path, **arrays)
    batch = load_dataset(path, make_bundle(inputs=inputs)).batch(np.array([0]))
    assert batch["pixels"].shape == (1, 3, 5)
    assert batch["input_ids"].tolist() == RAGGED[:1].tolist()
    assert batch["attention_mask"].tolist() == KEPT[:1].tolist()
    with pytest.raises(DataError, match=r"arrays of 5 tokens, the model takes at most 4: .* an axis of 'pixels'"):
        load_dataset(path, make_bundle(inputs=inputs, max_length=4))
    path = save(tmp_path, **(arrays | {"pixels": pixels[:, :, :2]}))
    assert load_dataset(path, make_bundle(inputs=inputs)).batch(np.array([0]))["input_ids"].shape == (1, 3)


def test_a_fixed_axis_of_tokens(tmp_path: Path, make_bundle: MakeBundle) -> None:
    inputs = {
        **dict.fromkeys(("input_ids", "attention_mask"), ("int64", ("batch", 4))),
        "bias": ("float32", ("batch", 4)),
        "labels": ("int64", ("batch",)),
    }
    bias = np.arange(10, dtype=np.float32).reshape(2, 5)
    path = save(tmp_path, input_ids=RAGGED, attention_mask=KEPT, bias=bias, labels=[0, 1])
    batch = load_dataset(path, make_bundle(inputs=inputs)).batch(np.array([0]))
    assert batch["bias"].tolist() == bias[:1, :4].tolist()
    assert batch["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("size", [6, "?"])
def test_only_tokens_can_be_padded_to_a_fixed_length(tmp_path: Path, make_bundle: MakeBundle, size: int | str) -> None:
    fixed: dict[str, tuple[str, tuple[int | str, ...]]] = {
        **dict.fromkeys(("input_ids", "attention_mask"), ("int64", ("batch", 6))),
        "labels": ("int64", ("batch",)),
    }
    arrays: dict[str, Any] = {"input_ids": RAGGED, "attention_mask": KEPT, "labels": [0, 1]}
    batch = load_dataset(save(tmp_path, **arrays), make_bundle(inputs=fixed)).batch(np.array([0]))
    assert batch["input_ids"].shape == (1, 6)
    path = save(tmp_path, **arrays, bias=np.ones((2, 5), np.float32))
    with pytest.raises(DataError, match=r"rows of 5 tokens, the model takes exactly 6: pad them, .* 'bias'"):
        load_dataset(path, make_bundle(inputs=fixed | {"bias": ("float32", ("batch", size))}))


def test_a_mask_of_floats_for_a_model_that_takes_floats(tmp_path: Path, make_bundle: MakeBundle) -> None:
    inputs = {
        "input_ids": ("int64", ("batch", "sequence")),
        "attention_mask": ("float32", ("batch", "sequence")),
        "labels": ("int64", ("batch",)),
    }
    mask = KEPT.astype(np.float32)
    data = load_dataset(
        save(tmp_path, input_ids=RAGGED, attention_mask=mask, labels=[0, 1]), make_bundle(inputs=inputs)
    )
    np.testing.assert_array_equal(data.batch(np.array([0]))["attention_mask"], mask[:1, :3], strict=True)
    additive = np.where(KEPT, 0, -1e4).astype(np.float32)
    with pytest.raises(DataError, match="'attention_mask' must be integers"):
        load_dataset(
            save(tmp_path, input_ids=RAGGED, attention_mask=additive, labels=[0, 1]), make_bundle(inputs=inputs)
        )


def test_members_of_an_archive_that_are_no_arrays(tmp_path: Path, bundle: Bundle) -> None:
    stored = io.BytesIO()
    np.save(stored, IDS)
    pickled = io.BytesIO()
    np.save(pickled, np.array([None]), allow_pickle=True)
    for members, reason in [
        ({"input_ids.npy": stored.getvalue(), "readme": b"text"}, "'readme' is no array"),
        ({"input_ids.npy": stored.getvalue(), "input_ids": stored.getvalue()}, "two arrays have the name 'input_ids'"),
        ({"input_ids.npy": stored.getvalue(), "labels.npy": pickled.getvalue()}, "array 'labels': Object arrays"),
    ]:
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        with pytest.raises(DataError, match=rf"a\.npz: .*{reason}"):
            load_dataset(tmp_path / "a.npz", bundle)


@pytest.mark.parametrize("dtype", [">i8", ">i4", "<i2", "u1"])
def test_arrays_of_any_byte_order_and_layout(tmp_path: Path, bundle: Bundle, dtype: str) -> None:
    expected = load_dataset(save(tmp_path, input_ids=IDS, labels=[0, 1]), bundle).fingerprint
    ids = np.asfortranarray(IDS.astype(dtype))
    assert load_dataset(save(tmp_path, input_ids=ids, labels=np.array([0, 1], dtype)), bundle).fingerprint == expected


PIXELS = np.zeros((2, 3, 4), np.float32)
BAD_ARRAYS = [
    ("text", {"input_ids": IDS, "labels": [0, 2]}, "row 1: unknown label '2'"),
    ("text", {"input_ids": IDS, "labels": [0.0, 1.0]}, r"row 0: the label must be .*float \(and 1 other bad row\)"),
    ("text", {"input_ids": IDS, "labels": [0]}, "array 'labels' has 1 rows, 'input_ids' has 2"),
    ("text", {"input_ids": IDS, "labels": 1}, "array 'labels' has 0 rows"),
    ("text", {"input_ids": IDS}, "no 'label' among the columns 'input_ids'"),
    ("text", {"input_ids": IDS, "labels": [0, 1], "atention_mask": IDS}, "'atention_mask' is no input of the model"),
    ("text", {"input_ids": IDS[0], "labels": [0, 1, 1, 0]}, r"'input_ids' is int64 of shape \[4\], the model takes"),
    ("text", {"input_ids": IDS * 1.0, "labels": [0, 1]}, r"'input_ids' must be integers .* found float64"),
    ("text", {"input_ids": IDS[:, :0], "labels": [0, 1]}, r"'input_ids' must be integers .* shape \[2, 0\]"),
    ("text", {"input_ids": IDS, "attention_mask": IDS[:, 1:] > 0, "labels": [0, 1]}, "'attention_mask' must be integ"),
    ("text", {"input_ids": IDS - 3, "labels": [0, 1]}, r"row 0: 'input_ids' must be 0 to 2147483647"),
    ("text", {"input_ids": IDS, "attention_mask": IDS, "labels": [0, 1]}, "row 0: 'attention_mask' must be 0 to 1"),
    ("text", {"input_ids": IDS, "attention_mask": IDS > 7, "labels": [0, 1]}, "row 1: 'attention_mask' keeps no token"),
    ("text", {"input_ids": np.ones((2, 65), int), "labels": [0, 1]}, "row 0: 65 tokens, the model takes at most 64"),
    ("text", {"input_ids": IDS[:0], "labels": []}, "no examples"),
    ("text", {"attention_mask": IDS, "labels": [0, 1]}, "nothing here can fill the model's input 'input_ids'"),
    ("text", {}, "no examples"),
    ("vision", {"pixels": PIXELS, "labels": [0, 1]}, r"nothing here can fill the model's input 'kind' of shape \['bat"),
    ("vision", {"pixels": PIXELS.astype(float), "kind": [0, 1], "labels": [0, 1]}, "'pixels' is float64 of shape"),
    ("vision", {"pixels": PIXELS[:, :2], "kind": [0, 1], "labels": [0, 1]}, r"shape \[2, 2, 4\], the model takes"),
    ("vision", {"pixels": PIXELS[0, :2], "kind": [0, 1], "labels": [0, 1]}, r"shape \[2, 4\], the model takes"),
    ("vision", {"pixels": PIXELS, "kind": [0.0, 1.0], "labels": [0, 1]}, "'kind' is float64"),
    ("vision", {"pixels": PIXELS, "kind": np.array([0, 1], np.uint64), "labels": [0, 1]}, "'kind' is uint64"),
    ("text", {"input_ids": IDS, "labels": [0, 1], "Label": [0, 1]}, "arrays 'Label' and 'labels' both hold labels"),
    (
        "text",
        {"input_ids": IDS, "LABELS": [0, 1], "Labels": [0, 1]},
        "the columns 'LABELS' and 'Labels' differ only in",
    ),
    (
        "text",
        {"input_ids": IDS, "labels": np.zeros(2, np.dtype("i4,i4"))},
        "array 'labels' has fields of several types",
    ),
    ("vision", {"pixels": PIXELS.astype(float), "kind": [0, 1], "labels": [0, 1]}, "pixels' is float64"),
    ("vision", {"pixels": PIXELS * np.float32("nan"), "kind": [0, 1], "labels": [0, 1]}, "row 0: 'pixels' has a NaN"),
    ("tokens", {"input_ids": IDS, "labels": [[0, 1, 1, -1], [0] * 4]}, "row 0: unknown label -1 at position 3"),
    (
        "tokens",
        {"input_ids": IDS, "labels": [[0] * 4, [0, 2, 9, 1]]},
        "row 1: unknown label 2 at position 1: expected 0 to",
    ),
    (
        "tokens",
        {"input_ids": IDS, "labels": [[0, 1], [1, 0]]},
        r"'labels' must be integers .*\[2, 2\], and 'input_ids' of",
    ),
    ("tokens", {"input_ids": IDS, "labels": [[0.0] * 4] * 2}, "array 'labels' must be integers .* found float64"),
    (
        "text",
        {"input_ids": np.array([[None]]), "labels": [0]},
        "not an .npz of plain arrays: array 'input_ids': Object arrays",
    ),
]


@pytest.mark.parametrize(("model", "arrays", "message"), BAD_ARRAYS)
def test_bad_arrays(tmp_path: Path, make_bundle: MakeBundle, model: str, arrays: dict[str, Any], message: str) -> None:
    path = save(tmp_path, **arrays)
    kinds: dict[str, Callable[[], Bundle]] = {
        "text": make_bundle,
        "tokens": token_model(make_bundle),
        "vision": lambda: vision(make_bundle),
    }
    bundle = kinds[model]()
    with pytest.raises(DataError, match=rf"^{path}(, |: ).*{message}"):
        load_dataset(path, bundle)


def test_npz_that_is_none(tmp_path: Path, bundle: Bundle) -> None:
    path = save(tmp_path, input_ids=IDS, labels=[0, 1])
    whole = path.read_bytes()
    single = io.BytesIO()
    np.save(single, IDS)
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    damaged = bytearray(whole)
    damaged[whole.index(IDS.tobytes())] ^= 1
    for content, reason in [
        (b"", "not an .npz"),
        (b"text", "not an .npz"),
        (whole[: len(whole) // 2], "not an .npz"),
        (bytes(damaged), "not an .npz"),
        (bytes(encrypted), "not an .npz"),
        (single.getvalue(), "a single array"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"^{path}: {reason}"):
            load_dataset(path, bundle)


# --- the bundle's part ------------------------------------------------------------------------------------------------


def test_text_needs_a_tokenizer(tmp_path: Path, make_bundle: MakeBundle) -> None:
    path = write(tmp_path, "a.tsv", "a\t1\n")
    with pytest.raises(DataError, match="the bundle has no tokenizer for text"):
        load_dataset(path, make_bundle(tokenizer=None))
    write(tmp_path, "tokenizer.json", "{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: the tokenizers library cannot read it"):
        load_dataset(path, make_bundle(path=tmp_path))


def test_text_cannot_fill_every_input(make_bundle: MakeBundle) -> None:
    for name, shape in [("pixels", ("batch", "s")), ("attention_mask", ("batch", 1, "s", "s"))]:
        bundle = make_bundle(inputs={"input_ids": ("int64", ("batch", "s")), name: ("int64", shape)})
        with pytest.raises(DataError, match=rf"texts: nothing here can fill the model's input '{name}' of shape"):
            encode_texts(["a"], bundle)


def test_missing_library(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pocketzo\[text\]'"):
        encode_texts(["a"], bundle)
    path = save(tmp_path, input_ids=IDS, labels=[0, 1])
    assert len(load_dataset(path, bundle)) == 2


def test_tokenizers_is_imported_late_and_leaves_no_threads(tokenizer_path: Path) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads in /proc")
    code = f"""
import os, pathlib, sys, types
from pocketzo.runtime.tokenizer import load_tokenizer
assert "tokenizers" not in sys.modules
before = os.listdir("/proc/self/task")
tokenizer = load_tokenizer(types.SimpleNamespace(tokenizer_path=pathlib.Path({str(tokenizer_path)!r})))
assert len(tokenizer.encode_batch(["a good film"] * 256)) == 256
assert os.listdir("/proc/self/task") == before
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("name", ["bert-old", "bert-new", "gpt2-old", "gpt2-new", "opt-old", "mlm-new", "fresh-old"])
def test_the_rows_of_the_embedding_are_found(bundles: Callable[[str], Bundle], name: str) -> None:
    rows = {"input_ids": 64} if name[:3] in ("gpt", "opt") else {"input_ids": 64, "token_type_ids": 2}
    assert embedding_rows(bundles(name)) == rows  # of the configurations in models/generate.py


def embedding_model(folder: Path, rows: int) -> Bundle:
    """Prepare a model with an embedding of so many rows for the tokenizer of these tests."""
    table = numpy_helper.from_array(np.random.default_rng(0).random((rows, 3)).astype(np.float32), "table")
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "ids"], ["embedded"], axis=0),
        helper.make_node("ReduceMean", ["embedded"], ["logits"], axes=[1], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    write_tokenizer(folder / "tokenizer.json")
    return pz.prepare(folder / "m.onnx", folder / "bundle", tokenizer=folder / "tokenizer.json")


def test_ids_beyond_the_embedding_are_refused_before_a_run(tmp_path: Path) -> None:
    bundle = embedding_model(tmp_path, 10)
    good = np.array([[2, 6, 9], [2, 6, 3]])
    assert len(load_dataset(save(tmp_path, input_ids=good, labels=[0, 1]), bundle)) == 2
    with pytest.raises(DataError, match=r"row 0: 'input_ids' must be 0 to 9, found 10 at position 2: .* has 10 rows"):
        load_dataset(save(tmp_path, input_ids=good + [[0, 0, 1]], labels=[0, 1]), bundle)  # noqa: RUF005
    path = write(tmp_path, "a.tsv", "a\t1\nfilm\t0\n")
    with pytest.raises(DataError, match="line 2: the tokenizer gives token id 10, the model's embedding has 10 rows"):
        load_dataset(path, bundle)


@pytest.mark.parametrize("which", ["id", "type"])
def test_ids_and_types_beyond_31_bits_are_refused(tmp_path: Path, which: str) -> None:
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path)
    settings = json.loads(path.read_text())
    large = 2**31 + 5
    if which == "id":
        settings["model"]["vocab"]["film"] = large
    else:
        settings["post_processor"]["single"][1]["Sequence"]["type_id"] = large
    path.write_text(json.dumps(settings))
    bundle = pz.prepare(Path(__file__).parent / "models" / "bert-new.onnx", tmp_path / "bundle", tokenizer=path)
    with pytest.raises(DataError, match=f"line 1: the tokenizer gives token {which} {large}, the model's embedding"):
        load_dataset(write(tmp_path, "a.tsv", "film\t1\na\t0\n"), bundle)


def test_a_padding_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    bundle = embedding_model(tmp_path, PAD)
    with pytest.raises(DataError, match=rf"the id of the padding token is {PAD}, the model's embedding has {PAD} rows"):
        encode_texts(["a"], bundle)
