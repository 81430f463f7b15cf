"""Write the stages of a bundle: each is a bundle with its own part of the graph and the weights that this reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats import safetensors
from pocketzo.formats.bundle import ADAPTER, FILES, MODEL, WEIGHTS, Bundle, ValueSpec, files_of
from pocketzo.formats.files import make_folder, write_file
from pocketzo.formats.probe import PROBE, Probe, write_probe
from pocketzo.formats.safetensors import Entry, file_sha256
from pocketzo.formats.stage import StageSpec
from pocketzo.formats.staging import staged_folder
from pocketzo.runtime.cut import Kept
from pocketzo.runtime.onnx_proto import EXTERNAL, all_nodes, read_graph
from pocketzo.runtime.outputs import probe_batch
from pocketzo.runtime.session import open_unoptimised
from pocketzo.runtime.stages import StagePlan, plan_stages


def stage_path(folder: str | os.PathLike[str], number: int) -> Path:
    """Return the folder of a stage."""
    return Path(folder) / f"stage-{number}"


def split(
    bundle: Bundle, out: str | os.PathLike[str], count: int, shares: Sequence[float] | None = None
) -> list[Bundle]:
    """Cut a bundle into stages, and write each to a folder of its own.

    Parameters
    ----------
    bundle : Bundle
        With a probing batch.
    out : path-like
        A folder that holds no stages yet; the stages become ``stage-0``, ``stage-1`` and so on in it.
    count : int
        How many stages, at least 2.
    shares : sequence of float, optional
        The share of the weights in memory that each stage should have, in any unit; equal ones by default. See
        :class:`pocketzo.runtime.stages.Held`.

    Returns
    -------
    list of Bundle

    Raises
    ------
    BundleError
        The folder of a stage is there already, or two tensors of the whole model have ids that collide.
    NotCuttableError
        The graph has no such stages; says why.
    """
    out = Path(out)
    if bundle.stage is not None:
        raise BundleError(f"{bundle.path}: is a stage already; split the whole bundle")
    for number in range(count):
        if (path := stage_path(out, number)).exists():
            raise BundleError(f"{path}: already exists; choose another folder")
    plans = plan_stages(bundle, count, shares)
    make_folder(out)
    found: list[Bundle] = []
    values: Probe = {}
    sha256 = file_sha256(bundle.trained_path)
    for number, plan in enumerate(plans):
        spec = StageSpec(
            number=number,
            count=count,
            graph_sha256=bundle.graph_sha256,
            weights_sha256=sha256,
            takes=tuple(kept.name for kept in plan.takes),
            gives=tuple(kept.name for kept in plan.gives),
        )
        with staged_folder(stage_path(out, number).resolve(), FILES, replace=False) as folder:
            _write(bundle, plan, spec, folder, values)
        found.append(Bundle.read(stage_path(out, number)))
        values = _given(found[-1], values)
    return found


def _write(bundle: Bundle, plan: StagePlan, spec: StageSpec, folder: Path, values: Mapping[str, NDArray[Any]]) -> None:
    model = read_graph(bundle.model_path)
    plan.reduce(model)
    tensors, places = bundle.map_tensors(), bundle.places
    for file in (WEIGHTS, ADAPTER):
        own = [name for name in plan.tensors if places[name][0].name == file]
        if own or file == WEIGHTS:
            safetensors.write(folder / file, ((name, tensors[name]) for name in own))
    _point(model.graph, places, folder)
    write_file(folder / MODEL, model.SerializeToString())
    sets = {tensor.name: tensor.sets for tensor in bundle.tensors}
    files = files_of(folder, sets)
    ids = {tensor.name: tensor.id for tensor in bundle.tensors}
    for tensor in files["tensors"]:
        if tensor.id != ids[tensor.name]:
            raise BundleError(
                f"{bundle.path}: {tensor.name!r} has an id that collides with that of another tensor, so that its "
                "stage would draw other noise; rename it in the export"
            )
    read = {value.name for value in model.graph.input}
    inputs = tuple(value for value in bundle.inputs if value.name in read)
    inputs += tuple(_spec(kept) for kept in plan.takes if kept.name in read)
    made = {value.name for value in model.graph.output}
    outputs = tuple(value for value in bundle.outputs if value.name in made)
    outputs += tuple(_spec(kept) for kept in plan.gives if kept.name in made)
    probe = probe_batch(bundle) | dict(values)
    probe = {value.name: probe[value.name] for value in inputs}
    write_probe(folder / PROBE, probe)
    stored = set(plan.tensors)
    replace(
        bundle,
        path=folder,
        frozen=tuple(tensor for tensor in bundle.frozen if tensor.name in stored),
        inputs=inputs,
        outputs=outputs,
        loss=bundle.loss if bundle.loss in made else None,
        logits=bundle.logits if bundle.logits in made else None,
        task=bundle.task if spec.is_last else None,
        tokenizer=None,
        probe=probe,
        generation=None,
        side=None,
        added=(),
        stage=spec,
        **files,
    ).write_description()


def _spec(kept: Kept) -> ValueSpec:
    return ValueSpec(kept.name, kept.sizes.dtype.name, kept.axes)


def _point(graph: Any, places: Mapping[str, tuple[Path, Entry]], folder: Path) -> None:
    """Point the initializers of a whole bundle's graph to their places in a stage's files."""
    before = {(path.name, entry.start): name for name, (path, entry) in places.items()}
    after = {
        name: entry
        for file in (WEIGHTS, ADAPTER)
        if (folder / file).is_file()
        for name, entry in safetensors.read_header(folder / file).items()
    }
    for tensor in _initializers(graph):
        if tensor.data_location != EXTERNAL:
            continue
        items = {item.key: item for item in tensor.external_data}
        entry = after[before[items["location"].value, int(items["offset"].value)]]
        items["offset"].value = str(entry.start)


def _initializers(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in all_nodes(graph):
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from inner.initializer


def _given(stage: Bundle, values: Mapping[str, NDArray[Any]]) -> Probe:
    """Return what a stage gives to the next one for its probing batch."""
    assert stage.stage is not None
    names = [name for name in stage.stage.gives if name not in stage.stage.passed]
    if not names:
        return {}
    found = open_unoptimised(stage, {}).run(names, dict(probe_batch(stage)))
    given = dict(zip(names, (np.asarray(value) for value in found), strict=True))
    return given | {name: values[name] for name in stage.stage.passed}
