"""Tiny decoders with caches as exporters write them: GPT-2, Llama, Qwen2, Qwen2-VL, Qwen3, merged, and genai's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Weights = dict[str, Array]

VOCABULARY, LAYERS, HIDDEN, HEADS, SIZE, INNER, POSITIONS = 40, 2, 64, 4, 16, 96, 32
SECTIONS = (2, 3, 3)  # of the frequencies: those of positions in time, height and width
MASKED = float(np.finfo(np.float32).min)
EPSILON = 1e-5
MICROSOFT = "com.microsoft"


@dataclass
class Nodes:
    """Nodes and initializers under construction; values are known by their names."""

    prefix: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> Any:
        """Add a node; return the name of its output, or those of several."""
        name = f"{self.prefix}/{kind}_{len(self.nodes)}"
        outputs = outputs or [f"{name}_output_0"]
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name, **attributes))
        return outputs[0] if len(outputs) == 1 else outputs

    def constant(self, value: Any, dtype: npt.DTypeLike | None = None) -> str:
        if dtype is None:
            dtype = np.float32 if isinstance(value, float) else np.int64
        name = f"{self.prefix}/Constant_{len(self.nodes)}_output_0"
        tensor = numpy_helper.from_array(np.array(value, dtype), name)
        self.nodes.append(helper.make_node("Constant", [], [name], name, value=tensor))
        return name

    def weight(self, name: str, array: Array) -> str:
        """Add an initializer, once."""
        if all(tensor.name != name for tensor in self.initializers):
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def linear(self, x: str, weights: Weights, name: str, exported: str) -> str:
        """Multiply by a torch weight [out, in] as exporters store it, [in, out], and add its bias if it has one."""
        x = self.op("MatMul", x, self.weight(exported, np.ascontiguousarray(weights[f"{name}.weight"].T)))
        bias = f"{name}.bias"
        return self.op("Add", self.weight(bias, weights[bias]), x) if bias in weights else x


# ---- weights ---------------------------------------------------------------------------------------------------------


def llama_weights(*, kv_heads: int, bias: bool = False, norms: bool = False, tied: bool = False) -> Weights:
    """Return the weights of Llama, or with biases of Qwen2, or with norms of Qwen3, by the names of transformers."""
    rng = np.random.default_rng(5)
    weights: Weights = {}

    def add(name: str, *shape: int, mean: float = 0) -> None:
        scale = 0.3 if len(shape) > 1 else 0.1
        weights[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    add("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        add(f"{layer}.input_layernorm.weight", HIDDEN, mean=1)
        for name, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)):
            add(f"{layer}.self_attn.{name}_proj.weight", heads * SIZE, HIDDEN)
            if bias:
                add(f"{layer}.self_attn.{name}_proj.bias", heads * SIZE)
        if norms:
            add(f"{layer}.self_attn.q_norm.weight", SIZE, mean=1)
            add(f"{layer}.self_attn.k_norm.weight", SIZE, mean=1)
        add(f"{layer}.self_attn.o_proj.weight", HIDDEN, HEADS * SIZE)
        add(f"{layer}.post_attention_layernorm.weight", HIDDEN, mean=1)
        add(f"{layer}.mlp.gate_proj.weight", INNER, HIDDEN)
        add(f"{layer}.mlp.up_proj.weight", INNER, HIDDEN)
        add(f"{layer}.mlp.down_proj.weight", HIDDEN, INNER)
    add("model.norm.weight", HIDDEN, mean=1)
    if not tied:
        add("lm_head.weight", VOCABULARY, HIDDEN)
    return weights


def gpt2_weights() -> Weights:
    """Return the weights of GPT-2, whose layers are stored as [in, out]; the output projection is the embedding."""
    rng = np.random.default_rng(6)
    weights: Weights = {}

    def add(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
        if name not in ("transformer.wte", "transformer.wpe"):
            weights[f"{name}.bias"] = (0.1 * rng.standard_normal(shape[-1:])).astype(np.float32)
            if len(shape) == 1:
                weights[f"{name}.weight"] += np.float32(1)

    add("transformer.wte", VOCABULARY, HIDDEN)
    add("transformer.wpe", POSITIONS, HIDDEN)
    for n in range(LAYERS):
        layer = f"transformer.h.{n}"
        add(f"{layer}.ln_1", HIDDEN)
        add(f"{layer}.attn.c_attn", HIDDEN, 3 * HIDDEN)
        add(f"{layer}.attn.c_proj", HIDDEN, HIDDEN)
        add(f"{layer}.ln_2", HIDDEN)
        add(f"{layer}.mlp.c_fc", HIDDEN, INNER)
        add(f"{layer}.mlp.c_proj", INNER, HIDDEN)
    add("transformer.ln_f", HIDDEN)
    return weights


def inverse_frequencies() -> Array:
    return (10_000.0 ** (-np.arange(0, SIZE, 2) / SIZE)).astype(np.float32)


# ---- parts of decoders -----------------------------------------------------------------------------------------------


@dataclass
class Decoder(Nodes):
    """A decoder's nodes, in the main graph or in a branch.

    Attributes
    ----------
    cached : bool
        Whether it reads ``past_key_values``.
    sections : bool
        Whether positions have an axis in front for time, height and width, as in Qwen2-VL.
    """

    cached: bool = True
    sections: bool = False

    def size_of(self, x: str, axis: int) -> str:
        """Return the size of an axis, [1]."""
        return str(self.op("Shape", x, start=axis, end=axis + 1))

    def allowed(self, ids: str, mask: str) -> str:
        """Return what is added to scores, [batch, 1, sequence, past + sequence]."""
        total, length = self.size_of(mask, 1), self.size_of(ids, 1)
        scalar = self.constant([0])
        last, new = (self.op("Squeeze", size, scalar) for size in (total, length))
        zero, one = self.constant(0), self.constant(1)
        keys = self.op("Range", zero, last, one)
        queries = self.op("Range", self.op("Sub", last, new), last, one)
        causal = self.op("LessOrEqual", keys, self.op("Unsqueeze", queries, self.constant([1])))
        real = self.op("Cast", self.op("Unsqueeze", mask, self.constant([1, 2])), to=TensorProto.BOOL)
        seen = self.op("And", real, causal)
        return str(self.op("Where", seen, self.constant(0.0), self.constant(MASKED)))

    def heads_of(self, x: str, count: int) -> str:
        """Return [batch, heads, sequence, size] of [batch, sequence, heads x size]."""
        return str(self.op("Transpose", self.op("Reshape", x, self.constant([0, 0, count, SIZE])), perm=[0, 2, 1, 3]))

    def with_past(self, x: str, layer: int, kind: str) -> str:
        """Return all keys or values, as an output too."""
        present = f"{self.prefix}present.{layer}.{kind}"
        if not self.cached:
            return str(self.op("Identity", x, outputs=[present]))
        return str(self.op("Concat", f"past_key_values.{layer}.{kind}", x, axis=2, outputs=[present]))

    def attend(self, query: str, key: str, value: str, allowed: str) -> str:
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.op("Add", self.op("Mul", scores, self.constant(SIZE**-0.5)), allowed)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        mixed = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return str(self.op("Reshape", mixed, self.constant([0, 0, HEADS * SIZE])))

    def repeated(self, x: str, kv_heads: int) -> str:
        """Repeat keys or values for the queries that share them."""
        if kv_heads == HEADS:
            return x
        groups = HEADS // kv_heads
        batch, length = self.size_of(x, 0), self.size_of(x, 2)
        wide = self.op("Concat", batch, self.constant([kv_heads, groups]), length, self.constant([SIZE]), axis=0)
        x = self.op("Expand", self.op("Unsqueeze", x, self.constant([2])), wide)
        flat = self.op("Concat", batch, self.constant([HEADS]), length, self.constant([SIZE]), axis=0)
        return str(self.op("Reshape", x, flat))

    def rms_norm(self, x: str, weights: Weights, name: str) -> str:
        mean = self.op("ReduceMean", self.op("Pow", x, self.constant(2.0)), self.constant([-1]))
        root = self.op("Sqrt", self.op("Add", mean, self.constant(EPSILON)))
        normed = self.op("Mul", x, self.op("Reciprocal", root))
        return str(self.op("Mul", self.weight(name, weights[name]), normed))

    def rotated(self, x: str, cos: str, sin: str) -> str:
        first, second = self.op(
            "Split", x, outputs=[f"{self.prefix}/half_{len(self.nodes)}_{n}" for n in (0, 1)], axis=-1, num_outputs=2
        )
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return str(self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin)))

    def rotation(self, positions: str) -> tuple[str, str]:
        """Return cosines and sines, [batch, 1, sequence, size], computed from the inverse frequencies."""
        table = self.weight("/model/rotary_emb/Constant_7_output_0", inverse_frequencies().reshape(1, -1, 1))
        before = self.constant([2 if self.sections else 1])
        at = self.op("Cast", self.op("Unsqueeze", positions, before), to=TensorProto.FLOAT)
        angles = self.op("MatMul", table, at)
        if self.sections:
            names = [f"{self.prefix}/section_{n}" for n in range(len(SECTIONS))]
            self.op("Split", angles, self.constant(list(SECTIONS)), axis=2, outputs=names)
            angles = [self.op("Gather", name, self.constant(n), axis=0) for n, name in enumerate(names)]
            angles = self.op("Concat", *angles, axis=1)
        angles = self.op("Transpose", angles, perm=[0, 2, 1])
        angles = self.op("Unsqueeze", self.op("Concat", angles, angles, axis=-1), self.constant([1]))
        return self.op("Cos", angles), self.op("Sin", angles)

    def feed_forward(self, x: str, weights: Weights, layer: str) -> str:
        gate, up = (
            self.linear(x, weights, f"{layer}.mlp.{name}_proj", f"{layer}.mlp.{name}_proj.MatMul")
            for name in ("gate", "up")
        )
        inner = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        return self.linear(inner, weights, f"{layer}.mlp.down_proj", f"{layer}.mlp.down_proj.MatMul")

    def llama(self, weights: Weights, kv_heads: int, logits: str = "logits") -> None:
        """Llama, Qwen2 or Qwen3, as its weights say."""
        allowed = self.allowed("input_ids", "attention_mask")
        cos, sin = self.rotation("position_ids")
        table = self.weight("model.embed_tokens.weight", weights["model.embed_tokens.weight"])
        x = self.op("Gather", table, "input_ids")
        for n in range(LAYERS):
            layer = f"model.layers.{n}"
            attn = f"{layer}.self_attn"
            normed = self.rms_norm(x, weights, f"{layer}.input_layernorm.weight")
            parts = {}
            for name, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)):
                part = self.linear(normed, weights, f"{attn}.{name}_proj", f"{attn}.{name}_proj.MatMul")
                if f"{attn}.{name}_norm.weight" in weights:
                    part = self.op("Reshape", part, self.constant([0, 0, heads, SIZE]))
                    part = self.rms_norm(part, weights, f"{attn}.{name}_norm.weight")
                    part = self.op("Reshape", part, self.constant([0, 0, heads * SIZE]))
                parts[name] = self.heads_of(part, heads)
            query, key = (self.rotated(parts[name], cos, sin) for name in "qk")
            keys, values = (
                self.repeated(self.with_past(part, n, kind), kv_heads)
                for part, kind in ((key, "key"), (parts["v"], "value"))
            )
            mixed = self.attend(query, keys, values, allowed)
            x = self.op("Add", x, self.linear(mixed, weights, f"{attn}.o_proj", f"{attn}.o_proj.MatMul"))
            normed = self.rms_norm(x, weights, f"{layer}.post_attention_layernorm.weight")
            x = self.op("Add", x, self.feed_forward(normed, weights, layer))
        x = self.rms_norm(x, weights, "model.norm.weight")
        if "lm_head.weight" in weights:
            head = self.weight("lm_head.MatMul", np.ascontiguousarray(weights["lm_head.weight"].T))
        else:
            head = self.op("Transpose", table, perm=[1, 0])
        self.op("MatMul", x, head, outputs=[logits])

    def gpt2(self, weights: Weights, logits: str = "logits", *, gemm: bool = True) -> None:
        def stored(name: str) -> str:
            return self.weight(name, weights[name])

        def dense(x: str, name: str) -> str:  # Conv1D of transformers: addmm of rows
            size = weights[f"{name}.weight"].shape
            if not gemm:
                product = self.op("MatMul", x, stored(f"{name}.weight"))
                return str(self.op("Add", product, stored(f"{name}.bias")))
            flat = self.op("Reshape", x, self.constant([-1, size[0]]))
            flat = self.op("Gemm", flat, stored(f"{name}.weight"), stored(f"{name}.bias"))
            shape = self.op("Concat", self.op("Shape", x, end=2), self.constant([size[1]]), axis=0)
            return str(self.op("Reshape", flat, shape))

        def norm(x: str, name: str) -> str:
            both = stored(f"{name}.weight"), stored(f"{name}.bias")
            return str(self.op("LayerNormalization", x, *both, axis=-1, epsilon=EPSILON))

        allowed = self.allowed("input_ids", "attention_mask")
        table = stored("transformer.wte.weight")
        places = self.op("Gather", stored("transformer.wpe.weight"), "position_ids")
        x = self.op("Add", self.op("Gather", table, "input_ids"), places)
        for n in range(LAYERS):
            layer = f"transformer.h.{n}"
            packed = dense(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn")
            names = [f"{self.prefix}/{layer}/split_{part}" for part in "qkv"]
            self.op("Split", packed, self.constant([HIDDEN] * 3), axis=2, outputs=names)
            query, key, value = (self.heads_of(name, HEADS) for name in names)
            keys, values = self.with_past(key, n, "key"), self.with_past(value, n, "value")
            x = self.op("Add", dense(self.attend(query, keys, values, allowed), f"{layer}.attn.c_proj"), x)
            inner = dense(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
            cube = self.op("Mul", self.op("Pow", inner, self.constant(3.0)), self.constant(0.044715))
            bent = self.op("Tanh", self.op("Mul", self.op("Add", inner, cube), self.constant(0.7978845608)))
            bent = self.op("Add", bent, self.constant(1.0))
            gelu = self.op("Mul", self.op("Mul", inner, self.constant(0.5)), bent)
            x = self.op("Add", x, dense(gelu, f"{layer}.mlp.c_proj"))
        x = norm(x, "transformer.ln_f")
        self.op("MatMul", x, self.op("Transpose", table, perm=[1, 0]), outputs=[logits])

    def genai(self, weights: Weights, kv_heads: int) -> None:
        """Llama as the model builder of onnxruntime-genai writes it."""
        counted = self.op("ReduceSum", "attention_mask", self.constant([1]), keepdims=0)
        lengths = self.op("Cast", self.op("Sub", counted, self.constant([1])), to=TensorProto.INT32)
        total = self.op("Gather", self.op("Shape", "attention_mask"), self.constant(1), axis=0)
        total = self.op("Cast", total, to=TensorProto.INT32)
        angles = np.outer(np.arange(POSITIONS), inverse_frequencies()).astype(np.float32)
        cos, sin = self.weight("cos_cache", np.cos(angles)), self.weight("sin_cache", np.sin(angles))
        table = self.weight("model.embed_tokens.weight", weights["model.embed_tokens.weight"])
        x = self.op("Gather", table, "input_ids")
        added = None
        for n in range(LAYERS):
            layer = f"model.layers.{n}"
            attn = f"{layer}.self_attn"
            x, normed = self.skip_norm(x, added, weights, f"{layer}.input_layernorm.weight")
            packed = np.concatenate([weights[f"{attn}.{name}_proj.weight"] for name in "qkv"])
            qkv = self.op(
                "MatMul", normed, self.weight(f"{attn}.qkv_proj.MatMul.weight", np.ascontiguousarray(packed.T))
            )
            past = [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
            mixed, *_ = self.op(
                "GroupQueryAttention",
                *(qkv, "", "", *past, lengths, total, cos, sin),
                outputs=[f"{attn}/mixed", f"present.{n}.key", f"present.{n}.value"],
                domain=MICROSOFT,
                num_heads=HEADS,
                kv_num_heads=kv_heads,
                scale=SIZE**-0.5,
                do_rotary=1,
                rotary_interleaved=0,
            )
            added = self.linear(mixed, weights, f"{attn}.o_proj", f"{attn}.o_proj.MatMul.weight")
            x, normed = self.skip_norm(x, added, weights, f"{layer}.post_attention_layernorm.weight")
            added = self.feed_forward(normed, weights, layer)
        _, normed = self.skip_norm(x, added, weights, "model.norm.weight")
        head = self.weight("lm_head.MatMul.weight", np.ascontiguousarray(weights["lm_head.weight"].T))
        self.op("MatMul", normed, head, outputs=["logits"])

    def skip_norm(self, x: str, added: str | None, weights: Weights, name: str) -> tuple[str, str]:
        """Return the sum of both inputs, and the norm of it."""
        scale = self.weight(name, weights[name])
        if added is None:
            return x, self.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=EPSILON, stash_type=1)
        outputs = [f"{name}/normed", "", "", f"{name}/sum"]
        options: dict[str, Any] = {"domain": MICROSOFT, "epsilon": EPSILON}
        normed, _, _, total = self.op("SkipSimplifiedLayerNormalization", x, added, scale, outputs=outputs, **options)
        return total, normed


# ---- files -----------------------------------------------------------------------------------------------------------


def value(name: str, kind: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def caches(kv_heads: int, name: str, length: str) -> list[onnx.ValueInfoProto]:
    return [
        value(f"{name}.{n}.{kind}", TensorProto.FLOAT, ("batch_size", kv_heads, length, SIZE))
        for n in range(LAYERS)
        for kind in ("key", "value")
    ]


def tokens(*names: str) -> list[onnx.ValueInfoProto]:
    lengths = {"attention_mask": "past_sequence_length + sequence_length"}
    return [value(name, TensorProto.INT64, ("batch_size", lengths.get(name, "sequence_length"))) for name in names]


def scores(name: str = "logits") -> onnx.ValueInfoProto:
    return value(name, TensorProto.FLOAT, ("batch_size", "sequence_length", VOCABULARY))


def write(
    path: Path,
    decoder: Nodes,
    kv_heads: int,
    inputs: Sequence[onnx.ValueInfoProto],
    functions: Mapping[str, int] = {"": 18},
) -> Path:
    graph = helper.make_graph(
        decoder.nodes,
        "main_graph",
        [*inputs, *caches(kv_heads, "past_key_values", "past_sequence_length")],
        [scores(), *caches(kv_heads, "present", "past_sequence_length + sequence_length")],
        decoder.initializers,
    )
    versions = [helper.make_opsetid(*version) for version in functions.items()]
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)
    onnx.save(model, path)
    return path


def write_llama(path: Path, weights: Weights, kv_heads: int) -> Path:
    decoder = Decoder()
    decoder.llama(weights, kv_heads)
    return write(path, decoder, kv_heads, tokens("input_ids", "attention_mask", "position_ids"))


def write_qwen2_vl(path: Path, weights: Weights, kv_heads: int) -> Path:
    """The text decoder of Qwen2-VL."""
    decoder = Decoder(sections=True)
    decoder.llama(weights, kv_heads)
    positions = value("position_ids", TensorProto.INT64, (len(SECTIONS), "batch_size", "sequence_length"))
    return write(path, decoder, kv_heads, [*tokens("input_ids", "attention_mask"), positions])


def write_gpt2(path: Path, weights: Weights, *, gemm: bool = True) -> Path:
    decoder = Decoder()
    decoder.gpt2(weights, gemm=gemm)
    return write(path, decoder, HEADS, tokens("input_ids", "attention_mask", "position_ids"))


def write_genai(path: Path, weights: Weights, kv_heads: int) -> Path:
    decoder = Decoder()
    decoder.genai(weights, kv_heads)
    return write(path, decoder, kv_heads, tokens("input_ids", "attention_mask"), {"": 18, MICROSOFT: 1})


def keep_last(graph: onnx.GraphProto, name: str, shape: tuple[int, ...]) -> None:
    """Let an input say of how many tokens genai's decoder returns logits, as transformers exports it; 0 means all."""
    head = graph.node.pop()
    hidden, matrix = head.input
    last = Nodes(prefix="/kept")
    start = last.op("Reshape", last.op("Neg", name), last.constant([1]))
    hidden = last.op("Slice", hidden, start, last.constant([2**40]), last.constant([1]))
    last.op("MatMul", hidden, matrix, outputs=["logits"])
    graph.node.extend(last.nodes)
    graph.input.append(value(name, TensorProto.INT64, shape))


def write_merged(path: Path, weights: Weights, *, gemm: bool = True) -> Path:
    """GPT-2 as optimum merged it from two exports: one branch reads the caches, the other does not."""
    branches = {}
    stored: dict[str, TensorProto] = {}
    for name, cached in (("then_branch", True), ("else_branch", False)):
        part = Decoder(prefix=f"{name}:", cached=cached)
        part.gpt2(weights, f"{name}:logits", gemm=gemm)
        stored |= {tensor.name: tensor for tensor in part.initializers}
        outputs = [scores(f"{name}:logits"), *caches(HEADS, f"{name}:present", "total")]
        branches[name] = helper.make_graph(part.nodes, name, [], outputs)
    names = ["logits", *(cache.name for cache in caches(HEADS, "present", "total"))]
    chosen = helper.make_node("If", ["use_cache_branch"], names, "If", **branches)
    flag = value("use_cache_branch", TensorProto.BOOL, (1,))
    merged = Nodes(nodes=[chosen], initializers=list(stored.values()))
    return write(path, merged, HEADS, [*tokens("input_ids", "attention_mask", "position_ids"), flag])
