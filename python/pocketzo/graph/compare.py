"""Check on a small batch that a bundle computes what its source computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes import common

from pocketzo.errors import BundleError, first_line
from pocketzo.formats.bundle import Bundle, ValueSpec
from pocketzo.formats.probe import Probe, check_probe, other_branches
from pocketzo.graph.decoder import TOKENS
from pocketzo.graph.float16 import MOST_FLOAT16, check_range, open_with_activations
from pocketzo.graph.language import LOGITS, LanguageGraph, check_scores
from pocketzo.graph.opset import too_old
from pocketzo.graph.probe import index_limits, made_up_batches
from pocketzo.graph.read import CONVERTED, describe
from pocketzo.graph.real_tokens import caches_of, cut_front, draw_tokens, put_in_front
from pocketzo.graph.sessions import open_graph, open_source

Array = NDArray[Any]


class Tolerance(NamedTuple):
    """How far an element may be off: a share of the output's largest element, and an amount."""

    relative: float
    absolute: float


_FLOAT32: Final = Tolerance(1e-4, 1e-5)
"""Sums in another order: 2^-24 by operation, and some thousand of them in a row."""
_COARSE: Final = Tolerance(5e-2, 1e-3)
"""16-bit floats round by 2^-11 or 2^-9, and 8-bit integers move by 2^-8 of their range if a rounding tips them over."""

_MASKED: Final = 1e30
"""Elements from here on are what masks add, or infinite."""
_16_BIT: Final = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Origin:
    """What is kept of a model as it was exported, to compare its bundle with it; no weights.

    Attributes
    ----------
    path : Path
    inputs : tuple of ValueSpec
    external : bool
        Whether weights are in external data.
    limits : mapping of str to int
        See :func:`index_limits`.
    branches : bool
        Whether the graph chooses between subgraphs.
    coarse : bool
        Whether it rounds to less than float32 on its way.
    converted : int or None
        The operator set that it was converted from.
    """

    path: Path
    inputs: tuple[ValueSpec, ...]
    external: bool
    limits: Mapping[str, int]
    branches: bool
    coarse: bool
    converted: int | None

    @classmethod
    def of(cls, path: Path, model: ir.Model) -> Origin:
        """Look at a graph that :func:`read_model` has returned."""
        nodes = list(model.graph.all_nodes())
        values = (value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None)
        tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
        return cls(
            path=path,
            inputs=tuple(map(describe, model.graph.inputs)),
            external=any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors),
            limits=index_limits(model.graph),
            branches=any(node.op_type == "If" for node in nodes),
            coarse=any(map(_rounds, nodes)) or any(value.dtype in _16_BIT for value in values),
            converted=model.meta.get(CONVERTED),
        )


def _rounds(node: ir.Node) -> bool:
    """Return whether a node rounds what it computes to 16-bit floats or to integers."""
    if node.op_type == "Cast":
        return node.attributes["to"].as_int() in _16_BIT
    if node.op_type == "MatMulNBits":  # of accuracy level 4, it quantises what it multiplies
        level = node.attributes.get("accuracy_level")
        return level is not None and level.as_int() == 4
    return node.op_type == "QuantizeLinear" or node.op_type.startswith("DynamicQuantize")


def check_same_function(origin: Origin, bundle: Bundle, outputs: Mapping[str, str], probe: Probe | None) -> Probe:
    """Check that a bundle computes what its source computes, on a small batch; return the batch.

    Both are run without optimisations, one after the other: their sessions map external data, and onnxruntime reads
    the file of a model without it. A graph with branches is also run on batches that may take others.

    Parameters
    ----------
    origin : Origin
    bundle : Bundle
        With its graph and weights in place.
    outputs : mapping of str to str
        The names of the source's outputs that the bundle kept, and the names that they have there.
    probe : dict of str to ndarray or None
        The batch, which has an array for each of the source's inputs; by default it is made up.

    Returns
    -------
    dict of str to ndarray
        An array for each of the bundle's inputs.

    Raises
    ------
    BundleError
        The source does not run on the batch, the bundle or its loss does not, or an output differs: names it, and how
        far it is off.
    """
    runs = _checked_runs(origin, bundle, list(outputs), probe)
    session = open_graph(origin.path, bundle.model_path)
    feeds = []
    for batch, expected in zip(runs.batches, runs.values, strict=True):
        feed = _with_labels(bundle, batch, {outputs[name]: value for name, value in expected.items()})
        feeds.append(feed)
        got = _run_bundle(origin, bundle, session, list(outputs.values()), feed)
        _check_length(origin, bundle, feed, got)
        for name, output in outputs.items():
            _check_output(origin, bundle, name, got[output], expected[name], random=runs.random)
    return check_probe({value.name: feeds[0][value.name] for value in bundle.inputs}, bundle.inputs)


def check_language_graphs(
    origin: Origin,
    bundle: Bundle,
    outputs: list[str],
    graph: LanguageGraph,
    probe: Probe | None,
    front: tuple[int, ...] = (),
) -> Probe:
    """Check that both graphs of a language model's bundle compute what their source computes, as above.

    The graph that generates text, if there is one, has the source's inputs and outputs. The training graph has to give
    the losses that follow from the source's logits of all tokens.

    Parameters
    ----------
    origin : Origin
    bundle : Bundle
        With its graphs and weights in place.
    outputs : list of str
        The names of the source's outputs.
    graph : LanguageGraph
        The training graph.
    probe : dict of str to ndarray or None
        As above.
    front : tuple of int
        Tokens that the bundle has in front of each text: the source reads them.

    Returns
    -------
    dict of str to ndarray
        An array for each of the training graph's inputs.

    Raises
    ------
    BundleError
        As above; or the batch is none for a language model, or the source has no logits for each of its tokens.
    """
    if bundle.generation is None:
        outputs = [LOGITS]
    runs = _checked_runs(origin, bundle, outputs, probe, front)
    if bundle.generation is not None:
        session = open_graph(origin.path, bundle.generate_path)
        for batch, expected in zip(runs.batches, runs.values, strict=True):
            got = _run_bundle(origin, bundle, session, outputs, batch)
            for name in outputs:
                _check_output(origin, bundle, name, got[name], expected[name], random=runs.random)
        del session
    batch, logits = runs.batches[0], runs.values[0][LOGITS]
    try:
        check_scores(logits.shape, batch[TOKENS].shape)
        feed = {**batch, **graph.feed(batch)}
    except BundleError as error:
        raise BundleError(f"{origin.path}: {error}") from None
    losses = graph.expected(logits, feed)
    got = _run_bundle(origin, bundle, open_graph(origin.path, bundle.model_path), list(losses), feed)
    for name, value in losses.items():
        _check_output(origin, bundle, name, got[name], value, random=[name] if LOGITS in runs.random else [])
    return check_probe({value.name: feed[value.name] for value in bundle.inputs}, bundle.inputs)


def begin_as_tokens(origin: Origin, count: int) -> tuple[tuple[int, ...], dict[str, Array]]:
    """Return tokens, and their keys and values, float32 [heads, tokens, size], by the names of the source's caches."""
    session = _open_source(origin)
    tokens = draw_tokens(session, origin.inputs, count)
    return tokens, caches_of(session, origin.inputs, tokens)


def _checked_runs(
    origin: Origin, bundle: Bundle, outputs: list[str], probe: Probe | None, front: tuple[int, ...] = ()
) -> _Runs:
    """Run the source, and check that what it computes can be compared."""
    runs = _run_source(origin, outputs, probe, front)
    if bundle.is_fp16:
        _check_range(origin, runs.batches)
    if runs.random:
        warnings.warn(
            f"{origin.path}: not compared with the source, as it differs from run to run: {', '.join(runs.random)}",
            stacklevel=4,
        )
    return runs


def _check_output(origin: Origin, bundle: Bundle, name: str, got: Array, expected: Array, *, random: list[str]) -> None:
    """Raise BundleError if an output differs from the source's by more than roundings."""
    tolerance = _COARSE if origin.coarse or bundle.is_fp16 else _FLOAT32
    fault = None if name in random else _difference(got, expected, tolerance)
    if fault is not None:
        raise BundleError(_refusal(origin, bundle, name, fault))


# ---- the source ------------------------------------------------------------------------------------------------------


class _Runs(NamedTuple):
    """The batches on which the source ran, its outputs by name, and the names of those that differ from run to run."""

    batches: list[Probe]
    values: list[dict[str, Array]]
    random: list[str]


def _run_source(origin: Origin, outputs: list[str], probe: Probe | None, front: tuple[int, ...]) -> _Runs:
    session = _open_source(origin)

    def run(batch: Probe) -> dict[str, Array]:
        if front:
            return cut_front(_run(session, outputs, put_in_front(batch, front)), len(front))
        return _run(session, outputs, batch)

    if probe is not None:
        try:
            first, values = probe, run(probe)
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise BundleError(
                f"{origin.path}: the model does not run on the given batch: {first_line(error)}"
            ) from None
    else:
        first, values = _first_that_runs(origin, run)
    again = run(first)
    runs = _Runs([first], [values], [name for name in outputs if not _same(values[name], again[name])])
    if origin.branches:
        for batch in other_branches(first):
            try:
                runs.values.append(run(batch))
            except Exception:  # not every flag can be turned
                continue
            runs.batches.append(batch)
    return runs


def _open_source(origin: Origin) -> ort.InferenceSession:
    try:
        return open_source(origin.path, external=origin.external)
    except BundleError as error:
        if origin.converted is None:
            raise
        reason = str(error).removeprefix(f"{origin.path}: ")
        raise BundleError(f"{origin.path}: {too_old(origin.converted, reason)}") from None


def _check_range(origin: Origin, batches: list[Probe]) -> None:
    """Check that no value of the source is too large for float16."""
    session = open_with_activations(origin.path)
    everything = [value.name for value in session.get_outputs()]
    for batch in batches:
        try:
            values = _run(session, everything, batch)
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise BundleError(
                f"{origin.path}: the model does not run where each of its values is an output: {first_line(error)}"
            ) from None
        check_range(origin.path, values)


def _first_that_runs(origin: Origin, run: Callable[[Probe], dict[str, Array]]) -> tuple[Probe, dict[str, Array]]:
    """Return the first made-up batch on which the source runs, preferably to outputs that are numbers."""
    found = None
    reason = ""
    shapes = ""
    try:
        for batch in made_up_batches(origin.inputs, origin.limits):
            try:
                values = run(batch)
            except Exception as error:  # onnxruntime's own exceptions share no public base
                reason = reason or first_line(error)
                shapes = shapes or ", ".join(f"{name} {list(array.shape)}" for name, array in batch.items())
                continue
            found = found or (batch, values)
            if any(array.dtype.kind != "f" or np.isfinite(array).any() for array in values.values()):
                return batch, values
    except BundleError as error:
        raise BundleError(f"{origin.path}: {error}") from None
    if found is None:
        raise BundleError(
            f"{origin.path}: the model runs on none of the batches that its inputs suggest; give one by --probe "
            f"batch.npz, an array for each input. With {shapes}: {reason}"
        )
    return found


def _run(session: ort.InferenceSession, outputs: list[str], batch: Mapping[str, Array]) -> dict[str, Array]:
    taken = {value.name for value in session.get_inputs()}
    values = session.run(outputs, {name: array for name, array in batch.items() if name in taken})
    return {name: value for name, value in zip(outputs, values, strict=True) if isinstance(value, np.ndarray)}


# ---- the bundle ------------------------------------------------------------------------------------------------------


def _with_labels(bundle: Bundle, batch: Probe, values: Mapping[str, Array]) -> Probe:
    """Add the input of a loss that was added: zeros, as many as there are scores."""
    scores = values.get(bundle.logits or "", next(iter(values.values()), np.empty(())))
    feed = dict(batch)
    for value in bundle.inputs:
        if value.name not in feed:
            shape = [
                size if isinstance(size, int) else scores.shape[axis] if axis < scores.ndim else 1
                for axis, size in enumerate(value.shape)
            ]
            feed[value.name] = np.zeros(shape, value.dtype)
    return feed


def _run_bundle(
    origin: Origin, bundle: Bundle, session: ort.InferenceSession, outputs: list[str], feed: Probe
) -> dict[str, Array]:
    try:
        return _run(session, outputs, feed)
    except Exception as error:  # onnxruntime's own exceptions share no public base
        reason = first_line(error)
    if bundle.loss is not None and bundle.loss not in outputs:
        try:
            values = _run(_open_without_loss(origin, bundle), outputs, feed)
        except Exception:  # then it is not the loss alone
            pass
        else:
            raise BundleError(f"{origin.path}: {_loss_fault(bundle, values, reason)}, or prepare it with --loss none")
    if origin.converted is not None:
        raise BundleError(f"{origin.path}: {too_old(origin.converted, f'converted, it does not run ({reason})')}")
    raise BundleError(
        f"{origin.path}: the prepared graph does not run where the model does, which is a fault of PocketZO: {reason}"
    )


def _check_length(origin: Origin, bundle: Bundle, feed: Probe, values: Mapping[str, Array]) -> None:
    """Refuse a loss by token that was added to scores of fewer tokens than are declared, as of the last one alone."""
    scores = next((value for value in bundle.outputs if value.name == bundle.logits), None)
    if scores is None or len(scores.shape) != 3 or bundle.loss in (None, *values) or scores.name not in values:
        return
    got = values[scores.name].shape
    sizes = {
        size: feed[spec.name].shape[axis]
        for spec in bundle.inputs
        if spec.name != "labels"  # made for the scores
        for axis, size in enumerate(spec.shape)
    }
    tokens = sizes.get(scores.shape[1])
    if isinstance(scores.shape[1], str) and tokens not in (None, got[1]):
        raise BundleError(
            f"{origin.path}: the output {scores.name!r} has scores of {got[1]} of {tokens} tokens, so that a loss by "
            "token cannot be added: export the model with the logits of all tokens, or prepare it with --loss none"
        )


def _open_without_loss(origin: Origin, bundle: Bundle) -> ort.InferenceSession:
    """Open a session of a bundle without the loss that was added: onnxruntime computes it whether asked for or not."""
    model = ir.load(bundle.model_path)
    outputs = model.graph.outputs
    outputs.remove(next(value for value in outputs if value.name == bundle.loss))
    common.RemoveUnusedNodesPass()(model)
    return open_graph(origin.path, ir.to_proto(model), bundle.path)


def _loss_fault(bundle: Bundle, values: Mapping[str, Array], reason: str) -> str:
    scores = next((value for value in bundle.outputs if value.name == bundle.logits), None)
    if scores is not None and len(scores.shape) != values[scores.name].ndim:
        declared, shape = (", ".join(map(str, shape)) for shape in (scores.shape, values[scores.name].shape))
        return (
            f"the loss that is added does not run, as the output {scores.name!r} is declared as [{declared}] and is "
            f"[{shape}]: export the model with the right shape"
        )
    return f"the loss that is added does not run ({reason}): export the model with one"


# ---- the comparison --------------------------------------------------------------------------------------------------


def _refusal(origin: Origin, bundle: Bundle, name: str, fault: str) -> str:
    if bundle.is_fp16:
        return (
            f"{origin.path}: in float16 the output {name!r} {fault} (a constant may be beyond 6e-08 .. "
            f"{MOST_FLOAT16:g}): prepare the model in float32"
        )
    if origin.converted is not None:
        return f"{origin.path}: {too_old(origin.converted, f'converted, its output {name!r} {fault}')}"
    return (
        f"{origin.path}: the bundle would compute another function, which is a fault of PocketZO: the output {name!r} "
        f"{fault}"
    )


def _difference(got: Array, expected: Array, tolerance: Tolerance) -> str | None:
    """Return how an output differs by more than roundings, or None if it does not."""
    if got.shape != expected.shape:
        return f"has shape {list(got.shape)}, expected {list(expected.shape)}"
    if expected.dtype.kind != "f":
        # Where roundings are coarse, the second best may become the best.
        if tolerance is _COARSE or np.array_equal(got, expected):
            return None
        return f"differs in {np.count_nonzero(got != expected)} of {expected.size} elements"
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    moderate = np.abs(expected) < _MASKED  # not NaN
    if tolerance is not _COARSE and not _same(got[~moderate], expected[~moderate]):
        return "is not infinite or NaN in the same places"
    largest = np.abs(expected[moderate]).max(initial=0)
    apart = np.abs(got[moderate] - expected[moderate]).max(initial=0)
    if apart <= tolerance.relative * largest + tolerance.absolute:  # NaN is not
        return None
    return f"is off by {apart:.3g} where it reaches {largest:.3g}"


def _same(a: Array, b: Array) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
