from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decoders
import numpy as np
import pytest
from click.testing import CliRunner, Result
from graphs import MODELS

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.cli.baselines import heads_of, say_heads
from pocketzo.prepare.head import prepare_head
from pocketzo.runtime.taps import Stream
from pocketzo.train import baselines
from pocketzo.train.baselines import Majority, _choices, measure_heads, why_none
from pocketzo.train.head.evaluate import evaluate_heads
from pocketzo.train.head.fit import Fitter
from pocketzo.train.head.kept import Kept
from pocketzo.train.head.run import PARAMETERS


class Labelled:
    fingerprint = ""

    def __init__(self, *labels: int) -> None:
        self.label_ids = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.label_ids)

    def batch(self, indices: Any) -> dict[str, Any]:
        return {"labels": self.label_ids[indices]}


def test_the_class_is_that_of_the_training_data() -> None:
    found = Majority.of(Labelled(2, 0, 2, 1), Labelled(0, 0, 2, 1, 0))
    assert found == Majority(2, 0.2)
    assert Majority.of(Labelled(1, 0), Labelled(0, 0, 1, 0)) == Majority(0, 0.75)  # the first of several


def test_there_is_none_without_classes() -> None:
    without: Any = SimpleNamespace(label_ids=None)
    assert Majority.of(without, Labelled(1)) is None
    assert Majority.of(Labelled(1), without) is None
    assert Majority.of(Labelled(1), None) is None


@pytest.mark.parametrize(("accuracy", "beaten"), [(0.5, False), (0.4, False), (0.51, True), (None, True)])
def test_a_run_that_is_no_better_is_named(accuracy: float | None, beaten: bool) -> None:
    text = Majority(1, 0.5).text(("no", "yes"), {"accuracy": accuracy})
    assert text.startswith("always 'yes', the most frequent class of the training data: accuracy 50.0 %")
    assert ("no better" in text) != beaten
    assert Majority(1, 0.5).text(None, {}).startswith("always class 1,")


# ---- the linear probe and the side head ------------------------------------------------------------------------------


def write(path: Path, seed: int, rows: int = 60, classes: int = 3) -> Path:
    """Write token ids of which one decides the class, in two thirds of the rows."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, 30, (rows, 6))
    labels = np.arange(rows) % classes
    ids[:, 1] = np.where(np.arange(rows) % 3, 5 + labels, ids[:, 1])
    mask = np.ones_like(ids)
    mask[::3, 4:] = 0
    np.savez(path, input_ids=ids, attention_mask=mask, labels=labels)
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train.npz", 7)


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    return write(tmp_path / "dev.npz", 8, rows=30)


def loaded(bundle: pz.Bundle, *paths: Path) -> list[pz.Dataset]:
    return [pz.load_dataset(path, bundle) for path in paths]


def test_the_heads_are_those_of_a_bundle_with_a_side_head(
    bundles: Callable[[str], pz.Bundle], train: Path, dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same states come from a graph that has its own head, without the package onnx, and from prepare's."""
    prepared = prepare_head(MODELS / "bert-new.onnx", tmp_path / "head", labels=["a", "b", "c"])
    assert prepared.side is not None
    kept = Kept.of(prepared, *loaded(prepared, train), folder=None)
    expected = Fitter(prepared, kept, seed=0, told=lambda *_: None, choices=_choices(prepared.side)).fit()
    by_graph = evaluate_heads(prepared, [expected.probe, expected.head], *loaded(prepared, dev), threads=1)
    bundle = bundles("bert-new")
    for name in ("onnx", "onnx_ir"):
        monkeypatch.setitem(sys.modules, name, None)
    told: list[tuple[int, int]] = []
    found = measure_heads(bundle, *loaded(bundle, train, dev), told=lambda done, of, _: told.append((done, of)))
    for one, trial, values in zip(
        (found.probe, found.head), (expected.probe_trial, expected.trials[0]), by_graph, strict=True
    ):
        assert one.reads == trial.features.text
        assert one.validated["loss"] == pytest.approx(trial.loss, rel=1e-3)  # trials stop at a larger gradient
        assert one.evaluated == pytest.approx(values, rel=1e-4)
        assert (one.validated["accuracy"] or 0) > 0.5
    assert (found.examples, found.forwards, told[-1]) == (60, 90, (90, 90))


def test_evaluation_data_chooses_nothing(
    bundles: Callable[[str], pz.Bundle], train: Path, dev: Path, tmp_path: Path
) -> None:
    bundle = bundles("bert-new")
    turned = write(tmp_path / "other.npz", 9)
    with np.load(turned) as file:
        np.savez(turned, **{**file, "labels": 2 - file["labels"]})
    data, held_out, other = loaded(bundle, train, dev, turned)
    found = [measure_heads(bundle, data, evaluated) for evaluated in (None, held_out, other)]
    assert len({(str(one.probe.validated), str(one.head.validated), one.head.reads) for one in found}) == 1
    assert found[0].head.evaluated is None
    assert found[1].head.evaluated != found[2].head.evaluated


def test_many_examples_are_sampled(
    bundles: Callable[[str], pz.Bundle], train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "MOST_EXAMPLES", 30)
    bundle = bundles("bert-new")
    (data,) = loaded(bundle, train)
    first, again, other = (measure_heads(bundle, data, seed=seed) for seed in (0, 0, 1))
    assert (first.examples, first.forwards) == (30, 30)
    assert replace(first, seconds=0) == replace(again, seconds=0)
    assert first.head.validated != other.head.validated


@pytest.mark.parametrize("trained", ["all", "lora", "ia3", "adapter:2", "last:1"])
def test_layers_are_found_beside_what_is_trained(trained: str, tmp_path: Path) -> None:
    path = decoders.write_llama(tmp_path / "model.onnx", decoders.llama_weights(kv_heads=2), 2)
    stream = Stream.of(pz.prepare(path, tmp_path / "base", task="causal-lm", train=trained))
    assert [tap.layer for tap in stream.taps] == [1, 2]
    assert not any(tap.normalised for tap in stream.taps[:1])
    assert stream.causal


def test_why_there_are_none(
    bundles: Callable[[str], pz.Bundle], tiny_bundle: Path, tiny_data: Path, train: Path, tmp_path: Path
) -> None:
    tiny = pz.Bundle.read(tiny_bundle)
    with pytest.raises(pz.BundleError, match="no residual stream was found"):
        measure_heads(tiny, *loaded(tiny, tiny_data))
    bundle = bundles("bert-new")
    with pytest.raises(pz.DataError, match="have one class"):
        measure_heads(bundle, *loaded(bundle, write(tmp_path / "one.npz", 1, classes=1)))
    with pytest.raises(pz.DataError, match="takes 5 examples: got 4"):
        measure_heads(bundle, *loaded(bundle, write(tmp_path / "few.npz", 1, rows=4)))
    path = decoders.write_llama(tmp_path / "model.onnx", decoders.llama_weights(kv_heads=2), 2)
    language = pz.prepare(path, tmp_path / "base", task="causal-lm")
    with np.load(train) as file:
        np.savez(tmp_path / "text.npz", input_ids=file["input_ids"] % 20, attention_mask=file["attention_mask"])
    reason = why_none(language, *loaded(language, tmp_path / "text.npz"))
    assert reason is not None
    assert "labels of examples" in reason


# ---- on the command line ---------------------------------------------------------------------------------------------


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=False)


def run_command(base: Path, train: Path, dev: Path | None, run: Path, *more: object) -> Result:
    held_out = [] if dev is None else ["--eval", dev]
    steps = ["--steps", 60, "--batch-size", 16, "--lr", "1e-9", "--threads", 1]
    return command("train", base, "--data", train, *held_out, "-o", run, *steps, *more)


def test_training_says_when_the_side_head_would_have_been_better(
    bundles: Callable[[str], pz.Bundle], train: Path, dev: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bundles("bert-new").path, base)
    result = run_command(base, train, dev, tmp_path / "run")
    assert result.exit_code == 0
    assert "by 90 forward passes of an example (1." in result.stderr
    header, *lines = result.stdout.splitlines()
    assert re.split("  +", header.strip())[-2:] == ["linear probe", "side head"]
    at = next(
        number for number, line in enumerate(lines) if line.startswith("linear probe, layer 2, mean over tokens: ")
    )
    assert lines[at].endswith(" in cross-validation on 60 training examples")
    assert lines[at + 1].startswith("side head, layers 1 to 2, mean over tokens, without attention pooling: accuracy ")
    assert lines[at + 2].startswith("the side head would have been better: on the evaluation data it has accuracy ")
    for line in lines[at + 3 : at + 5]:  # the commands work as they stand
        words = shlex.split(line)
        assert words[0] == "pocketzo"
        assert command(*words[1:]).exit_code == 0
    assert (tmp_path / "run-head" / PARAMETERS).is_file()
    resumed = command("train", "--resume", tmp_path / "run")
    assert lines[at : at + 5] == [line for line in resumed.stdout.splitlines() if line in lines[at : at + 5]]


def test_a_run_without_evaluation_data_is_not_compared(
    bundles: Callable[[str], pz.Bundle], train: Path, tmp_path: Path
) -> None:
    result = run_command(bundles("bert-new").path, train, None, tmp_path / "run")
    assert "to compare the run with them, give --eval" in result.stdout
    assert "would have been better" not in result.stdout


def test_a_run_that_is_better_is_said_to_be(
    bundles: Callable[[str], pz.Bundle], train: Path, dev: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_command(bundles("bert-new").path, train, dev, run)
    past = pz.Run(run)
    found = heads_of(past)
    assert found is not None
    worse = replace(found, head=replace(found.head, evaluated={"accuracy": 0.0, "loss": 9.0}))
    say_heads(worse, past, past.base())
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"on the evaluation data the side head has accuracy 0\.0 %, and the run \d+\.\d % at its best", last
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--baselines", "off"), None),
        (("--steps", 1), "they take 90 forward passes of an example, and a tenth of those of the run are 20"),
        (("--steps", 1, "--baselines", "on"), "cross-validation"),
        (("--max-memory", "8G"), "--max-memory does not watch them; --baselines on measures them all the same"),
    ],
)
def test_the_option(
    bundles: Callable[[str], pz.Bundle], train: Path, dev: Path, tmp_path: Path, options: Any, said: str | None
) -> None:
    result = run_command(bundles("bert-new").path, train, dev, tmp_path / "run", *options)
    assert result.exit_code == 0
    assert said in result.stderr if said else "linear probe" not in result.stderr
    assert ("side head" in result.stdout) == (said == "cross-validation")


def test_a_damaged_line_is_named(bundles: Callable[[str], pz.Bundle], train: Path, dev: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_command(bundles("bert-new").path, train, dev, run)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"examples": 60', '"examples": "60"'))
    with pytest.raises(pz.JournalError, match=r"metrics.jsonl: baselines.examples is '60', expected int"):
        heads_of(pz.Run(run))
