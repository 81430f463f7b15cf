"""Where models come from: ONNX's own backend tests, and files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.backend.test
from onnx import TensorProto, numpy_helper

DATA = Path(onnx.backend.test.__file__).parent / "data"
FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")


@dataclass(frozen=True)
class Case:
    """A model, and a batch that is known to fit, if there is one.

    Attributes
    ----------
    group, name : str
    source : Path or ModelProto
    batch : dict of str to ndarray or None
    """

    group: str
    name: str
    source: Path | onnx.ModelProto
    batch: dict[str, npt.NDArray[Any]] | None = None

    def write(self, folder: Path) -> Path:
        """Return the path of the model, written to a folder if it is in no file."""
        if isinstance(self.source, Path):
            return self.source
        path = folder / "model.onnx"
        onnx.save(self.source, path)
        return path


def of_files(paths: Iterable[Path]) -> Iterator[Case]:
    """Yield files, and those in folders."""
    for path in paths:
        files = sorted(path.rglob("*.onnx")) if path.is_dir() else [path]
        for file in files:
            yield Case("files", str(file.relative_to(path.parent)), file)


def of_backend() -> Iterator[Case]:
    """Yield ONNX's backend models: its files, those made by code, and variants whose operators have weights."""
    for group in FOLDERS:
        for path in sorted((DATA / group).glob("*/model.onnx")):
            yield Case(group, path.parent.name.removeprefix("test_"), path, inputs_beside(path))
    for path in sorted((DATA / "light").glob("*.onnx")):
        yield Case("light", path.stem, path)
    yield from filled_lights()
    yield from of_nodes()


def inputs_beside(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """Return the first inputs that belong to a backend test, if all are tensors."""
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    files = [path.parent / "test_data_set_0" / f"input_{number}.pb" for number in range(len(names))]
    if not all(file.exists() for file in files):
        return None
    return {
        name: numpy_helper.to_array(TensorProto.FromString(file.read_bytes()))
        for name, file in zip(names, files, strict=True)
    }


def filled_lights(most: int = 40_000_000) -> Iterator[Case]:
    """Yield the convolutional networks whose weights ONNX replaced by ConstantOfShape, with random weights again.

    Parameters
    ----------
    most : int
        Networks of more parameters are left out.
    """
    for path in sorted((DATA / "light").glob("*.onnx")):
        model = onnx.load(path)
        shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        made = [node for node in model.graph.node if node.op_type == "ConstantOfShape" and node.input[0] in shapes]
        if sum(int(np.prod(shapes[node.input[0]])) for node in made) > most:
            continue
        rng = np.random.default_rng(1)
        for node in made:
            shape = shapes[node.input[0]]
            scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
            array = rng.normal(0, scale, shape) if len(shape) > 1 else 1 + scale * rng.random(shape)
            model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), node.output[0]))
            model.graph.node.remove(node)
        yield Case("light, filled", path.stem, model)


def of_nodes() -> Iterator[Case]:
    """Yield the tests of single operators, as they are and with all inputs but one as weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        tests = collect_testcases(None)
    for test in tests:
        model = test.model
        (arrays, _), *_ = test.data_sets or ()
        assert model is not None
        name = test.name.removeprefix("test_")
        names = [value.name for value in model.graph.input]
        tensors = all(isinstance(array, np.ndarray) for array in arrays)
        batch = dict(zip(names, arrays, strict=True)) if tensors and len(arrays) == len(names) else None
        yield Case("node", name, model, batch)
        if batch is not None:
            for kept in range(len(names)):
                if is_float(model.graph.input[kept]):
                    yield Case("node, weights", f"{name}[{kept}]", *with_weights(model, batch, kept))


def with_weights(
    model: onnx.ModelProto, batch: dict[str, npt.NDArray[Any]], kept: int
) -> tuple[onnx.ModelProto, dict[str, npt.NDArray[Any]]]:
    """Return a model with the inputs of its test as weights, but for one, and the batch that is left."""
    model = copy.deepcopy(model)
    inputs = list(model.graph.input)
    del model.graph.input[:]
    model.graph.input.append(inputs[kept])
    for value in inputs[:kept] + inputs[kept + 1 :]:
        model.graph.initializer.append(numpy_helper.from_array(batch[value.name], value.name))
    name = inputs[kept].name
    return model, {name: batch[name]}


def is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
