"""The data set of the built-in example is what its README says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

DEMO = Path(__file__).parents[1] / "python" / "pocketzo" / "demo"
LABELS = ("appointment", "health", "money", "reminder", "repair", "shopping", "social", "travel")

Example = tuple[str, str]
Words = tuple[str, ...]


def read(part: str) -> list[Example]:
    lines = (DEMO / f"messages_{part}.tsv").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    examples = []
    for line in lines:
        text, label = line.split("\t")
        examples.append((text, label))
    return examples


def words(text: str) -> Words:
    return tuple(re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower()))


def ngrams(message: Words, n: int) -> set[Words]:
    return {message[i : i + n] for i in range(len(message) - n + 1)}


@pytest.fixture(scope="module")
def train() -> list[Example]:
    return read("train")


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    return read("test")


@pytest.mark.parametrize("part", ["train", "test"])
def test_file_is_well_formed(part: str) -> None:
    raw = (DEMO / f"messages_{part}.tsv").read_bytes()
    text = raw.decode("utf-8")
    assert not text.startswith("\ufeff")
    assert "\r" not in text
    assert '"' not in text  # a reader that unquotes and one that does not must see the same
    assert text.endswith("\n")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        fields = line.split("\t")
        assert len(fields) == 2, f"line {number}: {line!r}"
        message, label = fields
        assert message == " ".join(message.split()), f"line {number}: stray white space in {message!r}"
        assert message.isprintable(), f"line {number}: {message!r}"
        assert 2 <= len(message.split()) <= 40, f"line {number}: {message!r}"
        assert label in LABELS, f"line {number}: {label!r}"


@pytest.mark.parametrize(("part", "total", "each"), [("train", 640, 80), ("test", 240, 30)])
def test_counts_and_balance(part: str, total: int, each: int) -> None:
    counts = Counter(label for _, label in read(part))
    assert set(counts) == set(LABELS)
    assert counts.total() >= total
    assert min(counts.values()) >= each
    assert min(counts.values()) >= 0.8 * max(counts.values())


def test_large_enough_for_the_example(train: list[Example], held_out: list[Example]) -> None:
    assert len({label for _, label in train}) >= 6
    assert len(train) >= 600
    assert len(train) + len(held_out) >= 600


def test_readme_states_the_counts_and_labels(train: list[Example], held_out: list[Example]) -> None:
    readme = (DEMO / "README.md").read_text(encoding="utf-8")
    assert f"has {len(train)} (" in readme
    assert f"held-out part, {len(held_out)} (" in readme
    assert tuple(re.findall(r"^\| `(\w+)` \|", readme, flags=re.MULTILINE)) == LABELS


def test_no_duplicates(train: list[Example], held_out: list[Example]) -> None:
    seen = Counter(words(text) for text, _ in train + held_out)
    assert [message for message, times in seen.items() if times > 1] == []


def test_no_frame_recurs(train: list[Example], held_out: list[Example]) -> None:
    messages = [words(text) for text, _ in train + held_out]
    openings = Counter(message[:3] for message in messages if len(message) > 3)
    assert [opening for opening, times in openings.items() if times > 2] == []
    runs = Counter(run for message in messages for run in ngrams(message, 5))
    assert [run for run, times in runs.items() if times > 2] == []


def test_held_out_shares_no_template_with_training(train: list[Example], held_out: list[Example]) -> None:
    known = {run for text, _ in train for run in ngrams(words(text), 4)}
    openings = {words(text)[:3] for text, _ in train}
    for text, _ in held_out:
        message = words(text)
        assert ngrams(message, 4).isdisjoint(known), text
        assert message[:3] not in openings, text


def test_held_out_repeats_no_set_of_words(train: list[Example], held_out: list[Example]) -> None:
    known = [(set(words(text)), text) for text, _ in train]
    for text, _ in held_out:
        message = set(words(text))
        for other, other_text in known:
            assert len(message & other) < 0.6 * len(message | other), (text, other_text)


def test_no_telephone_numbers_or_links(train: list[Example], held_out: list[Example]) -> None:
    for text, _ in train + held_out:
        assert not re.search(r"\d{5,}|\d[\d -]{6,}\d|https?:|www\.|\w@\w", text), text


def test_counting_words_does_not_solve_it(train: list[Example], held_out: list[Example]) -> None:
    """TF-IDF and the nearest class centroid: above chance (1 in 8), far from done."""
    vocabulary = {word: i for i, word in enumerate(sorted({word for text, _ in train for word in words(text)}))}

    def counts(part: list[Example]) -> np.ndarray:
        matrix = np.zeros((len(part), len(vocabulary)))
        for row, (text, _) in zip(matrix, part, strict=True):
            for word in words(text):
                if word in vocabulary:
                    row[vocabulary[word]] += 1
        return matrix

    def classes(part: list[Example]) -> np.ndarray:
        return np.array([LABELS.index(label) for _, label in part])

    frequency = (counts(train) > 0).sum(axis=0)
    inverse = np.log((1 + len(train)) / (1 + frequency)) + 1
    features = counts(train) * inverse
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    centroids = np.stack([features[classes(train) == k].mean(axis=0) for k in range(len(LABELS))])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    # The length of a held-out row does not change which centroid is nearest.
    predicted = (counts(held_out) * inverse @ centroids.T).argmax(axis=1)
    accuracy = float(np.mean(predicted == classes(held_out)))
    assert 0.3 < accuracy < 0.7
