"""Labelled examples: read from a file, checked to the last line, kept as token ids, handed out in padded batches.

========  ==========================================================================================================
suffix    content
========  ==========================================================================================================
.jsonl    one object a line: ``{"text": ..., "text_pair": ..., "label": ...}``, ``text_pair`` where there is one
.tsv      fields between tabs, taken verbatim: a quote is a character like any other, nothing is escaped
.csv      fields between commas, in double quotes where needed, line breaks within quotes included
.npz      arrays named as the model's inputs, one row an example: ``input_ids`` [n, length], ``attention_mask`` and
          ``token_type_ids`` of the same shape if need be, or whatever else the model takes; ``labels`` [n]
========  ==========================================================================================================

Text is UTF-8; a byte order mark, CRLF and empty lines at the end are accepted.

Columns are found by name, upper or lower case: the text in ``text``, ``sentence`` or ``sentence1``, its pair in
``text_pair`` or ``sentence2``, the label in ``label`` or ``labels``; others are ignored. The first row of a TSV or CSV
file is a header if one cell names the text and either there is no other or another names the pair or the label, and
always if the caller names a column. Without a header the columns are: text; or text, label; or text, text_pair, label.

A label is a class name of the bundle or a class number, from 0; where names look like numbers, a name only.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import zipfile
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from pocketzo.errors import BundleError, DataError, MissingExtraError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from pocketzo.bundle import Bundle, ValueSpec

__all__ = ["Dataset", "encode_texts", "load_dataset"]

TEXT_NAMES = ("text", "sentence", "sentence1")
PAIR_NAMES = ("text_pair", "sentence2")
LABEL_NAMES = ("label", "labels")
HEADERLESS = {1: ("text",), 2: ("text", "label"), 3: ("text", "text_pair", "label")}
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
IMPLIED = {"attention_mask": 1, "token_type_ids": 0}  # of each token, where the data does not say
CHUNK = 256  # texts tokenised at once: bounds the memory held beside the ids

Record: TypeAlias = "dict[str, Any] | str | None"  # a line's values by column; or what is wrong with it; None if empty
Row: TypeAlias = "list[str] | str"  # a line's fields, none if it is empty; or what is wrong with it


class Dataset:
    """Examples for one model, in the order of their file; made by :func:`load_dataset` and :func:`encode_texts`.

    Attributes
    ----------
    label_ids : ndarray of int64, shape [n], or None
        The class number of each example; None without labels.
    lengths : ndarray of int32, shape [n], or None
        The number of tokens of each example; None for a model that takes no tokens.
    labels : tuple of str or None
        The names of the classes, where the bundle has them.
    """

    def __init__(
        self,
        bundle: Bundle,
        source: str,
        size: int,
        tokens: _Tokens | None,
        arrays: Mapping[str, NDArray[Any]],
        labels: Sequence[int],
    ) -> None:
        self.labels = bundle.labels
        self.label_ids = np.array(labels, np.int64) if labels else None
        self.lengths = None if tokens is None else tokens.lengths
        self._size = size
        self._tokens = tokens
        self._token_length = _token_length(bundle)
        self._arrays = arrays
        self._inputs: list[ValueSpec] = []
        for spec in bundle.inputs:
            from_tokens = tokens is not None and spec.name in TOKEN_INPUTS and len(spec.shape) == 2
            if not (from_tokens or spec.name in arrays or _is_class(spec)):
                raise DataError(
                    f"{source}: nothing here can fill the model's input {spec.name!r} of shape {list(spec.shape)}"
                )
            if not _is_class(spec) or labels:
                self._inputs.append(spec)

    def __len__(self) -> int:
        return self._size

    def batch(self, indices: NDArray[np.integer[Any]]) -> dict[str, NDArray[Any]]:
        """Return the model's inputs for some of the examples.

        Parameters
        ----------
        indices
            The numbers of the examples, shape [batch], from 0; repetition is allowed.

        Returns
        -------
        dict of str to ndarray
            C-contiguous arrays of the inputs' dtypes, [batch, ...]: those of the model's inputs that the data fills,
            which are all but perhaps ``labels``. Tokens are padded to the longest example of the batch, or to the
            fixed length that the model has.

        Raises
        ------
        ValueError
            `indices` is not a non-empty vector of integers, or one is out of range.
        DataError
            The model takes batches of another size only.
        """
        indices = np.asarray(indices)
        if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
            raise ValueError(
                f"indices must be a non-empty vector of integers, got {indices.dtype} of shape {list(indices.shape)}"
            )
        if indices.min() < 0 or indices.max() >= self._size:
            raise ValueError(f"indices must be 0 to {self._size - 1}, got {indices.min()} to {indices.max()}")
        padded = {} if self._tokens is None else self._tokens.padded(indices, self._token_length)
        batch: dict[str, NDArray[Any]] = {}
        for spec in self._inputs:
            if isinstance(spec.shape[0], int) and spec.shape[0] != indices.size:
                raise DataError(
                    f"the model's input {spec.name!r} takes batches of exactly {spec.shape[0]}, got {indices.size}"
                )
            if spec.name in self._arrays:
                batch[spec.name] = self._arrays[spec.name][indices]
            elif spec.name in padded:
                batch[spec.name] = padded[spec.name].astype(spec.dtype)
            elif self.label_ids is not None:
                batch[spec.name] = self.label_ids[indices].astype(spec.dtype)
        return batch

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what training sees: tokens, padding, other inputs and labels, whatever file they came from."""
        digest = hashlib.sha256()
        content = [*self._arrays.items()]
        if self._tokens is not None:
            content += [*self._tokens.columns.items(), ("lengths", self._tokens.lengths)]
            digest.update(json.dumps([self._tokens.padding, self._tokens.pad_left]).encode())
        if self.label_ids is not None:
            content.append(("labels", self.label_ids))
        for name, values in sorted(content, key=lambda item: item[0]):
            digest.update(json.dumps([name, values.dtype.name, values.shape]).encode())
            digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class _Tokens:
    """The tokens of all examples, end to end."""

    lengths: NDArray[np.int32]  # [n]
    columns: dict[str, NDArray[np.int32]]  # [sum of lengths] for each input that is not implied
    padding: dict[str, int]  # what fills each input of the model beyond the tokens
    pad_left: bool = False

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def padded(self, indices: NDArray[Any], length: int | None) -> dict[str, NDArray[np.int64]]:
        """Return each input as [batch, length], or [batch, longest] if there is no fixed length."""
        lengths = self.lengths[indices][:, None]
        width = length or int(lengths.max())
        position = np.arange(width) - (width - lengths) * self.pad_left  # within the example; [batch, width]
        inside = (position >= 0) & (position < lengths)
        source = (self.starts[indices][:, None] + position)[inside]
        padded = {}
        for name, fill in self.padding.items():
            padded[name] = np.full(inside.shape, fill, np.int64)
            if name in self.columns:
                padded[name][inside] = self.columns[name][source]
            else:
                padded[name][inside] = position[inside] if name == "position_ids" else IMPLIED[name]
        return padded


def load_dataset(
    path: str | os.PathLike[str],
    bundle: Bundle,
    *,
    require_labels: bool = True,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
) -> Dataset:
    """Read a file of examples for a model; the whole file is checked before anything is returned.

    Text of more tokens than the bundle's maximum length, or than a fixed length of its inputs, is truncated; rows of
    token ids that are longer are refused.

    Parameters
    ----------
    path
        A ``.jsonl``, ``.tsv``, ``.csv`` or ``.npz`` file, as described in :mod:`pocketzo.data`.
    bundle
        The model that the examples are for.
    require_labels
        Whether each example must have a label. If not, either all have one or none has.
    text_column, text_pair_column, label_column
        The exact names of columns that are called otherwise; a TSV or CSV file must then have a header. In an
        ``.npz``, only the labels' array can be named.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        The file is missing, empty or of an unknown kind; or a line of it cannot be used: the first such line is named,
        with the reason and the number of others; or it lacks what an input of the model needs.
    BundleError
        The bundle's tokenizer cannot be read.
    MissingExtraError
        The file holds text, and the package `tokenizers` is not installed.
    """
    path = Path(path)
    columns = _Columns(text_column, text_pair_column, label_column)
    try:
        match path.suffix.lower():
            case ".npz":
                return _read_npz(path, bundle, columns, require_labels)
            case ".jsonl":
                records = _read_jsonl(path)
            case ".tsv":
                records = _with_columns(_read_tsv(path), columns)
            case ".csv":
                records = _with_columns(_read_csv(path), columns)
            case suffix:
                raise DataError(f"{path}: unknown kind of file {suffix!r}: expected .jsonl, .tsv, .csv or .npz")
        problems = _Problems(str(path), "line")
        return _tokenise(_examples(records, bundle, columns, require_labels, problems), bundle, problems)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def encode_texts(texts: Iterable[str], bundle: Bundle) -> Dataset:
    """Tokenise sentences without labels.

    Parameters
    ----------
    texts
        The sentences.
    bundle
        The model that they are for.

    Returns
    -------
    Dataset

    Raises
    ------
    TypeError
        `texts` is itself a string.
    DataError
        There is no text, or one is empty or no string, or the model has inputs that text cannot fill.
    BundleError, MissingExtraError
        As for :func:`load_dataset`.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several strings, got one: put it in a list")
    problems = _Problems("texts", "number")
    records = enumerate(({"text": text} for text in texts), 1)
    return _tokenise(_examples(records, bundle, _Columns(), False, problems), bundle, problems)


class _LineError(Exception):
    """What is wrong with a line."""


class _Problems:
    """The first bad line, and how many there are."""

    def __init__(self, source: str, unit: str) -> None:
        self.source = source
        self.unit = unit
        self.reasons: dict[int, str] = {}

    def add(self, number: int, reason: str) -> None:
        self.reasons.setdefault(number, reason)

    def check(self) -> None:
        if self.reasons:
            first = min(self.reasons)
            others = len(self.reasons) - 1
            more = f" (and {others} other bad {self.unit}{'s' * (others > 1)})" if others else ""
            raise DataError(f"{self.source}, {self.unit} {first}: {self.reasons[first]}{more}")


class _Columns(NamedTuple):
    """Names of columns that the caller gave."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


class _Example(NamedTuple):
    number: int
    text: str
    pair: str | None
    label: int | None


class _Classes:
    """The labels that a bundle knows."""

    def __init__(self, bundle: Bundle) -> None:
        names = bundle.labels or ()
        logits = next((spec.shape for spec in bundle.outputs if spec.name == bundle.logits), ())
        count = len(names) or (logits[-1] if logits else None)
        self.ids = {name: index for index, name in enumerate(names)}
        self.open = not isinstance(count, int)
        expected = [repr(name) for name in names[:10]] + ["..."] * (len(names) > 10)
        if not isinstance(count, int):
            expected = ["an integer from 0"]
        elif not any(re.fullmatch("-?[0-9]+", name) for name in names):
            self.ids |= {str(index): index for index in range(count)}
            expected.append(f"0 to {count - 1}")
        self.expected = ", ".join(expected)

    def id(self, label: object) -> int:
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise _LineError(f"the label must be a name or an integer, found {type(label).__name__}")
        text = str(label)
        if self.open and re.fullmatch("[0-9]{1,9}", text):
            return int(text)
        if text not in self.ids:
            raise _LineError(f"unknown label {text[:80]!r}: expected {self.expected}")
        return self.ids[text]


def _find(columns: Collection[str], given: str | None, known: tuple[str, ...]) -> str | None:
    """Return the name of a column: the one given, else the first one known."""
    if given is not None:
        return given if given in columns else None
    folded = {column.strip().lower(): column for column in columns}
    return next((folded[name] for name in known if name in folded), None)


def _missing(columns: Collection[str], given: str | None, known: tuple[str, ...]) -> str:
    return f"no {given or known[0]!r} among the columns {', '.join(map(repr, columns)) or '(none)'}"


def _examples(
    records: Iterable[tuple[int, Record]],
    bundle: Bundle,
    columns: _Columns,
    require_labels: bool,
    problems: _Problems,
) -> Iterator[_Example]:
    classes = _Classes(bundle)
    labelled = True if require_labels else None
    empty: list[int] = []
    for number, record in records:
        if record is None:
            empty.append(number)
            continue
        for line in empty:
            problems.add(line, "empty line")
        empty.clear()
        try:
            if isinstance(record, str):
                raise _LineError(record)
            text, pair = _text(record, columns.text, TEXT_NAMES), _text(record, columns.pair, PAIR_NAMES)
            if text is None:
                raise _LineError(_missing(record, columns.text, TEXT_NAMES))
            if pair is None and columns.pair is not None:
                raise _LineError(_missing(record, columns.pair, PAIR_NAMES))
            name = _find(record, columns.label, LABEL_NAMES)
            label = None if name is None or record[name] is None else classes.id(record[name])
            if labelled is None:
                labelled = label is not None
            if labelled and label is None:
                raise _LineError(_missing(record, columns.label, LABEL_NAMES))
            if not labelled and label is not None:
                raise _LineError("a label, where the lines before have none")
        except _LineError as error:
            problems.add(number, str(error))
        else:
            yield _Example(number, text, pair, label)


def _text(record: dict[str, Any], given: str | None, known: tuple[str, ...]) -> str | None:
    name = _find(record, given, known)
    if name is None or record[name] is None:
        return None
    text = record[name]
    if not isinstance(text, str):
        raise _LineError(f"{name!r} must be a string, found {type(text).__name__}")
    if not text.strip():
        raise _LineError(f"{name!r} is empty")
    if reason := _not_unicode(text):
        raise _LineError(reason)
    return text


def _not_unicode(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # A byte that is not UTF-8 was read as U+DC00 + byte ("surrogateescape"); JSON can escape any surrogate.
        return f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"not a character: U+{code:X}"
    return None


def _read_lines(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yield number, line, and what is wrong with its encoding."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removesuffix("\n").removesuffix("\r"), _not_unicode(line)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line, reason in _read_lines(path):
        if reason or not line.strip():
            yield number, reason
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested as deep
            yield number, f"not JSON that can be read: {error}"
        else:
            yield number, record if isinstance(record, dict) else f"not a JSON object: {type(record).__name__}"


def _read_tsv(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line, reason in _read_lines(path):
        yield number, reason or (line.split("\t") if line else [])


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        while True:
            number = rows.line_num + 1  # where the row begins
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, f"not CSV: {error}"
            else:
                yield number, _not_unicode("".join(row)) or row


def _with_columns(rows: Iterator[tuple[int, Row]], columns: _Columns) -> Iterator[tuple[int, Record]]:
    header: tuple[str, ...] | None = None
    for number, row in rows:
        if isinstance(row, str):
            yield number, row
            continue
        if not row:
            yield number, None
            continue
        if header is None:
            if any(columns) or _is_header(row):
                header = tuple(row)
                if reason := _bad_header(header, columns):
                    yield number, reason
                    return
                continue
            if len(row) not in HEADERLESS:
                yield number, f"{len(row)} columns and no header that names text and label"
                return
            header = HEADERLESS[len(row)]
        if len(row) == len(header):
            yield number, dict(zip(header, row, strict=True))
        else:
            yield number, f"found {len(row)} of {len(header)} fields ({', '.join(header)})"


def _is_header(row: list[str]) -> bool:
    named = [_find(row, None, names) is not None for names in (TEXT_NAMES, PAIR_NAMES, LABEL_NAMES)]
    return named[0] and (len(row) == 1 or any(named[1:]))


def _bad_header(header: tuple[str, ...], columns: _Columns) -> str | None:
    if repeated := {column for column in header if header.count(column) > 1}:
        return f"the header names {', '.join(map(repr, sorted(repeated)))} more than once"
    known = (TEXT_NAMES, PAIR_NAMES, LABEL_NAMES)
    for given, names, needed in zip(columns, known, (True, False, False), strict=True):
        if (needed or given) and _find(header, given, names) is None:
            return _missing(header, given, names)
    return None


def _token_length(bundle: Bundle) -> int | None:
    """Return the fixed number of tokens that a model takes, if it has one."""
    shapes = [spec.shape for spec in bundle.inputs if spec.name in TOKEN_INPUTS and len(spec.shape) == 2]
    return next((shape[1] for shape in shapes if isinstance(shape[1], int)), None)


def _longest(bundle: Bundle) -> int | None:
    """Return the number of tokens that an example may have at most, if there is a bound."""
    return min((length for length in (bundle.max_length, _token_length(bundle)) if length is not None), default=None)


def _is_class(spec: ValueSpec) -> bool:
    return spec.name == "labels" and len(spec.shape) == 1 and np.dtype(spec.dtype).kind in "iu"


def _load_tokenizer(bundle: Bundle) -> Tokenizer:
    if bundle.tokenizer_path is None:
        raise DataError(
            f"{bundle.path}: the bundle has no tokenizer for text: prepare it with one, or give token ids as .npz"
        )
    # Its threads would outlive the tokenising, hold memory and warn at every fork after it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", "text") from error
    try:
        tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    except Exception as error:  # the library raises no narrower one
        raise BundleError(f"{bundle.tokenizer_path}: the tokenizers library cannot read it: {error}") from error
    return tokenizer


def _tokenise(examples: Iterator[_Example], bundle: Bundle, problems: _Problems) -> Dataset:
    tokenizer = _load_tokenizer(bundle)
    padding = tokenizer.padding or {}
    pads = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>", "<PAD>", "<|pad|>"))
    pad_id = padding.get("pad_id", next((pad for pad in pads if pad is not None), 0))
    fills = {"input_ids": pad_id, "token_type_ids": padding.get("pad_type_id", 0)}
    tokenizer.no_padding()
    longest = _longest(bundle)
    if longest is not None:  # else the tokenizer's own truncation, if any, holds
        tokenizer.enable_truncation(longest, direction=(tokenizer.truncation or {}).get("direction", "right"))
    special = [tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]

    ids, types, lengths, labels = array("i"), array("i"), array("i"), array("q")
    while chunk := list(islice(examples, CHUNK)):
        encodings = tokenizer.encode_batch([e.text if e.pair is None else (e.text, e.pair) for e in chunk])
        for example, encoding in zip(chunk, encodings, strict=True):
            if longest is not None and longest <= special[example.pair is not None]:
                problems.add(example.number, f"a maximum length of {longest} tokens leaves no room for the text")
            if not encoding.ids:
                problems.add(example.number, "the tokenizer finds no token in the text")
            ids.extend(encoding.ids)
            types.extend(encoding.type_ids)
            lengths.append(len(encoding.ids))
            if example.label is not None:
                labels.append(example.label)
    problems.check()
    if not lengths:
        raise DataError(f"{problems.source}: no examples")
    columns = {"input_ids": np.asarray(ids), "token_type_ids": np.asarray(types)}
    tokens = _tokens(bundle, np.asarray(lengths), columns, fills, pad_left=padding.get("direction") == "left")
    return Dataset(bundle, problems.source, len(lengths), tokens, {}, labels)


def _tokens(
    bundle: Bundle,
    lengths: NDArray[np.int32],
    columns: Mapping[str, NDArray[np.int32]],
    fills: Mapping[str, int],
    *,
    pad_left: bool = False,
) -> _Tokens:
    """Keep what the model takes and nothing that is implied: the same tokens are then the same from any file."""
    names = [spec.name for spec in bundle.inputs if spec.name in TOKEN_INPUTS]
    kept = {
        name: values
        for name, values in columns.items()
        if name in names and not (name in IMPLIED and (values == IMPLIED[name]).all())
    }
    return _Tokens(lengths, kept, {name: fills.get(name, 0) for name in names}, pad_left)


def _read_npz(path: Path, bundle: Bundle, columns: _Columns, require_labels: bool) -> Dataset:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not an .npz of plain arrays: {error}") from error
    except TypeError as error:  # numpy.load gives the array itself, which is no context manager
        raise DataError(f"{path}: a single array (.npy), expected an .npz of named arrays") from error
    specs = {spec.name: spec for spec in bundle.inputs}
    has_classes = all(_is_class(spec) for spec in bundle.inputs if spec.name == "labels")
    label_name = _find(arrays, columns.label, LABEL_NAMES) if has_classes else None
    has_tokens = "input_ids" in arrays and arrays["input_ids"].ndim == 2
    rows = {name: len(values) if np.ndim(values) else 0 for name, values in arrays.items()}
    size = next(iter(rows.values()), 0)
    if not size:
        raise DataError(f"{path}: no examples")
    for name, count in rows.items():
        if count != size:
            raise DataError(f"{path}: array {name!r} has {count} rows, {next(iter(rows))!r} has {size}")
        if name not in specs and name != label_name and not (has_tokens and name in TOKEN_INPUTS):
            raise DataError(f"{path}: array {name!r} is no input of the model, which takes {', '.join(specs)}")

    problems = _Problems(str(path), "row")
    labels: list[int] = []
    if label_name is not None:
        classes = _Classes(bundle)
        for row, label in enumerate(arrays.pop(label_name).tolist()):
            try:
                labels.append(classes.id(label))
            except _LineError as error:
                problems.add(row, str(error))
    elif require_labels and has_classes:
        raise DataError(f"{path}: {_missing(arrays, columns.label, LABEL_NAMES)}")
    tokens = _npz_tokens(arrays, bundle, problems) if has_tokens else None
    problems.check()
    arrays = {name: _checked(path, specs[name], values) for name, values in arrays.items()}
    return Dataset(bundle, str(path), size, tokens, arrays, labels)


def _npz_tokens(arrays: dict[str, NDArray[Any]], bundle: Bundle, problems: _Problems) -> _Tokens:
    """Take the token inputs out of `arrays`, cut after the last token of each row that the mask keeps."""
    given = {name: arrays.pop(name) for name in TOKEN_INPUTS if name in arrays}
    shape = given["input_ids"].shape
    for name, values in given.items():
        if values.shape != shape or values.dtype.kind not in "iub" or not values.size:
            raise DataError(
                f"{problems.source}: array {name!r} must be integers [n, length], the same for all of a model's token "
                f"inputs, found {values.dtype} of shape {list(values.shape)}"
            )
        top = 1 if name == "attention_mask" else 2**31 - 1
        for row in np.flatnonzero(((values < 0) | (values > top)).any(axis=1)):
            problems.add(int(row), f"{name!r} must be 0 to {top}")
    mask = given.get("attention_mask", np.ones(shape)) != 0
    lengths = (shape[1] - np.argmax(mask[:, ::-1], axis=1)).astype(np.int32)
    for row in np.flatnonzero(~mask.any(axis=1)):
        problems.add(int(row), "'attention_mask' keeps no token")
    longest = _longest(bundle)
    if longest is not None:
        for row in np.flatnonzero(lengths > longest):
            problems.add(int(row), f"{lengths[row]} tokens, the model takes at most {longest}")
    inside = np.arange(shape[1]) < lengths[:, None]
    columns = {name: values[inside].astype(np.int32) for name, values in given.items()}
    fills = {name: int(values[~inside][0]) for name, values in given.items() if not inside.all()}
    return _tokens(bundle, lengths, columns, fills)


def _checked(path: Path, spec: ValueSpec, values: NDArray[Any]) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    same = len(spec.shape) == values.ndim and all(
        want == got for want, got in zip(spec.shape[1:], values.shape[1:], strict=True) if isinstance(want, int)
    )
    widened = dtype.kind in "iu" and values.dtype.kind in "iu" and np.can_cast(values.dtype, dtype)
    if not same or not (widened or values.dtype == dtype):
        raise DataError(
            f"{path}: array {spec.name!r} is {values.dtype} of shape {list(values.shape)}, "
            f"the model takes {spec.dtype} of shape {list(spec.shape)}"
        )
    return np.ascontiguousarray(values, dtype)
