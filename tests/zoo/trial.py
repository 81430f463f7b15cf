"""What a model has to pass: a bundle of the same function that trains, replays and is saved; or an honest refusal."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from fuzz.targets import is_own
from onnx import TensorProto, helper

import pocketzo as pz
from pocketzo.formats.journal import Entry

Batch = Mapping[str, npt.NDArray[Any]]

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
STEPS = 3
EXACT, ROUNDED = 1e-3, 5e-2
"""How far outputs may be apart, as a share of the largest: in float32, and where activations are rounded to fewer bits.

Between 16-bit floats, or integers of 8 bits, two fusions of one graph round in other places.
"""
FLOOR = 2.5e-7
"""How far they may always be apart: onnxruntime's Sigmoid is off by 1e-7, however small it is."""


@dataclass(frozen=True)
class Result:
    """What became of a model.

    Attributes
    ----------
    outcome : str
        ``"ok"``, ``"refused"``, ``"WRONG"`` or ``"TRACEBACK"``; the pool adds ``"CRASH"`` and ``"TIMEOUT"``.
    reason : str
        What is refused, or wrong; of a model that passed, the options that it needed.
    trained, floats : int
        Elements of the trained tensors, and of all floating-point constants in the file.
    """

    outcome: str
    reason: str = ""
    trained: int = 0
    floats: int = 0


class WrongError(Exception):
    """The bundle, or what was trained of it, is not what it has to be."""


def attempt(source: Path, folder: Path, given: Batch | None = None) -> Result:
    """Put a model to the trial.

    Parameters
    ----------
    source : Path
        The ONNX file.
    folder : Path
        An empty folder.
    given : mapping of str to ndarray, optional
        A batch that is known to fit. It is used if the model does not run on one that is made up, and for comparing.
    """
    floats = 0
    try:
        model = onnx.load(source, load_external_data=False)
        floats = sum(math.prod(tensor.dims) for tensor in constants(model.graph) if tensor.data_type in FLOATS)
    except Exception:  # what is no model has to be refused, too
        model = None
    try:
        bundle, options = prepare(source, folder / "bundle", given)
        trained = sum(math.prod(tensor.shape) for tensor in bundle.tensors if tensor.trainable)
        live_through(source, bundle, folder, given, EXACT if model is None or is_exact(model) else ROUNDED)
    except WrongError as error:
        return Result("WRONG", str(error), floats=floats)
    except BaseException as error:
        if is_own(error):
            return Result("refused", str(error).replace(f"{source}: ", "").replace(str(folder), "."), floats=floats)
        return Result("TRACEBACK", traceback.format_exc(), floats=floats)
    return Result("ok", options, trained, floats)


def prepare(source: Path, out: Path, given: Batch | None) -> tuple[pz.Bundle, str]:
    """Prepare a model without options, or else with those that the error names."""
    options: dict[str, Any] = {}
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pz.prepare(source, out, **options), ", ".join(options)
        except pz.BundleError as error:
            if "loss" not in options and "--loss" in str(error):
                options["loss"] = "none"
            elif "probe" not in options and given is not None and "--probe" in str(error):
                options["probe"] = given
            else:
                raise


def live_through(source: Path, bundle: pz.Bundle, folder: Path, given: Batch | None, tolerance: float) -> None:
    """Load a bundle, train it by a few steps, replay them, save it, and compare with plain onnxruntime at each stage.

    Raises
    ------
    WrongError
        If something differs; names it.
    """
    names = float_outputs(source)
    batch = dict(given or bundle.probe or {})
    original = plain(source, batch, names)
    again = plain(source, batch, names)
    steady = [agree([a], [b], tolerance) for a, b in zip(original, again, strict=True)]
    names = [name for name, stays in zip(names, steady, strict=True) if stays]  # some draw random numbers
    original = [array for array, stays in zip(original, steady, strict=True) if stays]
    if not names:
        pz.load(bundle, threads=1)
        return
    full = {**labels(bundle, batch), **batch}
    same(original, plain(bundle.model_path, full, names), tolerance, "the bundle's outputs are not the source's")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights that are not prepacked
        model = pz.load(bundle, threads=1)
        start = first = mean_of_squares(model, batch, names)
        if not math.isfinite(start) or start == 0:
            first = 1.0
        lr = 1e-2 if bundle.is_fp16 else 1e-4  # which fp16 does not round away
        optimizer = pz.MeZO(model, lr=lr, seed=1)
        before = {name: np.array(model.weights[name]) for name in optimizer.names}
        entries: list[Entry] = []
        for _ in range(STEPS):
            optimizer.step(lambda model: mean_of_squares(model, batch, names) / first, entries.append)
        model.save(folder / "tuned")
        compare(model, folder / "tuned", full, names, tolerance, "after training")
        tuned = {name: np.array(model.weights[name]) for name in optimizer.names}
        if math.isfinite(start) and not any(entry.lr for entry in entries):
            raise WrongError("no step was taken, though the objective is finite")
        if any(any(entry.coefficients.values()) for entry in entries) and all(
            map(equal, before.values(), tuned.values())
        ):
            raise WrongError("the steps changed no weight")

        other = pz.load(bundle, threads=1)
        pz.MeZO(other, lr=lr, seed=1).replay(entries)
        for name, array in tuned.items():
            if not equal(array, np.array(other.weights[name])):
                raise WrongError(f"replay differs in {name}")
        del other

        rng = np.random.default_rng(0)
        for name in optimizer.names:  # far more than any step does: a stale copy of a weight shows
            array = np.array(model.weights[name], np.float32)
            noise = rng.normal(0, 0.05 * (array.std() or 1), array.shape)
            model.weights[name] = (array + noise).astype(model.weights[name].dtype)
        model.save(folder / "shaken")
        compare(model, folder / "shaken", full, names, tolerance, "with other weights")


def compare(model: pz.Model, saved: Path, batch: Batch, names: Sequence[str], tolerance: float, when: str) -> None:
    """Compare the outputs of a model with those of its saved bundle in plain onnxruntime."""
    got = model.run(batch, names)
    same(
        plain(saved / "model.onnx", batch, names),
        [got[name] for name in names],
        tolerance,
        f"{when}, the model differs from plain onnxruntime on the saved bundle",
    )


def same(expected: Sequence[Any], got: Sequence[Any], tolerance: float, what: str) -> None:
    """Raise WrongError unless outputs agree."""
    if not agree(expected, got, tolerance):
        raise WrongError(f"{what}: {difference(expected, got)}")


def agree(expected: Sequence[Any], got: Sequence[Any], tolerance: float) -> bool:
    """Whether outputs differ by no more than a share of the largest of each."""
    return all(
        a.shape == b.shape
        and np.allclose(a, b, rtol=tolerance, atol=max(FLOOR, tolerance * finite_max(a)), equal_nan=True)
        for a, b in zip(map(as_float, expected), map(as_float, got), strict=True)
    )


def difference(expected: Sequence[Any], got: Sequence[Any]) -> str:
    """Describe how far apart outputs are."""
    return "; ".join(
        f"shape {a.shape} and {b.shape}"
        if a.shape != b.shape
        else f"{np.nanmax(np.abs(a - b), initial=0):.3g} of {finite_max(a):.3g}"
        for a, b in zip(map(as_float, expected), map(as_float, got), strict=True)
    )


def as_float(value: Any) -> npt.NDArray[np.float64]:
    return np.asarray(value, np.float64)


def finite_max(array: npt.NDArray[np.float64]) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))


def equal(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.tobytes() == b.tobytes()


def mean_of_squares(model: pz.Model, batch: Batch, names: Sequence[str]) -> float:
    values = [np.ravel(value).astype(np.float64) for value in model.run(batch, names).values()]
    everything = np.concatenate(values)
    finite = everything[np.isfinite(everything)]  # a mask may be infinite
    return float(np.mean(finite**2)) if finite.size else math.nan


def plain(path: Path, batch: Batch, names: Sequence[str]) -> list[Any]:
    """Run a file in plain onnxruntime."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {value.name for value in session.get_inputs()}
    return list(session.run(list(names), {name: array for name, array in batch.items() if name in inputs}))


def float_outputs(source: Path) -> list[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return [
        value.name
        for value in session.get_outputs()
        if value.type in ("tensor(float)", "tensor(float16)", "tensor(double)")
    ]


def labels(bundle: pz.Bundle, batch: Batch) -> dict[str, npt.NDArray[Any]]:
    """Return zeros as the labels, for inputs that the bundle has beyond the source's."""
    size = next((array.shape[0] for array in batch.values() if array.ndim), 1)
    length = max((array.shape[1] for array in batch.values() if array.ndim > 1), default=1)
    return {
        value.name: np.zeros(
            [n if isinstance(n, int) else (size, length)[min(i, 1)] for i, n in enumerate(value.shape)], value.dtype
        )
        for value in bundle.inputs
        if value.name not in batch
    }


def constants(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Yield the tensors of a graph and its subgraphs: initializers and constants."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from constants(attribute.g)
            elif node.op_type == "Constant" and attribute.name == "value":
                yield attribute.t


def is_exact(model: onnx.ModelProto) -> bool:
    """Whether a graph computes in float32 alone."""
    rounded = {"DynamicQuantizeLinear", "QuantizeLinear", "QLinearMatMul", "QLinearConv", "MatMulNBits"}
    nodes = list(model.graph.node)
    types = {tensor.data_type for tensor in constants(model.graph)}
    types |= {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    return not types & {TensorProto.FLOAT16, TensorProto.BFLOAT16} and not any(
        node.op_type in rounded
        or (
            node.op_type == "Cast"
            and helper.get_node_attr_value(node, "to") in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        )
        for node in nodes
    )
