"""Generated text: what plain onnxruntime gives without a cache, piece by piece, with live weights."""

from __future__ import annotations

import re
import shutil
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import POSITIONS, VOCABULARY, Array, keep_last, write_gpt2
from onnx import TensorProto, numpy_helper
from onnxruntime.transformers import float16
from test_decoders import FLOATS, GPT2, MATMULS, batch_of, blocks, plain

import pocketzo as pz
from pocketzo.formats.bundle import TOKENIZER
from pocketzo.formats.generation import CHAT_TEMPLATE, Generation
from pocketzo.formats.safetensors import file_sha256
from pocketzo.runtime.embeddings import context_length
from pocketzo.runtime.generate import Generator, Stream, open_decoder
from pocketzo.runtime.image import Image
from pocketzo.runtime.sampling import Sampler, probabilities
from pocketzo.runtime.variables import has_constants

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
    options = {"loss": "none"} | options
    bundle = pz.prepare(source, folder, tokenizer=folder.parent / TOKENIZER, **options)
    bundle.generate_path.write_bytes((graph or bundle.model_path).read_bytes())
    (folder / CHAT_TEMPLATE).write_text(CHAT)
    generation = Generation(file_sha256(bundle.generate_path), tuple(eos), CHAT_TEMPLATE, {"bos_token": "<s>"})
    replace(bundle, generation=generation).write_description()
    return pz.Bundle.read(folder)


def edited(bundle: pz.Bundle, folder: Path, graph: onnx.ModelProto) -> pz.Bundle:
    """Copy a bundle with another graph for generating."""
    shutil.copytree(bundle.path, folder)
    copy = replace(bundle, path=folder)
    copy.generate_path.write_bytes(graph.SerializeToString())
    assert bundle.generation is not None
    generation = replace(bundle.generation, graph_sha256=file_sha256(copy.generate_path))
    replace(copy, generation=generation).write_description()
    return pz.Bundle.read(folder)


def saved(model: pz.Model, folder: Path) -> Path:
    model.save(folder)
    return folder


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


@pytest.mark.parametrize(("name", "shape"), [("num_logits_to_keep", ()), ("logits_to_keep", (1,))])
def test_only_the_last_tokens_logits_are_asked_for(
    bundles: Callable[[str], pz.Bundle], tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    base = bundles("genai")
    model = onnx.load(base.generate_path, load_external_data=False)
    keep_last(model.graph, name, shape)
    generator = Generator(edited(base, tmp_path / "copy", model))
    assert continued(generator) == continued(Generator(base))
    assert generator._decoder.chunk == 2**31


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


def test_without_a_cache_every_token_reads_the_whole_text(bundles: Callable[[str], pz.Bundle], tmp_path: Path) -> None:
    """The same graph with caches of length 0 inside, as exports without a cache are."""
    base = bundles("llama")
    model = onnx.load(base.generate_path, load_external_data=False)
    graph = model.graph
    for cache in [value for value in graph.input if value.name.startswith("past")]:
        shape = [1, *(dim.dim_value for dim in cache.type.tensor_type.shape.dim[1:])]
        graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), cache.name))
        graph.input.remove(cache)
    for present in [value for value in graph.output if value.name.startswith("present")]:
        graph.output.remove(present)
    bundle = edited(base, tmp_path / "copy", model)
    with pytest.warns(UserWarning, match=r"the graph has no cache, so every token takes a pass over the whole text"):
        generator = Generator(bundle)
    assert continued(generator) == recomputed(base.generate_path, PROMPT, 12)


def test_half_precision_caches(tmp_path: Path) -> None:
    """The graph of fp16 exports takes and returns fp16 caches."""
    path = tmp_path / "m.onnx"
    model = onnx.load(write_gpt2(tmp_path / "float.onnx", GPT2))
    half = float16.convert_float_to_float16(model)
    assert {value.type.tensor_type.elem_type for value in half.graph.output} == {TensorProto.FLOAT16}
    onnx.save(half, path)
    bundle = with_generation(path, tmp_path / "base")
    expected: list[int] = list(PROMPT)
    for _ in range(8):
        row = np.array([expected])
        batch = batch_of(path, row, np.ones_like(row))
        batch = {n: a.astype(np.float16) if n.startswith("past") else a for n, a in batch.items()}
        expected.append(int(plain(path, batch)["logits"][0, -1].argmax()))
    assert continued(Generator(bundle), max_tokens=8) == expected[len(PROMPT) :]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this processor does not compute in fp16")
        assert continued(pz.load(bundle, threads=1), max_tokens=8) == expected[len(PROMPT) :]


# ---- live weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "genai", "merged gpt2"])
def test_a_model_generates_with_its_weights_as_they_are(
    bundles: Callable[[str], pz.Bundle], tmp_path: Path, name: str, prepack: bool
) -> None:
    """Each weight is changed after the session is there; a fresh session of the saved bundle says the same."""
    bundle = bundles(name)
    model = pz.load(bundle, threads=1, prepack=prepack and name != "merged gpt2")
    before = continued(model)
    rng = np.random.default_rng(2)
    trainable = {tensor.name for tensor in bundle.tensors if tensor.trainable}
    for n in trainable:
        model.weights[n] = model.weights[n] * rng.uniform(0.5, 1.5, model.weights[n].shape)
    model.save(tmp_path / "tuned")
    expected = recomputed(tmp_path / "tuned" / "generate.onnx", PROMPT, 12)
    assert continued(model) == expected != before


def test_quantised_constants_are_prepacked_beside_live_weights(tmp_path: Path) -> None:
    blocks(MATMULS["llama"](tmp_path / "float.onnx"), tmp_path / "m.onnx", 4, "MatMul")
    bundle = with_generation(tmp_path / "m.onnx", tmp_path / "base")
    assert has_constants(bundle)
    model = pz.load(bundle, threads=1)
    expected = recomputed(bundle.generate_path, PROMPT, 12)
    assert continued(Generator(bundle)) == continued(model) == expected
    name = "model.norm.weight"
    model.weights[name] = model.weights[name] * np.random.default_rng(2).uniform(0.2, 2, model.weights[name].shape)
    tuned = pz.Bundle.read(saved(model, tmp_path / "tuned"))
    assert continued(model) == recomputed(tuned.generate_path, PROMPT, 12) != expected


def test_a_session_keeps_the_memory_that_it_reads(bundles: Callable[[str], pz.Bundle]) -> None:
    bundle = bundles("llama")
    image = Image.allocate(bundle)
    alive = weakref.ref(image)
    decoder = open_decoder(bundle, image, 1)
    del image
    assert alive() is not None
    del decoder
    assert alive() is None


@pytest.mark.parametrize("prepack", [False, True])
def test_a_pending_pass_is_applied_before(bundles: Callable[[str], pz.Bundle], tmp_path: Path, prepack: bool) -> None:
    bundle = bundles("llama")
    model = pz.load(bundle, threads=1, prepack=prepack)
    before = continued(model)
    losses = iter([1.0, 0.0])
    pz.MeZO(model, lr=5e-4, eps=1e-3, seed=1).step(lambda _: next(losses))
    assert before != continued(model) == continued(Generator(pz.Bundle.read(saved(model, tmp_path / "tuned"))))


def test_a_copy_of_prepacked_weights_respects_the_memory_limit(
    bundles: Callable[[str], pz.Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, prepacked = (
        pz.load(bundles("llama"), threads=1, prepack=prepack, max_memory=2**33) for prepack in (False, True)
    )
    monkeypatch.setattr("pocketzo.runtime.generate.resident_memory", lambda: 2**33)
    assert shared.generate("ab")  # no copy
    with pytest.raises(pz.MemoryLimitError, match=r"takes a copy of .* MB, .* load the model with prepack=False"):
        prepacked.generate("ab")


def test_two_streams_at_once_keep_their_texts(bundles: Callable[[str], pz.Bundle]) -> None:
    generator = Generator(bundles("qwen2"))
    prompts = PROMPT, [7, 7, 21]
    alone = [list(generator.stream(prompt, max_tokens=8)) for prompt in prompts]
    first, second = (generator.stream(prompt, max_tokens=8) for prompt in prompts)
    pieces: tuple[list[str], list[str]] = ([], [])
    for one, two in zip_longest(first, second):
        pieces[0].extend([one] if one is not None else [])
        pieces[1].extend([two] if two is not None else [])
    assert list(pieces) == alone


# ---- the end of a text -----------------------------------------------------------------------------------------------


def test_a_text_ends_at_any_of_its_last_tokens(bundles: Callable[[str], pz.Bundle]) -> None:
    bundle = bundles("llama")
    tokens = continued(Generator(bundle))
    end = next(n for n in range(3, 12) if tokens[n] not in tokens[:n])
    assert bundle.generation is not None
    unused = next(token for token in range(VOCABULARY) if token not in tokens)
    ended = replace(bundle, generation=replace(bundle.generation, eos=(unused, tokens[end])))
    stream = Generator(ended).stream(PROMPT, max_tokens=12)
    assert "".join(stream) == Generator(bundle).tokenizer.decode(PROMPT + tokens[:end])[len(PROMPT) :]
    assert (stream.tokens, stream.stop) == (tokens[:end], "eos")
    for most in (0, 1, end):
        stream = Generator(ended).stream(PROMPT, max_tokens=most)
        assert bool("".join(stream)) == bool(most)
        assert (stream.tokens, stream.stop) == (tokens[:most], "length")


def test_no_more_tokens_than_the_model_has_positions(bundles: Callable[[str], pz.Bundle]) -> None:
    generator = Generator(bundles("gpt2"))
    stream = generator.stream(PROMPT, max_tokens=1000)
    assert "".join(stream)
    assert (len(stream.prompt) + len(stream.tokens), stream.stop) == (POSITIONS, "context")
    with pytest.raises(ValueError, match=f"the prompt has {POSITIONS} tokens, and the model reads at most {POSITIONS}"):
        generator.stream([5] * POSITIONS)


def test_tables_of_positions_limit_the_text(bundles: Callable[[str], pz.Bundle]) -> None:
    limits = {name: context_length(bundles(name), bundles(name).generate_path) for name in FLOATS}
    assert limits == {
        "gpt2": POSITIONS,
        "llama": None,
        "llama, a head each": None,
        "qwen2": None,
        "qwen2-vl": None,
        "qwen3": None,
        "merged gpt2": POSITIONS,
        "genai": POSITIONS,
    }


@pytest.mark.parametrize(
    ("nodes", "rows"),
    [
        ("at = Add(position_ids, two)", POSITIONS - 2),
        ("at = Add(two, position_ids)", POSITIONS - 2),
        ("at = Sub(position_ids, one)", POSITIONS + 1),
        ("n = CumSum(mask, one) real = Mul(n, mask) p = Sub(real, one) at = Add(p, two)", POSITIONS - 2),  # OPT
        ("n = CumSum(mask, one) p = Sub(n, one) q = Slice(p, one, two, one) at = Cast<to = 6>(q)", POSITIONS),
        ("p = Range(one, two, one) at = Add(p, two)", POSITIONS - 2),
        ("c = Constant<value = int64[1] {3}>() at = Add(position_ids, c)", POSITIONS - 3),
        ("at = Constant<value = int64[1] {3}>()", None),
        ("at = Add(position_ids, position_ids)", None),
    ],
)
def test_positions_are_followed_to_their_table(
    bundles: Callable[[str], pz.Bundle], tmp_path: Path, nodes: str, rows: int | None
) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
    g (int64[b, n] position_ids, int64[b, n] mask) => (float[b, n, 4] y)
    <int64 one = {{1}}, int64[1] two = {{2}}> {{ {nodes} y = Gather(table, at) }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((POSITIONS, 4), np.float32), "table"))
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    assert context_length(bundles("llama"), tmp_path / "g.onnx") == rows


# ---- text ------------------------------------------------------------------------------------------------------------


@dataclass
class Spoken:
    """A decoder that says what it is to say."""

    tokens: list[int]
    cached: bool = True
    context: int | None = None

    def begin(self) -> Spoken:
        return self

    def logits(self, _: Sequence[int]) -> Array:
        scores = np.zeros(VOCABULARY + 10, np.float32)
        scores[self.tokens.pop(0)] = 1
        return scores


def said(generator: Generator, prompt: str, text_ids: list[int]) -> list[str]:
    decoder: Any = Spoken(list(text_ids))
    ids = generator.encode(prompt)
    return list(Stream(decoder, generator.tokenizer, ids, Sampler(), frozenset(), len(text_ids)))


def test_characters_of_several_tokens_come_whole(bundles: Callable[[str], pz.Bundle]) -> None:
    generator = Generator(bundles("llama"))
    text = "a \N{GRINNING FACE}b\N{EURO SIGN},\N{LATIN SMALL LETTER E WITH ACUTE}."
    ids = generator.encode(text)
    assert len(ids) == len(text.encode())
    assert said(generator, "ab", ids) == list(text)
    assert said(generator, "", ids) == list(text)
    assert said(generator, "ab", ids[:4]) == ["a", " ", "\ufffd"]  # two of four bytes


def test_pieces_join_to_the_whole(bundles: Callable[[str], pz.Bundle]) -> None:
    """Whatever the bytes are, valid or not."""
    generator = Generator(bundles("llama"))
    rng = np.random.default_rng(1)
    for _ in range(50):
        ids = rng.integers(2, VOCABULARY, 40).tolist()
        whole = generator.tokenizer.decode([*generator.encode("ab"), *ids])
        assert "ab" + "".join(said(generator, "ab", ids)) == whole


def test_a_space_that_belongs_to_the_first_word_is_kept(tmp_path: Path, bundles: Callable[[str], pz.Bundle]) -> None:
    """Tokenizers of SentencePiece drop the space before a text's first word, which is not the answer's."""
    words = {"\u2581The": 0, "\u2581sky": 1, "\u2581is": 2, "\u2581blue": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "\u2581The"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    generator = Generator(bundles("llama"))
    generator.__dict__["tokenizer"] = tokenizer
    assert said(generator, "The sky", [2, 3]) == [" is", " blue"]
    assert said(generator, "The sky", []) == []


def test_characters_of_bytes_that_follow_each_other(bundles: Callable[[str], pz.Bundle]) -> None:
    """Llama's decoder gives up all bytes in a row if they do not begin and end with a character."""
    names = ["<unk>", "a", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: n for n, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    generator = Generator(bundles("llama"))
    generator.__dict__["tokenizer"] = tokenizer
    euro = [2, 3, 4]
    for prompt in ("a", "\N{EURO SIGN}" * 4):
        pieces = said(generator, prompt, [*euro * 4, 5, *euro, 1, 5, 5])
        assert pieces == [*"\N{EURO SIGN}" * 4, "\n", "\N{EURO SIGN}", "a", "\n", "\n"]


def test_a_prompt_keeps_its_first_special_token_and_loses_the_last(bundles: Callable[[str], pz.Bundle]) -> None:
    base = bundles("llama")
    assert base.generation is not None
    generator = Generator(replace(base, generation=replace(base.generation, eos=(1,))))
    template = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    generator.tokenizer.post_processor = template
    assert generator.encode("ab") == [0, 2, 3]
    assert generator.encode("ab", special_tokens=False) == [2, 3]
    assert generator.encode("ab</s>", special_tokens=False) == [2, 3, 1]  # it is the user's
    assert generator.encode("") == [0]


# ---- drawing ---------------------------------------------------------------------------------------------------------

SCORES = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1, 1, [0.1, 0.4, 0.2, 0.3]),
        (0.5, 1, np.array([0.01, 0.16, 0.04, 0.09]) / 0.3),
        (2, 1, np.sqrt([0.1, 0.4, 0.2, 0.3]) / np.sqrt([0.1, 0.4, 0.2, 0.3]).sum()),
        (1, 0.69, [0, 4 / 7, 0, 3 / 7]),
        (1, 0.71, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1, 0.05, [0, 1, 0, 0]),
        (1e-6, 1, [0, 1, 0, 0]),
        (0.5, 0.5, [0, 1, 0, 0]),
    ],
)
def test_known_distributions(temperature: float, top_p: float, expected: Sequence[float]) -> None:
    np.testing.assert_allclose(probabilities(SCORES, temperature, top_p), expected, atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(1.0, seed=3)
    counts = np.bincount([sampler.choose(SCORES) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.2, 0.3], atol=0.03)  # four standard errors


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler().choose(np.array([0, 3, 3], np.float16)) == 1


def test_seeds_reproduce(bundles: Callable[[str], pz.Bundle]) -> None:
    generator = Generator(bundles("llama"))
    texts = [continued(generator, temperature=3.0, top_p=0.9, seed=seed, max_tokens=20) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "message"),
    [
        ([], {}, ValueError, "the prompt has no tokens"),
        ("", {}, ValueError, "the prompt has no tokens"),
        ([1, VOCABULARY], {}, ValueError, f"a token of the prompt must be in 0 .. {VOCABULARY - 1}, got {VOCABULARY}"),
        ([1, 0.5], {}, TypeError, "a token of the prompt must be an int, got 0.5"),
        ([1], {"max_tokens": -1}, ValueError, "max_tokens must be at least 0"),
        ([1], {"temperature": -1.0}, ValueError, "temperature must be finite and at least 0"),
        ([1], {"temperature": 1.0, "top_p": 0.0}, ValueError, "top_p must be greater than 0 and at most 1"),
        ([1], {"top_p": 0.5}, ValueError, "top_p 0.5 has no effect at temperature 0"),
        ([1], {"seed": -1}, ValueError, "seed must be"),
    ],
)
def test_bad_arguments(
    bundles: Callable[[str], pz.Bundle],
    prompt: str | list[int],
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Generator(bundles("llama")).stream(prompt, **settings)


def test_a_bundle_without_the_graph(tmp_path: Path) -> None:
    model = pz.load(pz.prepare(FLOATS["llama"](tmp_path / "m.onnx"), tmp_path / "base", loss="none"), threads=1)
    with pytest.raises(pz.BundleError, match=r"there is no generate.onnx in the bundle.*--task causal-lm"):
        model.generate("ab")


def test_ruined_weights_are_named(bundles: Callable[[str], pz.Bundle]) -> None:
    model = pz.load(bundles("llama"), threads=1, prepack=False)
    model.weights["model.norm.weight"] = np.float32(np.inf)
    with pytest.raises(pz.Error, match="scores of the next token are not finite"):
        model.generate("ab")


def renamed(old: str, new: str) -> Callable[[onnx.GraphProto], None]:
    def edit(graph: onnx.GraphProto) -> None:
        for value in [*graph.input, *graph.output]:
            value.name = new if value.name == old else value.name
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    return edit


def reshaped(name: str, axis: int, size: int | str) -> Callable[[onnx.GraphProto], None]:
    def edit(graph: onnx.GraphProto) -> None:
        dim = next(value for value in graph.input if value.name == name).type.tensor_type.shape.dim[axis]
        dim.dim_param, dim.dim_value = ("", size) if isinstance(size, int) else (size, 0)
        if isinstance(size, str):
            dim.dim_param = size

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (renamed("present.1.value", "later.1.value"), "no output continues the cache 'past_key_values.1.value'"),
        (renamed("position_ids", "pixel_values"), "input 'pixel_values' of type tensor(int64) is not known"),
        (reshaped("past_key_values.0.key", 1, "heads"), "fixed numbers of heads"),
        (reshaped("input_ids", 1, 16), "'input_ids' has shape ['batch_size', 16]; expected [batch, tokens]"),
        (reshaped("input_ids", 0, 4), "export the model with dynamic axes"),
    ],
)
def test_a_graph_that_is_no_decoders(
    bundles: Callable[[str], pz.Bundle], tmp_path: Path, edit: Callable[[onnx.GraphProto], None], message: str
) -> None:
    base = bundles("llama")
    model = onnx.load(base.generate_path, load_external_data=False)
    edit(model.graph)
    with pytest.raises(pz.BundleError, match=re.escape(message)):
        Generator(edited(base, tmp_path / "copy", model))
