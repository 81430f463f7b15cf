"""``pocketzo generate``: of a bundle, of a run at any step, and of both side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_cli import good, pocketzo, refused
from test_decoders import FLOATS, Sentences
from test_generate import with_generation

import pocketzo as pz
from pocketzo.runtime.generate import Generator

pytest.importorskip("jinja2", reason="chat templates are Jinja")
STEPS = 6


@dataclass
class Tuned:
    base: Path
    run: Path
    replayed: Path
    plain: Path

    def text(self, folder: Path, prompt: str = "ab", **settings: Any) -> str:
        settings = {"max_tokens": 12} | settings
        return "".join(Generator(pz.Bundle.read(folder), threads=1).stream(prompt, **settings))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A run whose steps are large enough to change the text."""
    folder = tmp_path_factory.mktemp("tuned")
    source = FLOATS["llama"](folder / "m.onnx")
    plain = pz.prepare(source, folder / "plain", loss="none")
    made = Tuned(folder / "base", folder / "run", folder / "replayed", plain.path)
    bundle = with_generation(source, made.base, graph=plain.model_path, loss=None)
    model = pz.load(bundle, threads=1)
    data = pz.load_dataset(Sentences().save(folder / "data.npz"), bundle)
    pz.Trainer(
        model, pz.MeZO(model, lr=3e-3, seed=4), data, steps=STEPS, batch_size=4, eval=data, eval_every=3, run=made.run
    ).fit()
    pz.Run(made.run).replay(made.replayed)
    assert made.text(made.base) != made.text(made.replayed)
    return made


SHORT = ("--max-tokens", 12, "--threads", 1)


def test_a_bundle_continues_a_text(tuned: Tuned) -> None:
    process = pocketzo("generate", tuned.base, "--prompt", "ab", *SHORT)
    assert process.stdout == tuned.text(tuned.base) + "\n"
    assert process.stderr.startswith("12 tokens after 2 of the prompt, in ")
    assert process.stderr.endswith("; ended by --max-tokens\n")
    drawn = good("generate", tuned.base, "--prompt", "ab", *SHORT, "--temperature", 4, "--top-p", 0.9, "--seed", 5)
    assert drawn == tuned.text(tuned.base, temperature=4.0, top_p=0.9, seed=5) + "\n" != process.stdout


def test_a_run_speaks_as_after_any_of_its_steps(tuned: Tuned, tmp_path: Path) -> None:
    assert good("generate", tuned.run, "--prompt", "ab", *SHORT) == tuned.text(tuned.replayed) + "\n"
    assert good("generate", tuned.run, "--prompt", "ab", "--step", 0, *SHORT) == tuned.text(tuned.base) + "\n"
    best = pz.Run(tuned.run).best_step
    assert best is not None
    pz.Run(tuned.run).replay(tmp_path / "best", step=best)
    assert good("generate", tuned.run, "--prompt", "ab", "--best", *SHORT) == tuned.text(tmp_path / "best") + "\n"
    pz.Run(tuned.run).replay(tmp_path / "third", step=3)
    third = good("generate", tuned.run, "--prompt", "ab", "--step", 3, *SHORT)
    assert third == tuned.text(tmp_path / "third") + "\n"


def test_base_and_tuned_side_by_side(tuned: Tuned) -> None:
    texts = tuned.text(tuned.base), tuned.text(tuned.replayed)
    for arguments in ([tuned.run], [tuned.replayed, "--base", tuned.base]):
        table = good("generate", *arguments, "--prompt", "ab", "--compare", *SHORT)
        (row,) = [line for line in table.splitlines() if texts[0].split()[0] in line]
        assert row.index(texts[0].strip()) < row.index(texts[1].strip())
        assert table.index("base") < table.index("tuned" if arguments[0] == tuned.replayed else f"after step {STEPS}")
    same = pocketzo("generate", tuned.run, "--prompt", "ab", "--compare", "--step", 0, *SHORT)
    assert "note: both say the same" in same.stderr


def test_a_chat_is_rendered_by_the_models_template(tuned: Tuned) -> None:
    bundle = pz.Bundle.read(tuned.base)
    text = pz.chat_text(bundle, [{"role": "user", "content": "ab"}])
    assert text == "<s>ab a"
    expected = tuned.text(tuned.base, text, special_tokens=False)
    assert good("generate", tuned.base, "--prompt", "ab", "--chat", *SHORT) == expected + "\n"


def test_what_cannot_be_generated(tuned: Tuned, tmp_path: Path) -> None:
    assert "there is no generate.onnx in the bundle" in refused("generate", tuned.plain, "--prompt", "ab")
    assert "the prompt has no tokens" in refused("generate", tuned.base, "--prompt", "")
    line = refused("generate", tuned.plain, "--prompt", "ab", "--chat")
    assert "the bundle has no chat template: prepare the model with chat_template.jinja" in line
    other = with_generation(FLOATS["qwen3"](tmp_path / "m.onnx"), tmp_path / "other").path
    line = refused("generate", tuned.replayed, "--base", other, "--compare", "--prompt", "ab")
    assert "not the base of" in line
    for arguments in ([tuned.base, "--step", 1], [tuned.base, "--compare"], [tuned.base, "--base", tuned.base]):
        process = pocketzo("generate", *arguments, "--prompt", "ab")
        assert process.returncode == 2
        assert "is a bundle" in process.stderr
    line = refused("generate", tuned.base, "--prompt", "ab", "--chat", before="sys.modules['jinja2'] = None")
    assert "pip install 'pocketzo[text]'" in line
