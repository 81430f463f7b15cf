"""Exact match: the completions that a model generates for the prompts of a dataset."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import good, pocketzo, refused
from test_generate import recomputed
from test_language_tasks import CHATML, END, MODES, PROMPT, PROMPTS, START, lines, prepared

import pocketzo as pz
from pocketzo.data.load import load_dataset

pytest.importorskip("click", reason="the command line needs it")
pytest.importorskip("rich", reason="the command line needs it")
pytest.importorskip("tokenizers", reason="the data is text")

GIVEN = [[3, 14, 15, 9, 26, 5], [7, 8], [21]]


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Continue a prompt by the export, in plain onnxruntime."""
    ids = recomputed(folder / "m.onnx", prompt, count)
    assert not {START, END} & {*ids}, "special tokens have no text"
    return ids


def words(*ids: int) -> str:
    """Return the text of tokens, two of which are called by names."""
    return " ".join({30: "user", 31: "assistant"}.get(number, f"w{number}") for number in ids)


def records(folder: Path, *counts: int) -> list[dict[str, str]]:
    """Return prompts, each with as many tokens as the export would generate."""
    return [
        {"prompt": words(*prompt), "completion": f" {words(*greedy(folder, prompt, count))}"}
        for prompt, count in zip(GIVEN, counts, strict=True)
    ]


def model_of(bundle: pz.Bundle) -> pz.Model:
    return pz.load(bundle, threads=1, prepack=False)


def test_the_share_of_prompts_that_the_model_completes(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    right = records(tmp_path, 3, 1, 4)
    wrong = {"prompt": right[0]["prompt"], "completion": right[0]["completion"].rsplit(" ", 1)[0] + " w1"}
    data = load_dataset(lines(tmp_path / "d.jsonl", right[0], wrong, {"text": "w1 w2 w3"}, *right[1:]), bundle)
    assert data.prompted is not None
    assert data.prompted.tolist() == [True, True, False, True, True]
    model = model_of(bundle)
    assert pz.exact_match(model, data) == 3 / 4
    found = list(pz.complete(model, data))
    assert [one.matches for one in found] == [True, False, True, True]
    assert found[1] == (wrong["prompt"], wrong["completion"].strip(), right[0]["completion"].strip(), True)
    assert pz.exact_match(model, data, max_tokens=2) == 0  # of one token too many, or cut
    assert pz.exact_match(pz.load(bundle, threads=1), data) == 3 / 4  # prepacked
    model.weights["model.norm.weight"] = -model.weights["model.norm.weight"]
    assert pz.exact_match(model, data) == 0


def test_a_completion_ends_at_the_end_token(tmp_path: Path) -> None:
    prepared(tmp_path, "causal-lm")
    three = greedy(tmp_path, GIVEN[0], 3)
    assert three[2] not in three[:2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": three[2]}))
    bundle = pz.prepare(tmp_path / "m.onnx", tmp_path / "ends", task="causal-lm")
    texts = [words(*three[:count]) for count in (1, 2, 3)]
    data = load_dataset(
        lines(tmp_path / "d.jsonl", *({"prompt": words(*GIVEN[0]), "completion": f" {text}"} for text in texts)), bundle
    )
    found = list(pz.complete(model_of(bundle), data, max_tokens=9))
    assert [one.got for one in found] == [texts[1]] * 3
    assert [one.matches for one in found] == [False, True, True]  # what follows an end token does not count
    assert [one.matches for one in pz.complete(model_of(bundle), data)] == [False, True, True]
    unended = list(pz.complete(model_of(bundle), data, max_tokens=2))
    assert [one.got for one in unended] == [texts[1]] * 3
    assert not any(one.ended or one.matches for one in unended)  # the text might go on


def test_the_prompt_is_that_of_training(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", MODES[2])
    (expected,) = [greedy(tmp_path, [START, *GIVEN[1]], 2)]
    record = {"prompt": words(*GIVEN[1]), "completion": f" {words(*expected)}"}
    data = load_dataset(lines(tmp_path / "d.jsonl", record), bundle)
    assert pz.exact_match(model_of(bundle), data) == 1


def test_a_chat_is_completed_by_its_last_answer(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", chat=CHATML)
    chat = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4 w5"), ("assistant", "w6 w7")]
    messages = [{"role": role, "content": content} for role, content in chat]
    data = load_dataset(lines(tmp_path / "d.jsonl", {"messages": messages}), bundle)
    prompt = "user w1 w9 assistant w2 w3 w9 user w4 w5 w9 assistant"
    ids = [30, 1, 9, 31, 2, 3, 9, 30, 4, 5, 9, 31]
    (found,) = pz.complete(model_of(bundle), data)
    assert (found.prompt, found.expected) == (prompt, "w6 w7 w9")
    assert found.got == words(*greedy(tmp_path, ids, 3))


def test_what_cannot_be_completed(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    texts = load_dataset(lines(tmp_path / "t.jsonl", {"text": "w1 w2"}), bundle)
    with pytest.raises(pz.TrainingError, match="no example has a prompt to complete: give lines with 'prompt'"):
        pz.complete(model_of(bundle), texts)
    data = load_dataset(lines(tmp_path / "d.jsonl", {"prompt": "w1", "completion": " w2"}), bundle)
    with pytest.raises(ValueError, match="max_tokens must be"):
        pz.complete(model_of(bundle), data, max_tokens=0)
    bundle.generate_path.unlink()
    replace(bundle, generation=None).write_description()
    with pytest.raises(pz.BundleError, match=r"base: there is no generate.onnx in the bundle"):
        pz.complete(model_of(pz.Bundle.read(bundle.path)), data)
    other = pz.prepare(tmp_path / "m.onnx", tmp_path / "prompted", task="prompt", **PROMPT)
    prompts = load_dataset(lines(tmp_path / "p.jsonl", *PROMPTS), other)
    with pytest.raises(pz.TrainingError, match=r"for the task 'causal-lm', and the bundle's is 'prompt'"):
        pz.complete(model_of(other), prompts)


def test_the_arrays_of_a_file_say_what_the_prompt_is(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm")
    ids = np.array([[7, 8, *greedy(tmp_path, GIVEN[1], 2)]])
    np.savez(tmp_path / "d.npz", input_ids=ids, labels=np.where(np.arange(4) < 2, -100, ids))
    assert pz.exact_match(model_of(bundle), load_dataset(tmp_path / "d.npz", bundle)) == 1


def test_the_command(tmp_path: Path) -> None:
    prepared(tmp_path, "causal-lm")
    first, *others = records(tmp_path, 3, 1, 4)
    wrong = {"prompt": "w1\nw2", "completion": " w3 w4"}
    data = lines(tmp_path / "d.jsonl", first, wrong, {"text": "w1 w2 w3"}, *others)
    command = "eval", tmp_path / "base", "--data", data, "--generate"
    said = good(*command).splitlines()
    assert re.fullmatch(r"perplexity [\d.]+ · loss [\d.]+ · exact-match 75.0 % of 4 prompts · 5 examples", said[0])
    assert said[1].split() == ["prompt", "expected", "got"]
    assert re.split("  +", said[2].strip()) == [first["prompt"], *[first["completion"].strip()] * 2]
    assert len(said) == 5
    values = json.loads(good(*command, "--json"))
    assert (values["exact-match"], values["prompts"], values["count"]) == (0.75, 4, 5)
    plain = json.loads(good("eval", tmp_path / "base", "--data", data, "--json"))
    assert list(values) == ["perplexity", "loss", "exact-match", "prompts", "count"]
    assert values["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert json.loads(good(*command, "--json", "--max-tokens", 5))["exact-match"] == 0

    good("train", tmp_path / "base", "--data", data, "-o", tmp_path / "run", "--steps", 3, "--lr", "0.1")
    tuned = json.loads(good("eval", tmp_path / "run", "--data", data, "--generate", "--json"))
    good("replay", tmp_path / "run", "-o", tmp_path / "tuned")
    assert tuned == json.loads(good("eval", tmp_path / "tuned", "--data", data, "--generate", "--json"))
    assert tuned["loss"] != values["loss"]
    assert "--max-tokens needs --generate" in pocketzo(*command[:4], "--max-tokens", 3).stderr
    texts = lines(tmp_path / "t.jsonl", {"text": "w1 w2"})
    assert "no example has a prompt to complete" in refused("eval", tmp_path / "base", "--data", texts, "--generate")
