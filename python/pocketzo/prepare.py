"""Turn an ONNX file, as exporters write it, into a bundle whose weights can be trained in place."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnxruntime as ort

from pocketzo.errors import BundleError, DeadWeightError, MissingExtraError
from pocketzo.formats.bundle import FLOATS, MODEL, TOKENIZER, WEIGHTS, Bundle, TensorSpec, staged_folder, tensor_ids
from pocketzo.formats.safetensors import file_sha256, header_bytes, read_header, write
from pocketzo.runtime.liveness import probe_batch
from pocketzo.tasks.registry import task_for

if TYPE_CHECKING:
    from pocketzo.onnx_graph import Weight

__all__ = ["prepare"]


def prepare(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    trainable: str | Callable[[str], bool] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> Bundle:
    """Turn an ONNX model into a bundle.

    The graph computes what it did, from weights that lie outside of it in the form in which its nodes read them. If it
    has no ``loss`` but class scores (an output named ``logits``, or a single one of shape [batch, classes]), it gets an
    int64 input ``labels`` and an output ``loss``, the mean cross-entropy: labels of shape [batch] for logits [batch,
    classes], or [batch, sequence] for logits [batch, sequence, classes], where tokens labelled -100 do not count. A
    causal model's labels have to be the tokens shifted by one; the graph does not shift them.

    Weights are read through memory maps and written one at a time. A model with external data never has more than its
    largest tensor in memory; one without has its file twice.

    Parameters
    ----------
    model : path-like
        An ONNX file of opset 13 or later, its external data beside it; weights in float32.
    out : path-like
        The folder to write. A bundle that is already there is replaced when the new one is complete.
    tokenizer : path-like, optional
        The model's ``tokenizer.json``, to go with it.
    labels : sequence of str, optional
        The names of the classes, as many as the logits have.
    max_length : int, optional
        Number of tokens at which texts are to be cut.
    trainable : str or callable, optional
        Which of the weights may be trained: a regular expression to be found in their names, or a function of the
        name. By default all are that operators use as weights: the matrices, tables, biases and scales.
    dtype : {"float32", "float16"}
        In which type weights are stored and, on processors with fp16 arithmetic, computed with. float16 takes half the
        memory; inputs, outputs and the loss that is added stay float32. On x86-64 the runtime converts each weight
        whenever it uses it, so that it is slow there.

    Returns
    -------
    Bundle
        What was written.

    Raises
    ------
    BundleError
        If the model, its external data or the tokenizer cannot be used, the labels do not fit, the model computes
        something else in float16, or ``out`` exists and is not a bundle. Nothing is written then.
    DeadWeightError
        If the runtime would not see changes of a weight that is to be trained.
    MissingExtraError
        If the package onnx is not installed.
    """
    try:
        from pocketzo import onnx_graph
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "prepare") from error

    model = Path(model)
    if not model.is_file():
        raise BundleError(f"{model}: no such file")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be {' or '.join(map(repr, FLOATS))}, got {dtype!r}")
    class_names = _checked_labels(labels)
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"max_length must be a positive integer or None, got {max_length!r}")
    if tokenizer is not None:
        _check_tokenizer(Path(tokenizer))
    wanted = _name_filter(trainable)

    with staged_folder(out) as folder:
        try:
            proto = onnx_graph.read_model(model)
            weights = onnx_graph.extract_weights(proto, model.parent)
            chosen = _choose(weights, wanted)
            onnx_graph.drop_provenance(proto)
            if dtype == "float16":
                proto = onnx_graph.to_float16(proto, weights)
            loss, logits = onnx_graph.add_loss(proto)
            inputs = tuple(map(onnx_graph.describe, proto.graph.input))
            outputs = tuple(map(onnx_graph.describe, proto.graph.output))
        except (BundleError, DeadWeightError) as error:
            raise type(error)(f"{model}: {error}") from None
        classes = next((value.shape[-1] for value in outputs if value.name == logits), None)
        if class_names is not None and isinstance(classes, int) and classes != len(class_names):
            raise BundleError(f"{model}: {len(class_names)} labels given, but {logits!r} has {classes} classes")
        if class_names is not None and logits is None:
            raise BundleError(f"{model}: labels given, but the graph has no output 'logits' to which they could belong")
        task = task_for(inputs, outputs, logits, class_names)
        if class_names is not None and task is None:
            raise BundleError(f"{model}: labels given, but {logits!r} and the input 'labels' do not fit to classes")

        write(
            folder / WEIGHTS,
            ((weight.name, weight.array) for weight in weights),
            {weight.name: weight.dtype for weight in weights},
        )
        entries = read_header(folder / WEIGHTS)
        onnx_graph.point_to_weights(proto, weights, WEIGHTS, entries)
        (folder / MODEL).write_bytes(proto.SerializeToString(deterministic=True))
        session = _open(model, os.fspath(folder / MODEL))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        ids = tensor_ids(entries)
        bundle = Bundle(
            path=folder,
            tensors=tuple(
                TensorSpec(
                    weight.name,
                    ids[weight.name],
                    weight.dtype.name,
                    weight.array.shape,
                    sets=("all",) if weight.name in chosen else (),
                )
                for weight in weights
            ),
            inputs=inputs,
            outputs=outputs,
            loss=loss,
            logits=logits,
            task=task,
            max_length=max_length,
            tokenizer=TOKENIZER if tokenizer is not None else None,
            graph_sha256=file_sha256(folder / MODEL),
            base_sha256=file_sha256(folder / WEIGHTS),
            header_sha256=hashlib.sha256(header_bytes(folder / WEIGHTS)).hexdigest(),
        )
        if dtype == "float16":
            _check_float16(model, bundle, session)
        del session  # which maps a file of the folder that is now renamed
        bundle.write_description()
    return Bundle.read(out)


def _choose(weights: Sequence[Weight], wanted: Callable[[str], bool]) -> set[str]:
    """Return the names of the weights that are to be trained; refuse those whose changes would not be seen."""
    parameters = [weight for weight in weights if weight.parameter]
    if not parameters:
        raise BundleError("the graph has no float32 weights that could be trained")
    chosen = [weight for weight in parameters if wanted(weight.name)]
    if not chosen:
        raise BundleError(f"'trainable' matches none of the {len(parameters)} weights, such as {parameters[0].name!r}")
    for weight in chosen:
        if weight.dead is not None:
            raise DeadWeightError(
                f"node {weight.dead} makes another tensor of weight {weight.name!r} and constants alone, so that the "
                "runtime computes it only once and sees no change of the weight; export the model with dynamic axes "
                "and constants folded, or leave this weight out of 'trainable'"
            )
    return {weight.name for weight in chosen}


def _name_filter(trainable: str | Callable[[str], bool] | None) -> Callable[[str], bool]:
    if trainable is None:
        return lambda name: True
    if callable(trainable):
        return trainable
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise ValueError(f"trainable is not a regular expression: {trainable!r}: {error}") from None
    return lambda name: pattern.search(name) is not None


def _checked_labels(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if isinstance(labels, str) or not all(type(label) is str for label in labels):
        raise TypeError(f"labels must be a sequence of str, got {labels!r}")
    if not labels or not all(labels) or len(set(labels)) != len(labels):
        raise ValueError(f"labels must be different names, none of them empty, got {list(labels)!r}")
    return tuple(labels)


def _check_tokenizer(path: Path) -> None:
    try:
        if isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file") from None
    except (OSError, ValueError):
        pass
    raise BundleError(f"{path}: not a tokenizer.json: expected a JSON object")


def _check_float16(source: Path, bundle: Bundle, session: ort.InferenceSession) -> None:
    """Run the model as it was and as it is in float16 on a small batch, and refuse one that becomes another.

    On processors without fp16 arithmetic the runtime computes in float32, so that what overflows would only be seen
    elsewhere: hence a look at each value of the model as it was.
    """
    from pocketzo import onnx_graph

    proto = onnx_graph.read_model(source)
    names = [value.name for value in proto.graph.output]
    onnx_graph.expose_activations(proto)
    original = _open(source, proto.SerializeToString())
    batch = probe_batch(bundle)
    advice = "prepare the model in float32"
    try:
        asked = {value.name for value in original.get_inputs()}
        values = original.run(None, {name: array for name, array in batch.items() if name in asked})
        got = session.run(names, batch)
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{source}: a run on a probing batch failed: {error}") from error
    floats = [
        (output.name, value)
        for output, value in zip(original.get_outputs(), values, strict=True)
        if isinstance(value, np.ndarray) and value.dtype == np.float32
    ]
    for name, value in floats:
        largest = value[np.isfinite(value)].max(initial=0)  # what is far below zero is a mask
        if largest > onnx_graph.MOST_FLOAT16:
            raise BundleError(
                f"{source}: {name!r} reaches {largest:g} on a probing batch, and float16 ends at "
                f"{onnx_graph.MOST_FLOAT16:g}: {advice}"
            )
    found = dict(zip(names, got, strict=True))
    for name, expected in floats:
        if name in found:
            size = np.abs(expected).max(initial=0, where=np.isfinite(expected))
            apart = np.abs(found[name] - expected).max(initial=0, where=np.isfinite(expected))
            if not apart <= 0.05 * size + 1e-3:
                raise BundleError(
                    f"{source}: in float16 the output {name!r} is off by {apart:.3g} where it reaches {size:.3g} (a "
                    f"constant may be beyond 6e-08 .. {onnx_graph.MOST_FLOAT16:g}): {advice}"
                )


def _open(source: Path, graph: str | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # so that the weights are only mapped
    if isinstance(graph, bytes):
        folder = os.fspath(source.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{source}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from None
