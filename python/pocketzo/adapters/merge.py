"""Fold LoRA and (IA)3 into the weights that they change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo.adapters.strip import strip
from pocketzo.adapters.tuned import Tuned
from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec, Place
from pocketzo.formats.bundle import FLOATS, MODEL, WEIGHTS, Bundle, TensorSpec, tensor_ids
from pocketzo.formats.bundle_writer import check_target, staged_bundle
from pocketzo.formats.files import copy_file, write_file
from pocketzo.formats.generation import GENERATE
from pocketzo.formats.probe import PROBE
from pocketzo.formats.safetensors import Entry, file_sha256, header_bytes, read_header, write
from pocketzo.runtime.onnx_proto import read_graph
from pocketzo.runtime.subgraph import point_to

_ORDER = ("lora", "ia3")  # factors are applied to what LoRA has changed
_ASIDE = "keep the adapter beside the model: 'pocketzo replay' writes the tuned bundle"


def merge_tuned(tuned: Tuned, out: str | os.PathLike[str], *, overwrite: bool = False) -> Bundle:
    """Write a bundle without the added tensors, whose weights contain them.

    One matrix at a time is in memory. Needs protobuf, which onnxruntime brings, and not the package onnx.

    Parameters
    ----------
    tuned : Tuned
        Prepared with ``lora`` or ``ia3``.
    out : path-like
        The new folder.
    overwrite : bool
        Whether a bundle there is replaced.

    Returns
    -------
    Bundle
        As :func:`pocketzo.prepare` makes it without the added sets: with ``train="all"`` if there were no others.

    Raises
    ------
    BundleError
        Something that was added cannot be folded, as the weight is quantised, or is read elsewhere, too; names it.
    NotPrepackableError
        The package protobuf is not installed.
    """
    bundle = tuned.bundle
    added = sorted(tuned.added, key=lambda item: _ORDER.index(item.kind) if item.kind in _ORDER else -1)
    check_target(out, overwrite=overwrite, base=bundle)
    _check(bundle, added)
    dropped = {name for item in added for name in item.tensors}
    kept = [tensor for tensor in bundle.tensors if tensor.name not in dropped]
    with staged_bundle(out, overwrite=overwrite, base=bundle) as folder:
        write(folder / WEIGHTS, ((tensor.name, tuned.tensors[tensor.name]) for tensor in kept))
        entries = read_header(folder / WEIGHTS)
        for item in added:
            fold(tuned, item, folder / WEIGHTS, entries)
        for name in (MODEL, GENERATE):
            if (bundle.path / name).is_file():
                write_file(folder / name, _stripped(bundle.path / name, added, entries))
        generation = bundle.generation
        if generation is not None:
            generation = replace(generation, graph_sha256=file_sha256(folder / GENERATE))
        for beside in (bundle.tokenizer, None if bundle.probe is None else PROBE):
            if beside is not None:
                copy_file(bundle.path / beside, folder / beside)
        if generation is not None and generation.chat_template is not None:
            copy_file(bundle.path / generation.chat_template, folder / generation.chat_template)
        tensors, frozen = _sets(bundle, kept, dropped)
        merged = replace(
            bundle,
            path=folder,
            tensors=tensors,
            frozen=frozen,
            graph_sha256=file_sha256(folder / MODEL),
            base_sha256=file_sha256(folder / WEIGHTS),
            header_sha256=hashlib.sha256(header_bytes(folder / WEIGHTS)).hexdigest(),
            generation=generation,
            adapter=None,
            added=(),
        )
        merged.write_description()
    return Bundle.read(out)


def _check(bundle: Bundle, added: Iterable[AddedSpec]) -> None:
    dtypes = {tensor.name: tensor.dtype for tensor in bundle.tensors}
    for item in added:
        place = item.place
        if place is None:
            what = "it changes keys and values, and no weight" if item.kind == "prefix" else "it has a ReLU inside"
            raise BundleError(f"{bundle.path}: {item.part!r} cannot be merged: {what}; {_ASIDE}")
        fault = place.fault
        for name in (place.weight, *place.biases):
            dtype = dtypes.get(name)
            if dtype is None and fault is None:
                fault = f"{name!r} is inside the graph"
            elif dtype not in FLOATS and fault is None:
                raise BundleError(
                    f"{bundle.path}: {item.tensors[0]!r} cannot be merged into {name!r}, which is quantised ({dtype}): "
                    f"train and merge with a bundle of a float32 or float16 export, or {_ASIDE}"
                )
        if fault is not None:
            raise BundleError(f"{bundle.path}: {item.tensors[0]!r} cannot be merged: {fault}; {_ASIDE}")


def fold(tuned: Tuned, item: AddedSpec, path: Path, entries: Mapping[str, Entry]) -> None:
    """Change a weight, and for factors its bias, in a file of weights."""
    place = item.place
    assert place is not None, "checked before"
    values = [tuned.float32(name) for name in item.tensors]
    for name in (place.weight, *(place.biases if item.kind == "ia3" else ())):
        tensor = tuned.tensors[name]
        memory = np.memmap(path, tensor.dtype.newbyteorder("<"), "r+", entries[name].start, tensor.shape)
        if name == place.weight:
            change(item, place, memory.T if place.transposed else memory, values)
        else:
            part = memory[..., place.start : place.start + place.count]
            part[...] = part.astype(np.float32) * values[0]
        memory.flush()


def change(item: AddedSpec, place: Place, matrix: NDArray[Any], values: list[NDArray[np.float32]]) -> None:
    """Change a matrix [rows, columns] in place, of float32 or float16; computed in float32."""
    columns = slice(place.start, place.start + place.count)
    if item.kind == "lora":
        assert item.alpha is not None, "every LoRA has one"
        down, up = values
        part = matrix[:, columns]
        part[...] = part.astype(np.float32) + (down @ up) * np.float32(item.alpha / up.shape[0])
    elif place.input:
        matrix[columns] = matrix[columns].astype(np.float32) * values[0][:, None]
    else:
        matrix[:, columns] = matrix[:, columns].astype(np.float32) * values[0]


def _stripped(path: Path, added: Iterable[AddedSpec], entries: Mapping[str, Entry]) -> bytes:
    model = read_graph(path)
    strip(model.graph, added)
    point_to(model.graph, entries)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _sets(
    bundle: Bundle, kept: Iterable[TensorSpec], dropped: set[str]
) -> tuple[tuple[TensorSpec, ...], tuple[Any, ...]]:
    """Return the tensors with their ids and sets, and what is frozen."""
    kept = list(kept)
    ids = tensor_ids(tensor.name for tensor in kept)
    frozen = tuple(tensor for tensor in bundle.frozen if tensor.name not in dropped)
    tensors = [replace(tensor, id=ids[tensor.name]) for tensor in kept]
    if not any(tensor.trainable for tensor in tensors):
        able = {tensor.name for tensor in frozen if tensor.kind == "request"}
        tensors = [replace(tensor, sets=("all",)) if tensor.name in able else tensor for tensor in tensors]
        frozen = tuple(tensor for tensor in frozen if tensor.name not in {one.name for one in tensors if one.trainable})
    return tuple(tensors), frozen
