"""The commands on language models: prepare, eval, train, resume and replay, for each task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_cli import good, pocketzo, refused
from test_decoders import FLOATS
from test_language_tasks import CHATML, CHOICES, COMPLETIONS, END, PROMPTS, lines, words, write_tokenizer

import pocketzo as pz

pytest.importorskip("click", reason="the command line needs it")
pytest.importorskip("rich", reason="the command line needs it")
pytest.importorskip("tokenizers", reason="the data is text")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return FLOATS["llama"](tmp_path / "m.onnx")


def trained(tmp_path: Path, data: Path, *options: object) -> str:
    """Train a bundle named base for 4 steps, resume, replay and evaluate; return what train wrote."""
    run, settings = tmp_path / "run", ("--steps", 4, "--batch-size", 3, "--lr", "1e-3", *options)
    process = pocketzo("train", tmp_path / "base", "--data", data, "-o", run, *settings)
    assert process.returncode == 0, process.stderr
    achieved, _, _ = process.stdout.partition(f"{run}: 4 steps, journal of ")
    assert len(achieved) < len(process.stdout)
    assert good("info", run).endswith(achieved)  # in the same words
    assert "all 4 steps are done" in pocketzo("train", "--resume", run).stderr
    good("replay", run, "-o", tmp_path / "tuned")
    after = good("eval", run, "--data", data, "--json")
    assert json.loads(after) == json.loads(good("eval", tmp_path / "tuned", "--data", data, "--json"))
    assert json.loads(after) != json.loads(good("eval", tmp_path / "base", "--data", data, "--json"))
    return process.stdout + process.stderr


def test_a_run_begins_from_an_adapter(model: Path, tmp_path: Path) -> None:
    """Trained once, written for PEFT, and trained on from there; the second run needs the adapter no longer."""
    good("prepare", model, "-o", tmp_path / "base", "--task", "causal-lm", "--max-length", 8, "--train", "lora:r=2")
    data = lines(tmp_path / "d.jsonl", *COMPLETIONS)
    trained(tmp_path, data, "--eps", "1e-2")
    adapter, second = tmp_path / "peft", tmp_path / "second"
    assert f"{adapter}: {tmp_path / 'run'} as an adapter for peft" in good(
        "adapter", tmp_path / "run", "-o", adapter, "--format", "peft"
    )
    command = ("train", tmp_path / "base", "--data", data, "-o", second, "--steps", 2, "--lr", "1e-3", "--eps", "1e-2")
    process = pocketzo(*command, "--init", adapter)
    assert process.returncode == 0, process.stderr
    assert f"{adapter}: begins from 8 tensors of this adapter" in process.stderr
    assert "all 2 steps are done" in pocketzo(*command, "--init", adapter).stderr
    assert "it began from an adapter there, and from none here" in refused(*command)
    good("replay", second, "-o", tmp_path / "begun", "--step", 0)
    before, after = (pz.Bundle.read(tmp_path / name).weights_path.read_bytes() for name in ("tuned", "begun"))
    assert before == after
    (adapter / "adapter_config.json").unlink()
    assert "all 2 steps are done" in pocketzo("train", "--resume", second).stderr
    assert "config.json: no such file" in refused(*command[:4], "-o", tmp_path / "third", "--init", adapter)


def test_causal_lm(model: Path, tmp_path: Path) -> None:
    good("prepare", model, "-o", tmp_path / "base", "--task", "causal-lm", "--max-length", 8)
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    data = lines(tmp_path / "d.jsonl", *COMPLETIONS, {"messages": chat})
    small = ("--activation-memory", "0.02M")
    said = trained(tmp_path, data, "--eval", data, *small)
    assert "perplexity" in said
    assert "zero-shot" not in said  # a perplexity is no answer
    assert pz.Run(tmp_path / "run").recipe.loop.activation_memory == 20_000
    parts, whole = (
        json.loads(good("eval", tmp_path / "base", "--data", data, "--json", *options)) for options in (small, ())
    )
    assert parts == pytest.approx(whole, rel=1e-5)
    assert list(whole) == ["perplexity", "loss", "count"]
    (tmp_path / "d.txt").write_text(words(*range(1, 30)))
    assert json.loads(good("eval", tmp_path / "base", "--data", tmp_path / "d.txt", "--json"))["count"] == 4
    long = lines(tmp_path / "long.jsonl", COMPLETIONS[0], {"prompt": words(*range(1, 9)), "completion": " w9"})
    assert "long.jsonl, line 2: 10 tokens, and the model takes at most 8" in refused(
        "eval", tmp_path / "base", "--data", long
    )


def test_another_activation_memory_is_another_run(model: Path, tmp_path: Path) -> None:
    good("prepare", model, "-o", tmp_path / "base", "--task", "causal-lm")
    data = lines(tmp_path / "d.jsonl", *COMPLETIONS)
    command = ("train", tmp_path / "base", "--data", data, "-o", tmp_path / "run", "--steps", 2)
    good(*command, "--activation-memory", "1M")
    assert "activation_memory is 1000000 there and None here" in refused(*command)
    process = pocketzo("train", "--resume", tmp_path / "run", "--activation-memory", "2M")
    assert (process.returncode, "--activation-memory cannot be changed by --resume" in process.stderr) == (2, True)


def test_choice(model: Path, tmp_path: Path) -> None:
    good("prepare", model, "-o", tmp_path / "base", "--task", "choice", "--per", "token")
    data = lines(tmp_path / "d.jsonl", *CHOICES)
    said = trained(tmp_path, data, "--eval", data)
    assert re.search(r"zero-shot: accuracy [0-9.]+ %, loss [0-9.]+\n", said)
    assert re.search(r"^ +zero-shot +after step 4", said, re.MULTILINE)


def test_prompt(model: Path, tmp_path: Path) -> None:
    good(
        "prepare", model, "-o", tmp_path / "base", "--task", "prompt", "--label-words", "w10,w11", "--labels", "no,yes",
        "--template", r"w20 {text}\nw21", "--max-length", 8,
    )  # fmt: skip
    data = lines(tmp_path / "d.jsonl", *PROMPTS)
    said = trained(tmp_path, data, "--objective", "loss")
    assert re.search(r"zero-shot on some training examples: accuracy [0-9.]+ %, loss [0-9.]+\n", said)
    assert "1 of 5 texts were cut to 8 tokens" in said

    templates = tmp_path / "templates.txt"
    templates.write_text("w20 {text}\\nw21\n\nw22 [b]w23[/b] {text} w24 w25\n")
    table = good("eval", tmp_path / "base", "--data", data, "--templates", templates).splitlines()
    assert table[0].split() == ["template", "accuracy", "loss"]
    assert [line.rsplit(None, 3)[0].strip() for line in table[1:]] == [
        r"w20 {text}\nw21",
        "w22 [b]w23[/b] {text} w24 w25",
    ]
    rows = [
        json.loads(line)
        for line in good("eval", tmp_path / "base", "--data", data, "--templates", templates, "--json").splitlines()
    ]
    own = json.loads(good("eval", tmp_path / "base", "--data", data, "--json"))
    assert rows[0] == {"template": r"w20 {text}\nw21"} | own
    assert rows[1]["loss"] != own["loss"]
    templates.write_text("{text} {mask}\n")
    assert "templates.txt, template 1: the template '{text} {mask}' has a {mask}, unlike the bundle's" in refused(
        "eval", tmp_path / "base", "--data", data, "--templates", templates
    )
    templates.write_text("\n")
    assert "templates.txt: no templates" in refused("eval", tmp_path / "base", "--data", data, "--templates", templates)
