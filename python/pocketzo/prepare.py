"""Convert an exported ONNX file to a bundle whose weights can be trained in place."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pocketzo.errors import BundleError, DeadWeightError, MissingExtraError
from pocketzo.formats.bundle import FLOATS, MODEL, TOKENIZER, WEIGHTS, Bundle, TensorSpec, tensor_ids
from pocketzo.formats.bundle_writer import staged_bundle
from pocketzo.formats.files import copy_file, write_file
from pocketzo.formats.safetensors import file_sha256, header_bytes, read_header, write
from pocketzo.runtime.outputs import probe_batch
from pocketzo.tasks.registry import task_for

if TYPE_CHECKING:
    from pocketzo.graph.weight import Weight

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
    overwrite: bool = False,
) -> Bundle:
    """Turn an ONNX model into a bundle.

    The graph computes the same function, from weights in a file of their own, stored as its nodes read them. If it
    has no ``loss`` but class scores (an output named ``logits``, or a single one of shape [batch, classes]), it gets an
    int64 input ``labels`` and an output ``loss``, the mean cross-entropy: labels of shape [batch] for logits [batch,
    classes], or [batch, sequence] for logits [batch, sequence, classes], where tokens labelled -100 do not count. A
    causal model's labels have to be the tokens shifted by one; the graph does not shift them.

    Weights are read through memory maps and written one at a time. A model with external data never has more than its
    largest tensor in memory; one without has its file twice.

    Parameters
    ----------
    model : path-like
        An ONNX file of opset 13 or later, with external data files in the same folder. Weights must be float32.
    out : path-like
        The folder to write.
    tokenizer : path-like, optional
        The model's ``tokenizer.json``, copied into the bundle.
    labels : sequence of str, optional
        The names of the classes, as many as the logits have.
    max_length : int, optional
        Texts are truncated to this number of tokens.
    trainable : str or callable, optional
        Selects the trainable weights: a regular expression that is searched for in their names, or a predicate of the
        name. By default all tensors that operators use as weights are trainable: matrices, embedding tables, biases and
        scales.
    dtype : {"float32", "float16"}
        The storage type of the weights; also the type of the arithmetic where the CPU supports fp16 arithmetic. float16
        halves the memory. Inputs, outputs and the added loss stay float32. float16 is slow on x86-64, because the
        runtime converts each weight at every use.
    overwrite : bool
        Whether a bundle at ``out`` is replaced, when the new one is complete. A folder that holds anything besides a
        bundle's files is never replaced.

    Returns
    -------
    Bundle
        The bundle written.

    Raises
    ------
    BundleError
        If the model, its external data or the tokenizer cannot be used, the labels do not match, the model exceeds the
        range of float16 or its outputs differ too much in it, or ``out`` exists and may not be replaced. Nothing is
        written in these cases.
    DeadWeightError
        If the runtime would not see changes of a trainable weight.
    MissingExtraError
        If the package onnx is not installed.
    """
    try:
        from pocketzo.graph.extract import extract_weights, point_to_weights
        from pocketzo.graph.float16 import check_float16, open_unoptimised, to_float16
        from pocketzo.graph.loss import add_loss
        from pocketzo.graph.read import describe, drop_provenance, read_model, to_bytes
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "onnx", "prepare") from error

    source = Path(model)
    if not source.is_file():
        raise BundleError(f"{source}: no such file")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be {' or '.join(map(repr, FLOATS))}, got {dtype!r}")
    class_names = _checked_labels(labels)
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"max_length must be a positive integer or None, got {max_length!r}")
    if tokenizer is not None:
        _check_tokenizer(Path(tokenizer))
    wanted = _name_filter(trainable)

    with staged_bundle(out, overwrite=overwrite) as folder:
        try:
            onnx_model = read_model(source)
            weights = extract_weights(onnx_model, source.parent)
            chosen = _choose(weights, wanted)
            drop_provenance(onnx_model)
            if dtype == "float16":
                onnx_model = to_float16(onnx_model, weights)
            loss, logits = add_loss(onnx_model)
            inputs = tuple(map(describe, onnx_model.graph.inputs))
            outputs = tuple(map(describe, onnx_model.graph.outputs))
        except (BundleError, DeadWeightError) as error:
            raise type(error)(f"{source}: {error}") from None
        classes = next((value.shape[-1] for value in outputs if value.name == logits), None)
        if class_names is not None and isinstance(classes, int) and classes != len(class_names):
            raise BundleError(f"{source}: {len(class_names)} labels given, but {logits!r} has {classes} classes")
        if class_names is not None and logits is None:
            raise BundleError(
                f"{source}: labels given, but the graph has no output 'logits' to which they could belong"
            )
        task = task_for(inputs, outputs, logits, class_names)
        if class_names is not None and task is None:
            raise BundleError(f"{source}: labels given, but {logits!r} and the input 'labels' do not fit to classes")

        write(
            folder / WEIGHTS,
            ((weight.name, weight.array) for weight in weights),
            {weight.name: weight.dtype for weight in weights},
        )
        entries = read_header(folder / WEIGHTS)
        point_to_weights(onnx_model, weights, WEIGHTS, entries)
        write_file(folder / MODEL, to_bytes(onnx_model))
        session = open_unoptimised(source, os.fspath(folder / MODEL))
        if tokenizer is not None:
            copy_file(Path(tokenizer), folder / TOKENIZER)
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
            check_float16(source, session, probe_batch(bundle))
        del session  # it maps a file of the folder, which is renamed next
        bundle.write_description()
    return Bundle.read(out)


def _choose(weights: Sequence[Weight], wanted: Callable[[str], bool]) -> set[str]:
    """Return the names of the trainable weights; raise DeadWeightError if the runtime would not see writes to one."""
    parameters = [weight for weight in weights if weight.parameter]
    if not parameters:
        raise BundleError("the graph has no float32 weights that could be trained")
    chosen = [weight for weight in parameters if wanted(weight.name)]
    if not chosen:
        raise BundleError(f"'trainable' matches none of the {len(parameters)} weights, such as {parameters[0].name!r}")
    for weight in chosen:
        if weight.folded_by is not None:
            raise DeadWeightError(
                f"node {weight.folded_by} makes another tensor of weight {weight.name!r} and constants alone, so that "
                "the runtime computes it only once and sees no change of the weight; export the model with dynamic "
                "axes and constants folded, or leave this weight out of 'trainable'"
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
