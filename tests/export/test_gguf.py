"""GGUF files of every type and architecture, against transformers models with the numbers of the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files as files
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from gguf_files import CONTEXT, HEADS, KV_HEADS, LAYERS, SIZE, TOKENS
from tokenizers import Tokenizer
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pocketzo import Error
from pocketzo.export import export as export_model
from pocketzo.export._blocks import to_blocks
from pocketzo.graph.blocks import Scheme

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16")
ROUNDING = 5e-5  # of the largest logit; 1.4e-5 was seen
COMMON = {
    "vocab_size": len(TOKENS),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
}
FACTS: dict[str, int | float | str] = {
    "block_count": LAYERS,
    "context_length": CONTEXT,
    "embedding_length": SIZE,
    "feed_forward_length": SIZE,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": SIZE // HEADS,
    "vocab_size": len(TOKENS),
}


def llama(**settings: Any) -> PreTrainedConfig:
    return LlamaConfig(**COMMON, rms_norm_eps=1e-5, **settings)


def logits_of(path: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Run a graph as a user would: the first half, then the rest token by token."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    shapes = [value.shape for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    cache = [np.empty((len(ids), shape[1], 0, shape[3]), np.float32) for shape in shapes]
    found = []
    half = ids.shape[1] // 2
    for start, stop in [(0, half), *((at, at + 1) for at in range(half, ids.shape[1]))]:
        feed = {
            "input_ids": ids[:, start:stop],
            "attention_mask": np.ones((len(ids), stop), np.int64),
            "position_ids": np.tile(np.arange(start, stop), (len(ids), 1)),
        }
        feed = {key: value for key, value in feed.items() if key in {each.name for each in session.get_inputs()}}
        presents = [name.replace("past_key_values", "present") for name in names]
        logits, *cache = session.run(["logits", *presents], feed | dict(zip(names, cache, strict=True)))
        found.append(logits)
    return np.concatenate(found, axis=1)


def difference(model: Any, path: Path, length: int = 12) -> float:
    """Return the largest difference of the logits, relative to the largest logit."""
    ids = np.random.default_rng(5).integers(0, len(TOKENS), (2, length))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    return float(np.abs(logits_of(path, ids) - expected).max() / np.abs(expected).max())


def export(tmp_path: Path, **options: Any) -> tuple[Path, list[str]]:
    lines: list[str] = []
    out = tmp_path / "out" / "model.onnx"
    export_model(tmp_path / "tiny.gguf", out, note=lines.append, **options)
    return out, lines


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FLOATS + BLOCKS)
def test_each_type_as_float32(tmp_path: Path, kind: str, tied: bool) -> None:
    model = files.model_of(llama(tie_word_embeddings=tied))
    files.write(tmp_path / "tiny.gguf", "llama", model, FACTS, kind)
    out, _ = export(tmp_path)
    assert difference(model, out) < ROUNDING
    assert operators(out)["MatMulNBits"] == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_kept(tmp_path: Path, kind: str, tied: bool) -> None:
    model = files.model_of(llama(tie_word_embeddings=tied))
    files.write(tmp_path / "tiny.gguf", "llama", model, FACTS, kind)
    out, lines = export(tmp_path, dtype="int4")
    assert difference(model, out) < ROUNDING
    count = LAYERS * 7 + (1 if tied else 2)
    assert lines[0] == f"{count} matrices keep their blocks: {count} of {kind}"
    graph = onnx.load(out, load_external_data=False).graph
    planes = 1 if kind.startswith("Q4") else 2
    assert operators(out)["MatMulNBits"] == planes * (LAYERS * 7 + 1)
    assert operators(out)["GatherBlockQuantized"] == planes
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type == 1}
    assert all(size <= SIZE * SIZE // 8 or "rotary" in name for name, size in sizes.items()), "a matrix in float32"
    assert sum(tensor.name.endswith((".packed", ".upper")) for tensor in graph.initializer) == count


@pytest.mark.parametrize(("dtype", "new"), [("int4", "Q4_0"), ("int8", "Q8_0")])
@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_quantised(tmp_path: Path, kind: str, dtype: str, new: str) -> None:
    model = files.model_of(llama(tie_word_embeddings=False))
    files.write(tmp_path / "tiny.gguf", "llama", model, FACTS, kind)
    out, lines = export(tmp_path, dtype=dtype)
    count = LAYERS * 7 + 2
    assert lines[0].startswith(f"{count} matrices quantised as {new}: {count} of {kind}; error ")
    error = square = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                array = parameter.numpy()
                chosen = gguf.GGMLQuantizationType[new]
                rounded = gguf.quants.dequantize(gguf.quants.quantize(array, chosen), chosen)
                error += float(((rounded - array) ** 2).sum())
                square += float((array**2).sum())
                parameter.copy_(torch.from_numpy(rounded))
    assert float(lines[0].split()[-6]) == pytest.approx((error / square) ** 0.5, rel=0.06)
    assert difference(model, out) < ROUNDING


def test_types_are_mixed(tmp_path: Path) -> None:
    model = files.model_of(llama(tie_word_embeddings=False))
    kinds = {
        "attn_q": "Q4_K",
        "attn_k": "Q5_1",
        "attn_v": "Q6_K",
        "ffn_up": "F16",
        "ffn_down": "Q4_1",
        "output": "Q8_0",
    }

    def kind(name: str) -> str:
        return next((kind for part, kind in kinds.items() if f"{part}." in name and "attn_output" not in name), "Q4_0")

    files.write(tmp_path / "tiny.gguf", "llama", model, FACTS, kind)
    out, lines = export(tmp_path, dtype="int8")
    assert lines[0] == (
        "14 matrices keep their blocks: 5 of Q4_0, 2 of Q4_1, 2 of Q4_K, 2 of Q5_1, 2 of Q6_K, 1 of Q8_0"
    )
    assert lines[1].startswith("2 matrices quantised as Q8_0: 2 of F16; error ")
    assert difference(model, out) < 0.02


def test_blocks_of_zeros_and_of_one_number(tmp_path: Path) -> None:
    model = files.model_of(llama())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.zero_()
            layer.self_attn.q_proj.weight[:, :64] = 0.03
    files.write(tmp_path / "tiny.gguf", "llama", model, FACTS, "Q4_1")
    out, _ = export(tmp_path, dtype="int4")
    assert difference(model, out) < ROUNDING


GEMMA = {"attention.key_length": 32, "attention.sliding_window": 8}
ARCHITECTURES: dict[str, tuple[Callable[[], PreTrainedConfig], dict[str, int | float | str]]] = {
    "qwen2": (lambda: Qwen2Config(**COMMON, rms_norm_eps=1e-5), FACTS),
    "qwen3": (lambda: Qwen3Config(**COMMON, rms_norm_eps=1e-5, head_dim=32), FACTS | {"attention.key_length": 32}),
    "phi3": (lambda: Phi3Config(**COMMON, rms_norm_eps=1e-5, pad_token_id=0), FACTS),
    "gpt2": (
        lambda: GPT2Config(vocab_size=len(TOKENS), n_embd=SIZE, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT),
        {name: fact for name, fact in FACTS.items() if name != "attention.head_count_kv"}
        | {"feed_forward_length": 4 * SIZE, "attention.layer_norm_epsilon": 1e-5},
    ),
    "gemma2": (
        lambda: Gemma2Config(
            **COMMON,
            rms_norm_eps=1e-5,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=8,
            attn_logit_softcapping=20.0,
            final_logit_softcapping=10.0,
        ),
        FACTS | GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": (
        lambda: Gemma3TextConfig(
            **COMMON,
            rms_norm_eps=1e-5,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=8,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        FACTS | GEMMA | {"rope.freq_base": 20000.0},
    ),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_architecture(tmp_path: Path, arch: str) -> None:
    make, facts = ARCHITECTURES[arch]
    model = files.model_of(make())
    files.write(tmp_path / "tiny.gguf", arch, model, facts, "Q5_1")
    out, lines = export(tmp_path, dtype="int8")
    found, tied = operators(out), model.config.tie_word_embeddings
    count = (found["MatMulNBits"] + found["GatherBlockQuantized"]) // 2 - tied  # of two planes
    assert lines[0] == f"{count} matrices keep their blocks: {count} of Q5_1"
    assert lines[1].startswith("outputs differ"), "a matrix was quantised again"
    assert difference(model, out, 24) < ROUNDING  # more tokens than the sliding window


def llama3_factors(factor: float) -> np.ndarray[Any, Any]:
    size = SIZE // HEADS
    lengths = 2 * np.pi * 10000.0 ** (np.arange(0, size, 2) / size)
    smooth = np.clip((8192 / lengths - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def test_the_rotary_factors_of_llama_3(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = files.model_of(llama(rope_parameters=rope))
    factors = llama3_factors(32)
    files.write(tmp_path / "tiny.gguf", "llama", model, FACTS, extra={"rope_freqs.weight": (factors, "F32")})
    out, _ = export(tmp_path)
    assert difference(model, out) < ROUNDING
    factors[-3] *= 1.01
    files.write(tmp_path / "tiny.gguf", "llama", model, FACTS, extra={"rope_freqs.weight": (factors, "F32")})
    with pytest.raises(Error, match=r"'rope_freqs\.weight' are not Llama 3's factors"):
        export(tmp_path)


@pytest.mark.parametrize("kind", ["IQ4_NL", "Q2_K"])
def test_other_types_are_refused(tmp_path: Path, kind: str) -> None:
    files.write(
        tmp_path / "tiny.gguf",
        "llama",
        files.model_of(llama()),
        FACTS,
        lambda name: kind if name == "blk.1.attn_k.weight" else "F32",
    )
    with pytest.raises(Error) as caught:
        export(tmp_path)
    assert f"tensor 'blk.1.attn_k.weight' is of type {kind}, which is not supported; expected one of F32" in str(
        caught.value
    )
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "tiny.gguf", files.model_of(llama())
    bias = (np.zeros(SIZE, np.float32), "F32")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"arch": "mistral3"}, "architecture 'mistral3' is not supported; expected one of gemma2"),
        ({"facts": FACTS | {"rope.scaling.type": "yarn"}}, "rotary positions are scaled \\('yarn'\\)"),
        ({"facts": FACTS | {"split.count": 3}}, "one of 3 parts; join them"),
        ({"extra": {"blk.0.attn_q.bias": bias}}, "22 tensors, but LlamaForCausalLM has 21 parameters"),
        ({"without": "blk.1.ffn_up.weight"}, "no tensor for the parameter 'model.layers.1.mlp.up_proj.weight'"),
        ({"pre": None}, "has no tokenizer"),
        ({"pre": "chatglm-bpe"}, "the tokenizer splits text as 'chatglm-bpe', which is not supported"),
    ]
    for options, text in cases:
        files.write(path, model=model, **({"arch": "llama", "facts": FACTS} | options))
        with pytest.raises(Error, match=text) as caught:
            export(tmp_path)
        assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    files.write(path, "llama", files.model_of(llama()), FACTS)
    whole = path.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], whole[:3000], whole[:100], whole[:10], b"", b"no" + whole):
        path.write_bytes(content)
        with pytest.raises(Error, match=r"tiny\.gguf: damaged or not a GGUF file") as caught:
            export(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_difference_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketzo.export import _blocks, _matrices

    files.write(tmp_path / "tiny.gguf", "llama", files.model_of(llama()), FACTS, "Q4_1")

    def wrong(kind: str, data: Any) -> Any:
        blocks = _blocks.to_blocks(kind, data)
        blocks.scales[:] *= 1.05
        return blocks

    monkeypatch.setattr(_matrices, "to_blocks", wrong)
    with pytest.raises(Error, match="the graph's outputs differ from those of transformers by"):
        export(tmp_path, dtype="int4")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("pre", "tokens"), [("gpt-2", ["a", "Ġ", "Ġ", "1", "2"]), ("smollm", ["a", "ĠĠ", "1", "2"])])
def test_the_tokenizer_and_its_settings(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    files.write(tmp_path / "tiny.gguf", "llama", files.model_of(llama()), FACTS, pre=pre)
    out, _ = export(tmp_path)
    tokenizer = Tokenizer.from_file(str(out.parent / "tokenizer.json"))
    assert tokenizer.encode("hello w<|end|>").tokens == ["hell", "o", "Ġw", "<|end|>"]
    assert tokenizer.encode("a  12").tokens == tokens
    assert (out.parent / "chat_template.jinja").read_text().startswith("{% for m in messages %}")
    assert f'"eos_token_id": {len(TOKENS) - 1}' in (out.parent / "generation_config.json").read_text()
    assert '"eos_token": "<|end|>"' in (out.parent / "tokenizer_config.json").read_text()


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype: expected 'float32', 'float16', 'int8' or 'int4', got 'int3'"):
        export(tmp_path, dtype="int3")


@pytest.mark.parametrize("bits", [4, 8])
def test_floats_are_quantised_as_gguf_does(bits: Any) -> None:
    rows = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    rows[0] = 0
    rows[1] = np.round(4 * rows[1]) / 4
    rows[2, ::2] = -rows[2, 1::2]  # of two numbers of one size, the first one counts
    kind = f"Q{bits}_0"
    expected = to_blocks(kind, gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]))
    found = Scheme(bits).blocks(rows)
    np.testing.assert_array_equal(found.packed, expected.packed)
    np.testing.assert_array_equal(found.scales, expected.scales)
