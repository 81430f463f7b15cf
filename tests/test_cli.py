"""The real console program, in processes of its own, on a tiny real model."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from conftest import CLASSES, VOCABULARY, write_tiny_onnx
from graphs import model_of, node, weight
from numpy.typing import NDArray
from onnx import numpy_helper
from sizes import SIZE, full_or_small
from vectors import reference

import pocketzo as pz
from pocketzo import doctor
from pocketzo.formats.safetensors import file_sha256
from pocketzo.machine import memory
from pocketzo.train import plot

pytest.importorskip("click", reason="the command line needs it")
pytest.importorskip("rich", reason="the command line needs it")
pytest.importorskip("tokenizers", reason="the data is text")

COMMANDS = (
    *("export", "prepare", "train", "eval", "generate", "replay", "merge", "adapter", "federate", "info", "cache"),
    *("doctor", "demo", "pipeline", "plan"),
)
LABELS = ("red", "green", "blue")
LONG = full_or_small(1000, 300)  # steps
LONG_RUN = "--steps", LONG, "--eval-every", 100
Process = subprocess.CompletedProcess[str]


def program(before: str = "") -> list[str]:
    """Return the words that start the program; ``before`` is Python that runs first in its process."""
    if before:
        return [sys.executable, "-c", f"import sys\n{before}\nfrom pocketzo.__main__ import main\nmain()"]
    return [sys.executable, "-m", "pocketzo"]


def pocketzo(*arguments: object, cwd: Path | None = None, before: str = "", shell: str = "") -> Process:
    """Run the program; ``shell`` is what the shell does first."""
    words = [str(argument) for argument in arguments]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONWARNINGS": "default"}
    if SIZE == "small" and not before and not shell:
        return forked.run(words, cwd, environment)
    command = [*program(before), *words]
    if shell:
        command = ["bash", "-c", f"{shell}\nexec {shlex.join(command)}"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def good(*arguments: object, **options: Any) -> str:
    """Run the program, which must succeed, and return its standard output."""
    process = pocketzo(*arguments, **options)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    return process.stdout


def refused(*arguments: object, **options: Any) -> str:
    """Run the program, which must refuse the input in one line, and return the line."""
    process = pocketzo(*arguments, **options)
    assert process.returncode == 1, (process.stdout, process.stderr)
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("pocketzo: error: ")
    return line


class Workspace:
    """A model, its bundle, and data, all made by the program's own means; nothing in it is to be changed."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {"[PAD]": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = folder / "tokenizer.json"
        tokenizer.save(str(self.tokenizer))
        self.model = folder / "tiny.onnx"
        write_tiny_onnx(self.model)
        self.base = folder / "base"
        good("prepare", self.model, "-o", self.base, "--tokenizer", self.tokenizer, "--labels", ", ".join(LABELS))
        rng = np.random.default_rng(5)
        self.train, self.dev = folder / "train.tsv", folder / "dev.tsv"
        for path, count in ((self.train, 90), (self.dev, 45)):
            lines = []
            for label in rng.integers(0, CLASSES, count).tolist():
                others = rng.integers(CLASSES + 1, VOCABULARY, rng.integers(2, 6)).tolist()
                lines.append(" ".join(f"w{i}" for i in [label + 1, *others]) + f"\t{LABELS[label]}\n")
            path.write_text("".join(lines))
        self.options = (
            "--data", self.train, "--eval", self.dev, "--threads", 1, "--lr", 1e-3, "--group", "classifier:lr=5,eps=2"
        )  # fmt: skip
        self.run = folder / "run"
        self.output = good("train", self.base, *self.options, "-o", self.run, "--steps", 60, "--eval-every", 20)

    def words(self, *more: object) -> list[str]:
        """Return the arguments of a training."""
        return [str(word) for word in (self.base, *self.options, *more)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("cli"))


def weights_after(run: Path, out: Path, *options: object) -> str:
    good("replay", run, "-o", out, *options)
    return file_sha256(out / "weights.safetensors")


# ---- usage -----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    text = good("--help")
    listed = re.findall(r"^  (\w+) ", text[text.index("Commands:") :], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str) -> None:
    text = good(command, "--help")
    assert f"pocketzo {command}" in text
    assert "Example" in text
    assert "\b" not in text
    for option in re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE):
        described = text[text.index(f"{option}") :]
        assert re.search(r"[a-z]{2,}", described.split("\n  -", 1)[0].removeprefix(option)), option


def test_version() -> None:
    assert good("--version") == f"pocketzo {pz.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["train", "--nonsense"], "No such option"),
        (["train"], "BUNDLE is missing"),
        (["train", "base"], "--data is missing"),
        (["train", "base", "--data", "train.tsv"], "-o is missing"),
        (["train", "base", "--steps", "many"], "'many' is not a valid integer"),
        (["train", "base", "--method", "adam"], "'adam' is not one of"),
        (["train", "base", "--trainable", "("], "trainable must be a regular expression, got '(': missing )"),
        (["train", "base", "--lr", "much"], "'much' is neither a number nor auto"),
        (["train", "base", "--group", "classifier"], "expected PATTERN:lr=NUMBER,eps=NUMBER"),
        (["train", "base", "--group", "classifier:lr=much"], "expected PATTERN:lr=NUMBER,eps=NUMBER"),
        (["train", "base", "--group", "(:lr=1"], "a group's pattern must be a regular expression, got '(': missing )"),
        (["train", "base", "--group", "a:lr=-1"], "group 'a': lr must be finite and at least 0, got -1"),
        (["prepare", "m.onnx", "-o", "out", "--train", "a{99999999999}"], "train must be a regular expression"),
        (["train", "--resume", "run", "--steps", "9"], "--steps cannot be changed by --resume"),
        (["train", "base", "--max-memory", "much"], "'much' is not a size such as 1.5G"),
        (["train", "base", "--max-memory", "1.5"], "'1.5' is not a size such as 1.5G"),
        (["train", "base", "--max-memory", "9" * 400 + "G"], "is not a size such as 1.5G"),
        (["train", "base", "--max-memory", "0"], "'0' is not a size such as 1.5G"),
        (["train", "b", "--data", "d", "-o", "r", "--patience", "2"], "--patience needs --eval"),
        (
            ["train", "b", "--data", "d", "-o", "r", "--method", "mezo", "--momentum", "0.5"],
            "--momentum is of --method momentum, not of mezo",
        ),
        (["train", "b", "--data", "d", "-o", "r", "--rank", "2"], "--rank is of --method lozo, not of fzoo"),
        (["eval", "base"], "Missing option '--data'"),
        (["replay", "run"], "Missing option '-o'"),
        (["prepare", "model.onnx"], "Missing option '-o'"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, tmp_path: Path) -> None:
    process = pocketzo(*arguments, cwd=tmp_path)
    assert process.returncode == 2
    assert said in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["click", "rich"])
def test_says_how_to_get_what_the_command_line_needs(package: str) -> None:
    process = pocketzo("--help", before=f"sys.modules[{package!r}] = None")
    assert process.returncode == 1
    assert process.stderr == (
        f"pocketzo: error: this needs the package {package!r}, which is not installed: pip install 'pocketzo[cli]'\n"
    )


# ---- errors in the input ---------------------------------------------------------------------------------------------

NEW = ("train", "{base}", "--data", "{train}", "-o", "new")
AS_RUN = ("--eval", "{dev}", "--threads", "1", "--lr", "1e-3", "--group", "classifier:lr=5,eps=2", "--steps", "60")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nowhere", "--data", "{train}", "-o", "new"], "nowhere: no such bundle"),
        (["train", "cut", "--data", "{train}", "-o", "new"], "cut/weights.safetensors"),
        (["train", "{base}", "--data", "missing.tsv", "-o", "new"], "missing.tsv: No such file"),
        (["train", "{base}", "--data", "data.txt", "-o", "new"], "expected .jsonl, .tsv, .csv or .npz"),
        (["train", "{base}", "--data", "bad.jsonl", "-o", "new"], "bad.jsonl, line 2"),
        (["train", "{base}", "--data", "empty.tsv", "-o", "new"], "empty.tsv: no examples"),
        (["train", "{base}", "--data", "range.tsv", "-o", "new"], "range.tsv, line 1"),
        ([*NEW, "--eval", "bad.jsonl"], "bad.jsonl, line 2"),
        ([*NEW, "--steps", "0"], "steps must be at least 1, got 0"),
        ([*NEW, "--lr", "-1"], "lr must be finite and at least 0, got -1"),
        ([*NEW, "--eps", "0"], "eps must be finite and greater than 0"),
        ([*NEW, "--eval-every", "0"], "eval_every must be at least 1, got 0"),
        ([*NEW, "--batch-size", "0"], "batch_size must be at least 1"),
        ([*NEW, "--threads", "0"], "threads must be"),
        ([*NEW, "--seed", "-1"], "seed must be in"),
        ([*NEW, "--warmup", "5", "--steps", "5", "--schedule", "cosine"], "a cosine schedule needs"),
        ([*NEW, "--trainable", "nothing"], "matches none of the"),
        ([*NEW, "--group", "nothing:lr=2"], "matches none of the"),
        ([*NEW, "--text-column", "message"], "no 'message' among the columns"),
        (
            ["train", "{base}", "--data", "{dev}", "-o", "{run}", *AS_RUN, "--eval-every", "20"],
            "the train data is not that of the run",
        ),
        ([*NEW, "--max-memory", "1M"], "loading takes"),
        (["train", "{base}", "--data", "{train}", "-o", "cut"], "already exists"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "--resume", "{run}", "--data", "{dev}"], "the train data is not that of the run"),
        (["train", "--resume", "{run}", "cut"], "cut/weights.safetensors"),
        (["eval", "nowhere", "--data", "{dev}"], "nowhere: no such bundle or run"),
        (["eval", "folder", "--data", "{dev}"], "folder: neither a bundle"),
        (["eval", "{run}", "--data", "{dev}", "--average", "2"], "average must be greater than 0 and at most 1, got 2"),
        (["eval", "{run}", "--data", "{dev}", "--step", "61"], "--step must be 0 to 60"),
        (["eval", "{base}", "--data", "bad.jsonl"], "bad.jsonl, line 2"),
        (["eval", "{base}", "--data", "{dev}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["replay", "{run}", "-o", "new", "--step", "-1"], "--step must be 0 to 60"),
        (["replay", "{run}", "-o", "folder"], "folder: already exists"),
        (["replay", "{run}", "-o", "folder", "--force"], "folder: already exists and is not a bundle"),
        (["replay", "{run}", "-o", "{base}", "--force"], "is the base of"),
        (["replay", "{run}", "-o", "new", "--base", "cut"], "cut/weights.safetensors"),
        (["info", "nowhere"], "nowhere: no such bundle or run"),
        (["prepare", "missing.onnx", "-o", "new"], "missing.onnx"),
        (["prepare", "data.txt", "-o", "new"], "data.txt"),
        (["prepare", "{model}", "-o", "new", "--labels", "one,two"], "labels"),
        (["prepare", "{model}", "-o", "new", "--labels", "one,,two"], "labels"),
        (["prepare", "{model}", "-o", "new", "--tokenizer", "missing.json"], "missing.json"),
        (["prepare", "{model}", "-o", "new", "--max-length", "0"], "max_length"),
        (["prepare", "{model}", "-o", "new", "--probe", "missing.npz"], "missing.npz: cannot be read: No such file"),
        (["prepare", "{model}", "-o", "cut"], "cut: already exists"),
        (["prepare", "{model}", "-o", "x" * 256], f"{'x' * 256}: File name too long"),
        (["prepare", "{model}", "-o", "data.txt/new"], "data.txt"),
        (["demo", "--checkpoint", "folder"], "folder/model.safetensors: no such file"),
        (["demo", "--output", "folder"], "folder: holds something else than an earlier demo: folder/file; choose"),
        (["demo", "--output", "demo"], "demo: holds something else than an earlier demo: demo/base/note.txt; choose"),
        (["demo", "--output", "killed", "--checkpoint", "folder"], "folder/model.safetensors: no such file"),
        (["demo", "--steps", "0"], "steps must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_in_the_input(workspace: Workspace, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "killed" / ".pocketzo-0123456789abcdef" / "new").mkdir(parents=True)  # left by a demo
    (tmp_path / "demo" / "run").mkdir(parents=True)
    (tmp_path / "demo" / "run" / "journal.pzj").touch()
    shutil.copytree(workspace.base, tmp_path / "demo" / "base")
    (tmp_path / "demo" / "base" / "note.txt").touch()
    (tmp_path / "data.txt").write_text("neither data nor a model")
    (tmp_path / "bad.jsonl").write_text('{"text": "w1", "label": "red"}\n{"text": "w1", "label": \n')
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "range.tsv").write_text("w1 w2\t3\n")
    (tmp_path / "cut").mkdir()
    for file in workspace.base.iterdir():
        data = file.read_bytes()
        (tmp_path / "cut" / file.name).write_bytes(data[:-1] if file.suffix == ".safetensors" else data)
    before = contents(tmp_path), contents(workspace.base.parent)

    line = refused(*(argument.format(**vars(workspace)) for argument in arguments), cwd=tmp_path)

    assert said in line
    assert (contents(tmp_path), contents(workspace.base.parent)) == before, "something was written"


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_prepare_takes_a_probing_batch(workspace: Workspace, tmp_path: Path) -> None:
    ids = np.array([[3, 4, 5], [6, 7, 0], [9, 0, 0]])
    np.savez(tmp_path / "batch.npz", input_ids=ids, attention_mask=(ids > 0).astype(np.int64))
    good("prepare", workspace.model, "-o", tmp_path / "new", "--probe", tmp_path / "batch.npz")
    with np.load(tmp_path / "new" / "probe.npz") as kept:
        np.testing.assert_array_equal(kept["input_ids"], ids)
    np.savez(tmp_path / "batch.npz", input_ids=ids)
    line = refused("prepare", workspace.model, "-o", tmp_path / "other", "--probe", tmp_path / "batch.npz")
    assert "batch.npz: the input 'attention_mask' (int64 of shape ['batch', 'sequence']) is missing" in line


def test_debug_shows_the_traceback() -> None:
    process = pocketzo("info", "nowhere", "--debug")
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "BundleError: nowhere: no such bundle or run" in process.stderr
    assert "Traceback" in pocketzo("--debug", "info", "nowhere").stderr


def test_a_full_disk_is_one_line_and_leaves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    # bash counts in blocks of 1,024 bytes; the weights take about 10.
    line = refused("replay", workspace.run, "-o", tmp_path / "tuned", shell="trap '' XFSZ; ulimit -f 4")
    assert f"{tmp_path}/tuned/weights.safetensors: File too large" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("info", "{run}"), ("info", "{base}", "--json"), ("doctor",)]
)
def test_output_that_cannot_be_written_is_named(workspace: Workspace, arguments: tuple[str, ...]) -> None:
    line = refused(*(argument.format(**vars(workspace)) for argument in arguments), shell="exec >/dev/full")
    assert line == "pocketzo: error: standard output: No space left on device"


def test_force_replaces_a_bundle_and_nothing_else(workspace: Workspace, tmp_path: Path) -> None:
    base = tmp_path / "base"
    prepare = "prepare", workspace.model, "-o", base, "--tokenizer", workspace.tokenizer, "--labels", ",".join(LABELS)
    good(*prepare)
    before = (base / "bundle.json").read_bytes()
    assert "base: already exists; choose another folder, or --force" in refused(*prepare)
    good(*prepare, "--max-length", 5, "--force")
    assert (base / "bundle.json").read_bytes() != before
    good("train", base, "--data", workspace.train, "-o", base / "runs" / "first", "--steps", 2, "--threads", 1)
    (base / "note.txt").write_text("mine")
    for command in prepare, ("replay", workspace.run, "-o", base):
        kept = contents(tmp_path)
        assert refused(*command, "--force").endswith(
            "base: holds more than the files of a bundle: note.txt, runs; move that away or choose another folder"
        )
        assert contents(tmp_path) == kept


# ---- a session -------------------------------------------------------------------------------------------------------


def test_training_tells_what_came_of_it(workspace: Workspace) -> None:
    *table, moved, fell, journal, majority, evaluate, replay = workspace.output.splitlines()
    header, accuracy, loss = (re.split(r"  +", line.strip()) for line in table)
    assert header[:2] == ["before", "after step 60"]
    assert header[2].startswith("best, step ")
    assert accuracy[0] == "accuracy"
    assert loss[0] == "loss"
    assert float(accuracy[3].split()[0]) > float(accuracy[1].split()[0]) + 10, "it did not learn"
    assert float(loss[3]) < float(loss[1])
    figures = rf"from {accuracy[1]} to {accuracy[2]}, a difference of [\d.]+ % with a standard error of [\d.]+ %"
    assert re.fullmatch(f"accuracy rose: {figures}", moved)
    assert re.fullmatch(r"always '\w+', the most frequent class of the training data: accuracy \d\d\.\d %", majority)
    figures = rf"from {loss[1]} to {loss[2]}, a difference of [\d.]+ with a standard error of [\d.]+"
    assert re.fullmatch(f"loss fell: {figures}", fell)
    size = (workspace.run / "journal.pzj").stat().st_size
    assert journal == f"{workspace.run}: 60 steps, journal of {size / 1000:.1f} kB"
    assert evaluate.startswith(f"evaluate:  pocketzo eval {workspace.run} --data {workspace.dev}")
    assert replay.startswith(f"get the tuned bundle:  pocketzo replay {workspace.run} -o tuned")
    lines = [json.loads(line) for line in (workspace.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [0, 20, 40, 60]


def test_the_commands_that_training_prints_work_as_they_stand(workspace: Workspace, tmp_path: Path) -> None:
    for command in workspace.output.splitlines()[-2:]:
        words = shlex.split(command.partition(":  ")[2])
        assert words[0] == "pocketzo"
        good(*words[1:], cwd=tmp_path)
    assert pz.Bundle.read(tmp_path / "tuned").labels == LABELS


def test_train_eval_replay_eval_agree(workspace: Workspace, tmp_path: Path) -> None:
    def evaluation(path: Path, *options: object) -> dict[str, float]:
        result: dict[str, float] = json.loads(good("eval", path, "--data", workspace.dev, "--json", *options))
        assert list(result) == ["accuracy", "loss", "count"]
        return result

    of_run = evaluation(workspace.run)
    weights_after(workspace.run, tmp_path / "tuned")
    assert evaluation(tmp_path / "tuned") == of_run
    recorded = [line["eval"] for line in pz.Run(workspace.run).metrics() if "eval" in line]
    assert of_run["count"] == recorded[-1]["count"] == 45
    assert of_run["accuracy"] == recorded[-1]["accuracy"]
    assert of_run["loss"] == pytest.approx(recorded[-1]["loss"], rel=1e-6)

    assert evaluation(workspace.run, "--step", 0) == evaluation(workspace.base)
    assert evaluation(workspace.run, "--best")["accuracy"] == max(result["accuracy"] for result in recorded)
    assert weights_after(workspace.run, tmp_path / "start", "--step", 0) == pz.Bundle.read(workspace.base).base_sha256
    before = file_sha256(tmp_path / "tuned" / "weights.safetensors")
    assert weights_after(workspace.run, tmp_path / "tuned", "--step", 30, "--force") != before
    before = weights_after(workspace.run, tmp_path / "tuned", "--step", 40, "--average", 0.5, "--force")
    assert evaluation(tmp_path / "tuned") == evaluation(workspace.run, "--step", 40, "--average", 0.5)
    said = good("eval", workspace.run, "--data", workspace.dev, "--average", 0.25)
    assert said.rstrip().endswith("mean after steps 46 to 60")
    assert before != weights_after(workspace.run, tmp_path / "tuned", "--step", 40, "--force")


def test_eval_for_people(workspace: Workspace) -> None:
    pattern = r"accuracy \d+\.\d % · loss \d\.\d{4} · 45 examples · after step 60\n"
    assert re.fullmatch(pattern, good("eval", workspace.run, "--data", workspace.dev))


def test_eval_prints_the_metrics_that_are_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    words = "eval", workspace.run, "--data", workspace.dev, "--metric"
    result = json.loads(good(*words, "f1,matthews", "--metric", "loss", "--metric", "f1", "--json"))
    assert list(result) == ["f1", "matthews", "loss", "count"]
    weights_after(workspace.run, tmp_path / "tuned")
    model = pz.load(tmp_path / "tuned", threads=1)
    data = pz.load_dataset(workspace.dev, model.bundle)
    assert result == pytest.approx(pz.evaluate(model, data, metrics=["f1", "matthews", "loss"]), rel=1e-5)
    pattern = r"perplexity \d\.\d+ · accuracy \d+\.\d % · 45 examples · after step 60\n"
    assert re.fullmatch(pattern, good(*words, "perplexity, accuracy"))
    process = pocketzo(*words, "f1,recall")
    assert process.returncode == 2
    assert "'recall' is not one of accuracy, f1, matthews, subset-accuracy, " in process.stderr


def test_eval_of_a_bundle_takes_no_step(workspace: Workspace) -> None:
    process = pocketzo("eval", workspace.base, "--data", workspace.dev, "--best")
    assert process.returncode == 2
    assert "belong to a run" in process.stderr
    assert pocketzo("replay", workspace.run, "-o", "x", "--best", "--step", 1).returncode == 2


def test_mezo_and_all_options(workspace: Workspace, tmp_path: Path) -> None:
    good(
        "train", workspace.base, "--data", workspace.train, "--eval", workspace.dev, "-o", tmp_path / "run",
        "--method", "mezo", "--lr", 1e-3, "--eps", 1e-2, "--batch-size", 7, "--seed", 2**63, "--weight-decay", 0.1,
        "--trainable", "classifier|dense", "--group", "classifier:lr=2", "--group", "dense:eps=0.5",
        "--distribution", "rademacher", "--queries", 2, "--block", 0.5, "--schedule", "linear",
        "--warmup", 2, "--steps", 12, "--eval-every", 2, "--metric", "loss", "--patience", 6,
        "--snapshot-every", 5, "--group-by-length", "--threads", 1,
    )  # fmt: skip
    recipe = pz.Run(tmp_path / "run").recipe
    assert recipe.method == {
        "method": "mezo", "lr": 1e-3, "eps": 1e-2, "seed": 2**63, "weight_decay": 0.1, "distribution": "rademacher",
        "queries": 2, "subset": {"name": "block", "share": 0.5},
        "groups": [{"pattern": "classifier", "lr": 2.0, "eps": 1.0}, {"pattern": "dense", "lr": 1.0, "eps": 0.5}],
        "schedule": {"kind": "linear", "steps": 12, "warmup": 2},
        "trained": recipe.method["trained"],
    }  # fmt: skip
    assert sorted(recipe.method["trained"]) == ["classifier.bias", "classifier.weight", "dense.bias", "dense.weight"]
    settings = asdict(recipe.loop)
    expected = {"batch_size": 7, "steps": 12, "eval_every": 2, "metric": "loss", "patience": 6, "snapshot_every": 5}
    assert {name: settings[name] for name in expected} == expected
    assert settings["group_by_length"] is True
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["step-00000010"]


def test_pace_and_candidates(workspace: Workspace, tmp_path: Path) -> None:
    command = (
        "train", workspace.base, *workspace.options, "-o", tmp_path / "run", "--method", "mezo", "--lr", 1e-3,
        "--trainable", "bias", "--steps", 5, "--pace", 0.5, "--pace-most", 6, "--candidates", 4,
    )  # fmt: skip
    assert "5 steps of about 8 forward passes" in pocketzo(*command).stderr
    past = pz.Run(tmp_path / "run")
    assert past.recipe.method["pace"] == {"threshold": 0.5, "most": 6}
    assert past.recipe.method["candidates"] == 4
    assert {len(entry.coefficients) for entry in past.entries} <= {2, 3, 4, 5, 6}
    assert "candidates is 4 there and 5 here" in refused(*command[:-1], 5)
    assert "pace is {'threshold': 0.5, 'most': 6} there and None here" in refused(*command[:-6], *command[-2:])
    other = ("train", workspace.base, *workspace.options, "-o", tmp_path / "other")
    assert "pace is not for fzoo: it divides the estimate" in refused(*other, "--pace", 0.1)
    assert "--pace-most needs --pace" in pocketzo(*other, "--pace-most", 5).stderr


def test_patience_ends_a_run_and_says_so(workspace: Workspace, tmp_path: Path) -> None:
    output = good(
        "train",
        workspace.base,
        *workspace.options,
        "-o",
        tmp_path / "run",
        "--lr",
        0,
        "--eval-every",
        1,
        "--patience",
        3,
    )
    assert "ended after step 3 of 1000: 3 evaluations without a better one" in output


def test_info(workspace: Workspace) -> None:
    bundle = json.loads(good("info", workspace.base, "--json"))
    assert bundle["kind"] == "bundle"
    settings = {"labels": list(LABELS), "loss": "cross-entropy"}
    assert bundle["task"] == {"name": "classification", "settings": settings}
    assert bundle["sets"] == {"all": bundle["trainable"]}
    assert bundle["tuned"] is False
    assert bundle["parameters"] >= bundle["trainable"] > 1000
    assert {tensor["name"] for tensor in bundle["tensors"]} >= {"classifier.weight", "embedding.weight"}
    run = json.loads(good("info", workspace.run, "--json"))
    assert run["kind"] == "run"
    assert run["steps_done"] == run["steps"] == 60
    assert run["method"]["method"] == "fzoo"
    assert run["last"]["count"] == 45
    assert bundle["prepacking"] == "can be prepacked: 2 matrices, 0.0 MB"
    assert re.search(r"task +classification, labels red, green, blue *\n", good("info", workspace.base))
    assert re.search(r"loss +cross-entropy of 'logits' over 3 classes *\n", good("info", workspace.base))
    assert re.search(r"classifier.weight +float32 +40 x 3 +yes", good("info", workspace.base, "--tensors"))
    assert str(workspace.base) in good("info", workspace.run)


def test_what_is_frozen_is_said_and_listed(tmp_path: Path) -> None:
    nodes = [
        node("Add", "norm.weight one", "scale", "shift"),
        node("Mul", "x scale", "y"),
        node("MatMul", "y fc.weight", "logits"),
    ]
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    path = model_of(tmp_path / "m.onnx", nodes, [weight("norm.weight", 4), weight("fc.weight", 4, 3), one])
    output = good("prepare", path, "-o", tmp_path / "base")
    assert "16 parameters, 12 trainable" in output
    assert "frozen: folded 4, constant 1" in output
    assert "norm.weight (4 numbers): folded: the runtime computes node 'shift' (Add) only once" in output
    listed = good("info", tmp_path / "base", "--tensors")
    assert re.search(r"^frozen +folded 4, constant 1", listed, re.MULTILINE)
    assert re.search(r"^fc.weight +float32 +4 x 3 +yes \(all\)$", listed, re.MULTILINE)
    assert re.search(r"^norm.weight +float32 +4 in the graph +no \(folded: .*\)$", listed, re.MULTILINE)
    assert re.search(r"^one +float32 +1 in the graph +no \(constant: a single number\)$", listed, re.MULTILINE)
    facts = json.loads(good("info", tmp_path / "base", "--json"))
    assert facts["frozen"] == {"folded": 4, "constant": 1}
    assert "trained: all 12" in output
    output = good("prepare", path, "-o", tmp_path / "added", "--train", "lora:r=2,targets=fc")
    assert "trained: lora:r=2,targets=fc 14" in output
    assert "frozen: request 12" in output
    listed = good("info", tmp_path / "added", "--tensors")
    assert re.search(r"^fc.lora_A +float32 +4 x 2 +yes \(lora:r=2,targets=fc\)$", listed, re.MULTILINE)
    assert re.search(r"^sets +lora:r=2,targets=fc 14 *$", listed, re.MULTILINE)
    facts = json.loads(good("info", tmp_path / "base", "--json"))
    assert {tensor["name"]: tensor["elements"] for tensor in facts["frozen_tensors"]} == {"norm.weight": 4, "one": 1}


# ---- a metric as the objective ---------------------------------------------------------------------------------------


class Lopsided:
    """Examples most of which are red, whatever their words say: the loss is least where nearly all are called red."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        rng = np.random.default_rng(5)
        lines = []
        for label in rng.permutation([0] * 200 + [1] * 20 + [2] * 20).tolist():
            word = label if rng.random() < 0.5 else int(rng.integers(CLASSES))
            others = rng.integers(CLASSES + 1, CLASSES + 4, 2).tolist()
            lines.append(" ".join(f"w{i}" for i in [word + 1, *others]) + f"\t{LABELS[label]}\n")
        self.data = folder / "lopsided.tsv"
        self.data.write_text("".join(lines))
        self.options = (
            "--data", self.data, "--eval", self.data, "--batch-size", 240, "--lr", 0.01, "--eps", 0.05, "--steps", 150,
            "--eval-every", 30, "--threads", 1,
        )  # fmt: skip
        self.runs = {name: folder / name for name in ("f1", "loss")}
        good("train", workspace.base, *self.options, "--objective", "f1", "-o", self.runs["f1"])
        good("train", workspace.base, *self.options, "--metric", "f1", "-o", self.runs["loss"])

    def f1(self, name: str, *options: object) -> float:
        words = "eval", self.runs[name], "--data", self.data, "--metric", "f1", "--json"
        return float(json.loads(good(*words, *options))["f1"])


@pytest.fixture(scope="module")
def lopsided(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Lopsided:
    return Lopsided(workspace, tmp_path_factory.mktemp("lopsided"))


def test_f1_rises_where_it_is_the_objective(lopsided: Lopsided) -> None:
    before = lopsided.f1("f1", "--step", 0)
    assert lopsided.f1("f1") > before + 0.2
    assert lopsided.f1("f1") > lopsided.f1("loss") + 0.05
    facts = json.loads(good("info", lopsided.runs["f1"], "--json"))
    assert (facts["loop"]["objective"], facts["loop"]["metric"]) == ("f1", "f1")
    assert facts["before"]["f1"] == pytest.approx(before)
    assert facts["best"]["f1"] == max(
        line["eval"]["f1"] for line in pz.Run(lopsided.runs["f1"]).metrics() if "eval" in line
    )
    assert lopsided.f1("f1", "--best") == pytest.approx(facts["best"]["f1"])
    first = next(line for line in pz.Run(lopsided.runs["f1"]).metrics() if "loss" in line)
    assert first["loss"] == pytest.approx(1 - before, abs=1e-3)
    facts = json.loads(good("info", lopsided.runs["loss"], "--json"))
    assert (facts["loop"]["objective"], facts["loop"]["metric"]) == ("loss", "f1")


def test_a_resumed_run_minimises_what_it_did(workspace: Workspace, lopsided: Lopsided, tmp_path: Path) -> None:
    shutil.copytree(lopsided.runs["f1"], tmp_path / "run")
    journal = tmp_path / "run" / "journal.pzj"
    journal.write_bytes(journal.read_bytes()[:-3000])
    good("train", "--resume", tmp_path / "run")
    assert weights_after(tmp_path / "run", tmp_path / "a") == weights_after(lopsided.runs["f1"], tmp_path / "b")
    command = "train", workspace.base, *lopsided.options, "-o", lopsided.runs["f1"]
    assert "holds a run with other settings: metric is f1 there and accuracy here; objective is f1 there" in refused(
        *command
    )
    process = pocketzo("train", "--resume", tmp_path / "run", "--objective", "f1")
    assert process.returncode == 2
    assert "--objective cannot be changed by --resume" in process.stderr


def test_lines_and_picture_show_what_is_minimised_and_the_metric(
    workspace: Workspace, lopsided: Lopsided, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = "train", workspace.base, *lopsided.options, "--objective", "f1", "--steps", 2, "--metric", "matthews"
    line = pocketzo(*words, "-o", tmp_path / "short").stderr.splitlines()[-1]
    assert re.search(r"step 2/2 · 1 - f1 0\.\d{4} · .* · evaluation at 2: matthews -?0\.\d{4}$", line)
    agg = pytest.importorskip("matplotlib.backends.backend_agg", reason="it draws the picture")
    drawn: list[Any] = []
    monkeypatch.setattr(agg.FigureCanvasAgg, "print_png", lambda canvas, file: drawn.append(canvas.figure))
    for run in (lopsided.runs["f1"], lopsided.runs["loss"], workspace.run):
        shutil.copytree(run, tmp_path / run.name)
        plot.plot_run(tmp_path / run.name)
    labels = [[axes.get_ylabel() for axes in figure.axes] for figure in drawn]
    assert labels == [["1 - f1", "evaluation f1"], ["loss", "evaluation f1"], ["loss", "evaluation accuracy"]]
    costs, values = (axes.get_lines()[-1].get_ydata() for axes in drawn[0].axes)
    np.testing.assert_allclose(costs, 1 - values)
    (best,) = (text.get_text() for text in drawn[0].axes[1].texts)
    assert best == f"{max(values):.4f}"


# ---- interrupted and resumed -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the weights of a long run."""
    folder = tmp_path_factory.mktemp("whole")
    good("train", workspace.base, *workspace.options, "-o", folder / "run", *LONG_RUN)
    return weights_after(folder / "run", folder / "tuned")


def interrupt(workspace: Workspace, run: Path, *numbers: signal.Signals, before: str = "") -> tuple[int, str, str]:
    """Train until there are some steps, send signals, each when the one before was noted; return code and output."""
    process = subprocess.Popen(
        [*program(before), "train", *workspace.words("-o", run, *LONG_RUN)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    journal = run / "journal.pzj"
    deadline = time.monotonic() + 120
    while not (journal.exists() and pz.Run(run).steps > 1):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    noted = ""
    for number in numbers:
        process.send_signal(number)
        for line in process.stderr:
            noted += line
            if "stopping after this step" in line:
                break
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, noted + errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_can_be_resumed(
    workspace: Workspace, uninterrupted: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    returned, output, errors = interrupt(workspace, run, number)
    assert returned == code, errors
    assert "Traceback" not in errors
    assert "stopping after this step" in errors
    steps = pz.Run(run).steps
    assert f"stopped after step {steps} of {LONG}; to go on: pocketzo train --resume {run}" in output
    assert 1 < steps < LONG

    process = pocketzo("train", "--resume", run)
    assert process.returncode == 0, process.stderr
    assert f"{run}: going on after step {steps} of {LONG}" in process.stderr
    assert weights_after(run, tmp_path / "tuned") == uninterrupted
    assert f"all {LONG} steps are done" in pocketzo("train", "--resume", run).stderr


def test_the_same_command_goes_on_with_a_run_that_was_killed(
    workspace: Workspace, uninterrupted: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".pocketzo-0123456789abcdef").write_bytes(b"PZ")  # what a kill at the very beginning leaves
    for _ in range(2):  # the second time the same command has already gone on once
        returned, output, _ = interrupt(workspace, run, signal.SIGKILL)
        assert (returned, output) == (-signal.SIGKILL, "")
    steps = pz.Run(run).steps
    assert 1 < steps < LONG
    left = [run / ".pocketzo-fedcba9876543210", run / "snapshots" / ".pocketzo-0123456789abcdef" / "new" / "weights"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half of a file")

    command = ["train", *workspace.words("-o", run, *LONG_RUN)]
    process = pocketzo(*command)
    assert process.returncode == 0, process.stderr
    assert f"{run}: going on after step {steps} of {LONG}" in process.stderr
    assert weights_after(run, tmp_path / "tuned") == uninterrupted
    assert not list(run.rglob(".*"))
    again = pocketzo(*command)
    assert again.returncode == 0
    assert f"{run}: all {LONG} steps are done" in again.stderr


def test_the_learning_rate_is_found_once(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("train", workspace.base, "--data", workspace.train, "-o", run, "--steps", 60, "--threads", 1)
    process = pocketzo(*command)
    assert process.returncode == 0, process.stderr
    lr = pz.Run(run).recipe.method["lr"]
    assert f"lr {lr:g}, found in " in process.stderr
    again = pocketzo(*command)
    assert again.returncode == 0, again.stderr
    assert "found in" not in again.stderr
    assert "all 60 steps are done" in again.stderr
    assert f"lr is {lr} there and 0.5 here" in refused(*command, "--lr", 0.5)
    assert "lr is 0.001 there and auto here" in refused(
        "train", workspace.base, "--data", workspace.train, "--eval", workspace.dev, "-o", workspace.run, "--steps", 60,
        "--eval-every", 20, "--threads", 1, "--group", "classifier:lr=5,eps=2",
    )  # fmt: skip
    short = pocketzo(*command[:5], tmp_path / "short", *command[6:7], 5, *command[8:])
    assert "lr 0.0005, the default: the 45 forward passes of the run are too few" in short.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch-size", "8"], "batch_size is 16 there and 8 here"),
        (["--seed", "1"], "seed is 0 there and 1 here"),
        (["--method", "mezo"], "method is fzoo there and mezo here"),
        (["--method", "momentum", "--momentum", "0.5"], "method is fzoo there and momentum here"),
        (["--method", "lozo", "--rank", "3"], "method is fzoo there and lozo here"),
        (["--trainable", "classifier"], "other weights are trained (7 there, 2 here)"),
        (["--threads", "2"], "threads is 1 there and 2 here"),
        (["--steps", "70"], "steps is 60 there and 70 here. Give"),
        (
            ["--no-prepack", "--no-group-by-length"],
            "prepacked is True there and False here; group_by_length is True there",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_settings_do_not_go_on_with_a_run(workspace: Workspace, more: list[str], said: str) -> None:
    command = ["train", *workspace.words("-o", workspace.run, "--steps", 60, "--eval-every", 20)]
    more = [*more, "--eval-every", "30"] if "--steps" in more else more
    before = (workspace.run / "journal.pzj").read_bytes()
    assert f"{workspace.run}: holds a run with other settings: {said}" in refused(*command, *more)
    assert (workspace.run / "journal.pzj").read_bytes() == before


def test_a_limit_on_memory_is_kept_or_refused(workspace: Workspace, tmp_path: Path) -> None:
    data = "--data", workspace.train, "--steps", 2
    good("train", workspace.base, *data, "-o", tmp_path / "run", "--max-memory", "2 GiB")
    assert not (tmp_path / "run" / "loss.png").exists()
    assert "the limit is 2 MB" in refused("train", "--resume", tmp_path / "run", "--max-memory", "2M")
    hidden = "from pathlib import Path\nimport pocketzo.machine.memory\npocketzo.machine.memory._STATM = Path('/none')"
    line = refused("train", workspace.base, *data, "-o", tmp_path / "new", "--max-memory", "2G", before=hidden)
    assert "the memory limit cannot be enforced: the memory in use cannot be read" in line
    assert not (tmp_path / "new").exists()


def test_a_limit_too_small_for_the_first_step_leaves_no_run(workspace: Workspace, tmp_path: Path) -> None:
    command = "train", workspace.base, "--data", workspace.train, "--steps", 2, "--threads", 1, "-o", tmp_path / "run"
    full = "import pocketzo\npocketzo.Model._reserve = lambda model, shape: 2 * 10**9"
    process = pocketzo(*command, "--max-memory", "2G", before=full)
    assert process.returncode == 1
    assert "was stopped" in process.stderr
    assert re.search(r"allow more \(the longest example has 6 tokens: .*train.tsv, line \d+\)", process.stderr)
    assert "Stopped before the first step, so that there is no journal" in process.stderr
    good(*command, "--batch-size", 4)


def test_going_on_without_prepacked_weights_warns(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.run, tmp_path / "run")
    not_prepackable = "from pocketzo.errors import NotPrepackableError\nfrom pocketzo.runtime import loader\n"
    not_prepackable += "def refuse(bundle):\n  raise NotPrepackableError('no room')\nloader.plan_prepacking = refuse"
    process = pocketzo("train", "--resume", tmp_path / "run", before=not_prepackable)
    assert process.returncode == 0
    assert "goes on with weights that are not prepacked (no room), unlike its journal" in " ".join(
        process.stderr.split()
    )


def test_a_second_signal_ends_at_once_and_the_run_can_be_resumed(
    workspace: Workspace, uninterrupted: str, tmp_path: Path
) -> None:
    # After the first signal no step ends, so that the second one, however late, comes in the middle of it.
    endless = "import time, pocketzo\nfrom pocketzo.cli import progress\nloss = pocketzo.Model.loss\n"
    endless += "stopping = lambda: any(s.received for s in alive)\nalive = []\nenter = progress._Signals.__enter__\n"
    endless += "progress._Signals.__enter__ = lambda s: (alive.append(s), enter(s))[1]\n"
    endless += "pocketzo.Model.loss = lambda model, batch: (time.sleep(60 * stopping() + 0.01), loss(model, batch))[1]"
    returned, output, errors = interrupt(workspace, tmp_path / "run", signal.SIGTERM, signal.SIGTERM, before=endless)
    assert returned == 143
    assert "ended at once; to go on: pocketzo train --resume" in errors
    assert output == ""
    assert "Traceback" not in errors
    good("train", "--resume", tmp_path / "run")
    assert weights_after(tmp_path / "run", tmp_path / "tuned") == uninterrupted


def test_a_signal_after_the_last_step_changes_nothing_more(workspace: Workspace, tmp_path: Path) -> None:
    late = "import os, signal\nfrom pocketzo.cli import train\nsummary = train._print_summary\n"
    late += "again = lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(3)]\n"
    late += "train._print_summary = lambda *given: (again(), summary(*given))"
    returned, output, errors = interrupt(workspace, tmp_path / "run", signal.SIGTERM, before=late)
    assert returned == 143, errors
    assert "to go on: pocketzo train --resume" in output


def test_resume_tells_of_a_torn_record_and_finds_moved_files(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("base", "train.tsv", "dev.tsv"):
        (tmp_path / name).symlink_to(workspace.base.parent / name)
    options = ("--data", "train.tsv", "--eval", "dev.tsv", "--threads", 1, "--steps", 30, "--lr", 1e-3)
    (tmp_path / "old").mkdir()
    copy = tmp_path / "old" / "train.tsv"
    copy.write_bytes(workspace.train.read_bytes())
    good("train", "base", "-o", "run", *options, "--data", copy, cwd=tmp_path)
    expected = weights_after(tmp_path / "run", tmp_path / "first")
    journal = tmp_path / "run" / "journal.pzj"
    data = journal.read_bytes()
    journal.write_bytes(data[: -108 * 10 - 7])  # ten steps of eight directions, and a part of one
    copy.unlink()

    assert "No such file" in refused("train", "--resume", "run", cwd=tmp_path)
    process = pocketzo("train", "--resume", "run", "--data", "train.tsv", "base", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("are an incomplete entry and were dropped") == 1
    assert "going on after step 19 of 30" in process.stderr
    assert weights_after(tmp_path / "run", tmp_path / "second") == expected


# ---- progress --------------------------------------------------------------------------------------------------------

LINE = r"step \d+/60 · loss \d+\.\d{4} · [\d.]+ (steps/s|s/step) · \d[\d.]* MB, peak \d[\d.]* MB · \d+:\d\d left"


def test_plain_lines_where_there_is_no_terminal(workspace: Workspace, tmp_path: Path) -> None:
    arguments = ("train", workspace.base, *workspace.options, "-o", tmp_path / "run", "--steps", 60, "--eval-every", 30)
    process = pocketzo(*arguments)
    assert "\x1b" not in process.stderr + process.stdout
    lines = [line for line in process.stderr.splitlines() if line.startswith("step")]
    assert len(lines) == 2, "one for each evaluation"
    for line in lines:
        assert re.fullmatch(LINE + r" · evaluation at \d+: accuracy [\d.]+ %", line), line
    assert lines[-1].startswith("step 60/60")


@pytest.mark.parametrize("columns", [40, 120])
def test_a_live_display_on_a_terminal(workspace: Workspace, tmp_path: Path, columns: int) -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*program(), "train", *workspace.words("-o", tmp_path / "run", "--steps", 60)],
        stdout=subprocess.DEVNULL,
        stderr=child,
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns)},
    )
    os.close(child)
    shown = b""
    while select.select([parent], [], [], 120)[0]:
        try:
            data = os.read(parent, 4096)
        except OSError:  # the end, on Linux
            break
        if not data:
            break
        shown += data
    os.close(parent)
    assert process.wait(120) == 0
    text = shown.decode()
    assert "\x1b[?25l" in text, "the cursor is hidden while the display lives"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"
    plain = re.sub(r"\s+", " ", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text))
    assert re.search(LINE.replace(r"\d+/60", "60/60"), plain), plain[-2000:]
    assert "━" in plain


def test_the_picture(workspace: Workspace) -> None:
    pytest.importorskip("matplotlib", reason="it draws the picture")
    assert (workspace.run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_training_says_so_once(workspace: Workspace, tmp_path: Path) -> None:
    arguments = ("train", workspace.base, *workspace.options, "-o", tmp_path / "run", "--steps", 2)
    process = pocketzo(*arguments, before="sys.modules['matplotlib'] = None")
    assert process.returncode == 0
    assert process.stderr.count("pip install 'pocketzo[plot]'") == 1
    assert not (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("tokenizers", "text", ["train", "{base}", "--data", "{train}", "-o", "new"]),
        ("onnx", "prepare", ["prepare", "{model}", "-o", "new"]),
    ],
)
def test_a_missing_extra(workspace: Workspace, tmp_path: Path, package: str, extra: str, arguments: list[str]) -> None:
    words = [argument.format(**vars(workspace)) for argument in arguments]
    line = refused(*words, cwd=tmp_path, before=f"sys.modules[{package!r}] = None")
    assert f"pip install 'pocketzo[{extra}]'" in line
    assert not list(tmp_path.iterdir())


def test_smoothing() -> None:
    np.testing.assert_allclose(plot.smooth(np.full(50, 3.0)), 3.0)
    smooth = plot.smooth(np.array([np.nan, 4.0, np.nan, 2.0]), weight=0.5)
    np.testing.assert_allclose(smooth, [np.nan, 4, 4, (0.5 * 4 + 2) / 1.5])


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor() -> None:
    facts = json.loads(good("doctor", "--json"))
    assert facts["ok"] is True
    assert facts["pocketzo"] == pz.__version__
    assert facts["numpy"] == np.__version__
    assert facts["isa"] in facts["available"]
    assert set(facts["self_test"]) == set(pz.kernels.available())
    assert 1 <= facts["cores"]["usable"] <= facts["cores"]["present"]
    assert facts["memory"]["total"] > facts["memory"]["available"] > 0
    assert all(0 < time < 1000 for times in facts["speed"].values() for time in times.values())
    text = good("doctor")
    for name in facts["available"]:
        assert f"{name} passed" in text
    assert "can be prepacked, in blocks of 256 rows" in text


def test_where_weights_cannot_be_prepacked_everyone_says_why(workspace: Workspace, tmp_path: Path) -> None:
    # As on a phone whose onnxruntime came without protobuf.
    without = "import sys\nsys.modules['google.protobuf'] = None"
    reason = "the Python package protobuf is not installed"
    assert f"not prepacked: {reason}" in pocketzo("doctor", before=without).stdout  # exit code 1: onnx needs it too
    assert f"not prepacked: {reason}" in good("info", workspace.base, before=without)
    process = pocketzo("train", *workspace.words("--steps", 2, "-o", tmp_path / "run"), before=without)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count(reason) == 1
    assert "plain weights" in process.stderr


def test_threads_are_chosen_by_timing_and_recorded_unless_they_are_given(workspace: Workspace, tmp_path: Path) -> None:
    three_cores = (
        "import atexit, sys\n"
        "from pocketzo import kernels\nfrom pocketzo.machine import cores\n"
        "cores.usable = lambda: [0, 1, 2]\n"
        "kernels.set_threads(3)\n"
        "atexit.register(lambda: print('kernels have', kernels.threads(), file=sys.stderr))"
    )
    words = ("--data", workspace.train, "--steps", 3, "--method", "mezo")
    timed = pocketzo("train", workspace.base, *words, "-o", tmp_path / "timed", before=three_cores)
    assert timed.returncode == 0, timed.stderr
    recorded = json.loads(good("info", tmp_path / "timed", "--json"))["session"]
    seconds = {int(count): time for count, time in recorded["forward_seconds"].items()}
    assert list(seconds) == [1, 2, 3]
    assert seconds[recorded["threads"]] <= 1.05 * min(seconds.values())
    count = recorded["threads"]
    assert re.search(rf"{count} threads? \(1: \S+ m?s, 2: \S+ m?s, 3: \S+ m?s a forward\)", timed.stderr)
    assert "kernels have 3" in timed.stderr
    given = pocketzo("train", workspace.base, *words, "-o", tmp_path / "given", "--threads", 2, before=three_cores)
    assert given.returncode == 0, given.stderr
    recorded = json.loads(good("info", tmp_path / "given", "--json"))["session"]
    assert (recorded["threads"], recorded["forward_seconds"]) == (2, None)
    assert "2 threads\n" in given.stderr
    assert "kernels have 2" in given.stderr
    # Slow cores help the kernels, whatever is best for forwards: only what the user gave holds for both.
    for run, kernels in (("timed", 3), ("given", 2)):
        resumed = pocketzo("train", "--resume", tmp_path / run, before=three_cores)
        assert f"kernels have {kernels}" in resumed.stderr


def test_a_run_goes_on_as_it_began_prepacked_or_not(workspace: Workspace, tmp_path: Path) -> None:
    for name, options in (("prepacked", ["--prepack"]), ("plain", ["--no-prepack"])):
        run = tmp_path / name
        good("train", *workspace.words("--steps", 4, "-o", run), *options)
        assert json.loads(good("info", run, "--json"))["session"]["prepacked"] is (name == "prepacked")
    past = pz.Run(tmp_path / "plain")
    data = [pz.load_dataset(path, past.base()) for path in (workspace.train, workspace.dev)]
    trainer = pz.Trainer.resume(past.path, data[0], eval=data[1])
    assert not trainer.model.prepacked
    trainer.fit()  # ends at once, and closes the record


def test_doctor_finds_kernels_that_are_wrong() -> None:
    spoil = "import pocketzo.doctor\npocketzo.doctor.ANSWERS['rademacher, far'] ^= 1"
    process = pocketzo("doctor", before=spoil)
    assert process.returncode == 1
    assert "FAILED" in process.stdout
    assert "the kernels failed their self-test: " in process.stderr
    assert "scalar (rademacher, far)" in process.stderr


def test_the_known_answers_are_those_of_the_reference() -> None:
    near, far = (20250101, 0x5EED, 41), (0x0123456789ABCDEF, 0xDEADBEEF, 1 << 32)
    count = 1 << 16
    start = reference.normal(*near, 0, count)

    def stepped(kind: reference.Distribution) -> reference.F32:
        terms = [reference.Term(near[0], 42, (1e-3,), 1e-2, kind), reference.Term(near[0], 43, (-2e-3,), 0.0, kind)]
        return reference.apply(start, terms, tensor=near[1])

    def halves() -> NDArray[np.uint16]:
        terms = [
            reference.Term(near[0], 42, (1e-3,), 1e-2, "gaussian", "stochastic"),
            reference.Term(near[0], 43, (-2e-3,), 0.0, "gaussian"),
        ]
        return reference.apply16(reference.nearest(start, "float16"), terms, storage="float16", tensor=near[1])

    streams: dict[str, Callable[[], NDArray[Any]]] = {
        "normal": lambda: start,
        "normal, far": lambda: reference.normal(*far, 17179344875, count),
        "rademacher": lambda: reference.rademacher(*near, 0, count),
        "rademacher, far": lambda: reference.rademacher(*far, 549755682795, count),
        "step, normal": lambda: stepped("gaussian"),
        "step, rademacher": lambda: stepped("rademacher"),
        "step, fp16": halves,
    }
    assert {name: doctor._crc(make()) for name, make in streams.items()} == doctor.ANSWERS


def test_process_memory_is_this_process() -> None:
    resident, peak = memory.process_memory()
    assert resident is not None
    assert peak is not None
    ballast = np.ones(20_000_000)  # 160 MB
    more, higher = memory.process_memory()
    assert more is not None
    assert higher is not None
    assert more > resident + 0.9 * ballast.nbytes
    assert higher >= more
    del ballast


# ---- what a run guarantees -------------------------------------------------------------------------------------------


def test_a_run_that_ruins_the_model_says_so(workspace: Workspace, tmp_path: Path) -> None:
    for more in ((), ("--eval", workspace.dev)):
        run = tmp_path / f"run{len(more)}"
        words = ("--data", workspace.train, *more, "--steps", 60, "--threads", 1, "--lr", 1e6, "--method", "mezo")
        process = pocketzo("train", workspace.base, *words, "-o", run)
        assert process.returncode == 0, process.stderr
        assert re.search(r"^loss( of some training examples)? rose: from ", process.stdout, re.MULTILINE)
        assert re.search(r"^try: a tenth of the lr, --lr 100000.*: .*loss.* got worse$", process.stdout, re.MULTILINE)
        replay = pocketzo("replay", run, "-o", tmp_path / f"tuned{len(more)}")
        assert "note: the weights after step 60 are worse than those before the run: " in replay.stderr
        assert replay.returncode == 0


def test_best_needs_an_evaluation(workspace: Workspace, tmp_path: Path) -> None:
    words = ("--data", workspace.train, "--steps", 2, "--threads", 1, "-o", tmp_path / "run")
    good("train", workspace.base, *words)
    line = refused("replay", tmp_path / "run", "--best", "-o", tmp_path / "out")
    assert "--best chooses by evaluations, and the run has none with a finite value" in line
    assert not (tmp_path / "out").exists()


def test_training_says_beforehand_what_it_will_take(workspace: Workspace, tmp_path: Path) -> None:
    process = pocketzo("train", *workspace.words("--steps", 2, "-o", tmp_path / "run"))
    assert re.search(
        r"^the longest example has 6 tokens \(.*train.tsv, line \d+\); a forward pass of the largest batch takes "
        r"[\d.]+ m?s, peak memory [\d.]+ MB\n2 steps of 9 forward passes and 2 evaluations will take .+$",
        process.stderr,
        re.MULTILINE,
    )
