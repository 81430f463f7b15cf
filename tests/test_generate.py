"""Generated text: what plain onnxruntime gives without a cache, piece by piece, with live weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoders import VOCABULARY
from test_decoders import FLOATS, batch_of, plain

import pocketzo as pz
from pocketzo.formats.bundle import TOKENIZER
from pocketzo.formats.generation import CHAT_TEMPLATE, Generation
from pocketzo.formats.safetensors import file_sha256
from pocketzo.runtime.generate import Generator

tokenizers = pytest.importorskip("tokenizers", reason="prompts are text")
pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")  # where a graph has branches

CHAT = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}{% if add_generation_prompt %} a{% endif %}"


# ---- bundles ---------------------------------------------------------------------------------------------------------


def byte_tokenizer(path: Path) -> None:
    """Write a byte-level tokenizer of 40 tokens: two special ones, letters, and the bytes of some longer characters."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    of_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é€😀 ,.")
    wanted = [*"abcdefghijklmnopqrstuvwxyz", *dict.fromkeys("".join(text for text, _ in of_bytes))]
    assert set(wanted) <= set(alphabet)
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *wanted][:VOCABULARY])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))


def with_generation(
    source: Path, folder: Path, *, eos: Sequence[int] = (), graph: Path | None = None, **options: Any
) -> pz.Bundle:
    """Prepare a decoder as it is, and let the same graph generate."""
    byte_tokenizer(folder.parent / TOKENIZER)
    bundle = pz.prepare(source, folder, tokenizer=folder.parent / TOKENIZER, loss="none", **options)
    bundle.generate_path.write_bytes((graph or bundle.model_path).read_bytes())
    (folder / CHAT_TEMPLATE).write_text(CHAT)
    generation = Generation(file_sha256(bundle.generate_path), tuple(eos), CHAT_TEMPLATE, {"bos_token": "<s>"})
    replace(bundle, generation=generation).write_description()
    return pz.Bundle.read(folder)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pz.Bundle]:
    made: dict[str, pz.Bundle] = {}

    def bundle(name: str) -> pz.Bundle:
        if name not in made:
            folder = tmp_path_factory.mktemp("decoder")
            made[name] = with_generation(FLOATS[name](folder / "m.onnx"), folder / "base")
        return made[name]

    return bundle


def recomputed(graph: Path, prompt: Sequence[int], count: int) -> list[int]:
    """Continue a prompt by plain onnxruntime, with a pass over the whole text for each token."""
    ids = list(prompt)
    for _ in range(count):
        row = np.array([ids])
        ids.append(int(plain(graph, batch_of(graph, row, np.ones_like(row)))["logits"][0, -1].argmax()))
    return ids[len(prompt) :]


PROMPT = [3, 14, 15, 9, 26, 5]


def continued(source: pz.Model | Generator, prompt: Sequence[int] = PROMPT, **settings: Any) -> list[int]:
    stream = source.stream(prompt, **({"max_tokens": 12} | settings))
    for _ in stream:
        pass
    return stream.tokens


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_greedy_text_is_that_of_plain_onnxruntime_without_a_cache(
    bundles: Callable[[str], pz.Bundle], name: str
) -> None:
    bundle = bundles(name)
    expected = recomputed(bundle.generate_path, PROMPT, 12)
    assert len(set(expected)) > 2  # or any mistake in the positions would pass
    assert continued(Generator(bundle)) == expected
    for prepack in (False, "auto"):
        assert continued(pz.load(bundle, threads=1, prepack=prepack)) == expected


@pytest.mark.parametrize("name", FLOATS)
def test_a_prompt_may_be_read_in_parts(
    bundles: Callable[[str], pz.Bundle], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores of all tokens of a long prompt would take more memory than the weights."""
    bundle = bundles(name)
    expected = recomputed(bundle.generate_path, PROMPT, 4)
    monkeypatch.setattr("pocketzo.runtime.decoder._LOGITS", 4 * 4 * VOCABULARY)
    generator = Generator(bundle)
    assert generator._decoder.chunk == (2**31 if name == "merged gpt2" else 4)
    assert continued(generator, max_tokens=4) == expected
