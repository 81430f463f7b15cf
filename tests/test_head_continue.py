"""Examples that come later: what a run keeps, and what it reads again."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from graphs import MODELS

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.errors import JournalError
from pocketzo.train.head.kept import Kept
from pocketzo.train.head.run import KEPT, HeadRun, with_labels


def write(path: Path, classes: list[int], seed: int, rows: int = 30) -> Path:
    """Write token ids of which the second is the class."""
    random = np.random.default_rng(seed)
    labels = np.array(classes)[np.arange(rows) % len(classes)]
    ids = random.integers(10, 30, (rows, 6))
    ids[:, 1] = 5 + labels
    mask = np.ones_like(ids)
    mask[::3, 4:] = 0
    np.savez(path, input_ids=ids, attention_mask=mask, labels=labels)
    return path


@pytest.fixture
def base(tmp_path: Path) -> pz.Bundle:
    return pz.prepare(MODELS / "bert-new.onnx", tmp_path / "base", task="classification")


@pytest.mark.parametrize("keep", [True, False])
def test_a_head_after_another_learns_from_both(
    keep: bool, base: pz.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write(tmp_path / "first.npz", [0, 1], 1), write(tmp_path / "second.npz", [0, 1, 2], 2)
    pz.train_head(base, first, tmp_path / "run", keep=keep, threads=1)
    assert (tmp_path / "run" / KEPT).exists() == keep
    counts: list[int] = []
    of = Kept.of

    def counted(bundle: pz.Bundle, data: pz.Dataset, **options: Any) -> Kept:
        counts.append(len(data))
        return of(bundle, data, **options)

    monkeypatch.setattr(Kept, "of", counted)
    if keep:
        first.rename(tmp_path / "gone.npz")
    found = pz.train_head(base, second, tmp_path / "more", after=tmp_path / "run", threads=1)
    assert counts == ([30] if keep else [30, 30])
    assert found.bundle.labels == ("0", "1", "2")
    # it is the head of all examples at once
    with np.load(tmp_path / "gone.npz" if keep else first) as one, np.load(second) as other:
        joined: dict[str, Any] = {name: np.concatenate([one[name], other[name]]) for name in one}
        np.savez(tmp_path / "both.npz", **joined)
    both = pz.train_head(base, tmp_path / "both.npz", tmp_path / "both", threads=1)
    assert both.fit.trials[0].features == found.fit.trials[0].features
    for ours, theirs in zip(found.fit.head.weights, both.fit.head.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())
    files = HeadRun.read(tmp_path / "more")[0].results["files"]
    assert [Path(file["path"]).name for file in files] == ["first.npz", "second.npz"]


def test_what_is_kept_is_for_its_owner_alone_and_comes_back(base: pz.Bundle, tmp_path: Path) -> None:
    named = with_labels(base, "ab")
    kept = Kept.of(named, pz.load_dataset(write(tmp_path / "d.npz", [0, 1], 1), named), threads=1, folder=tmp_path)
    kept.save(tmp_path / "kept")
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o600
    again = Kept.joined([Kept.read(tmp_path / "kept", base), kept.take(np.array([4, 2]))], tmp_path)
    rows = np.array([*range(30), 4, 2])
    np.testing.assert_array_equal(again.labels, kept.labels[rows])
    for key, array in again.pooled.items():
        np.testing.assert_array_equal(array, kept.pooled[key][rows])
    assert again.tokens is not None
    assert kept.tokens is not None
    for example, source in enumerate(rows):
        ours, theirs = (
            states.at(2, states.rows_of(np.array([one]))[0])
            for states, one in ((again.tokens, example), (kept.tokens, source))
        )
        np.testing.assert_array_equal(ours, theirs)


def test_what_cannot_go_on(base: pz.Bundle, tmp_path: Path) -> None:
    first, second = write(tmp_path / "first.npz", [0, 1], 1), write(tmp_path / "second.npz", [0, 1], 2)
    pz.train_head(base, first, tmp_path / "run", threads=1)
    with pytest.raises(JournalError, match="has learnt from these examples already"):
        pz.train_head(base, first, tmp_path / "more", after=tmp_path / "run", threads=1)
    other = pz.prepare(MODELS / "bert-old.onnx", tmp_path / "other", task="classification")
    with pytest.raises(JournalError, match="not the file that the head was fitted to"):
        pz.train_head(other, second, tmp_path / "more", after=tmp_path / "run", threads=1)
    write(first, [0, 1], 3)
    with pytest.raises(JournalError, match="it has changed since"):
        pz.train_head(base, second, tmp_path / "more", after=tmp_path / "run", threads=1)
    assert not (tmp_path / "more").exists()


def test_the_command(base: pz.Bundle, tmp_path: Path) -> None:
    def command(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli, ["train", *arguments, "--threads", "1"])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    data = str(write(tmp_path / "first.npz", [0, 1], 1))
    more = str(write(tmp_path / "second.npz", [0, 1, 2], 2))
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    assert "personal data" in command(str(base.path), "--data", data, "-o", run, "--keep")
    printed = command("--continue", run, "--data", more, "-o", str(tmp_path / "more"))
    assert "has kept no states" not in printed
    command(str(base.path), "--data", data, "-o", other)
    assert "has kept no states" in command("--continue", other, "--data", more, "-o", str(tmp_path / "again"))
