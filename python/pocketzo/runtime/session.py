"""onnxruntime sessions that read weights in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError, NotPrepackableError, joined_lines
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.paths import utf8_path

# onnxruntime's optimisations that replace weights by a copy, made when the session is created: scaled, transposed,
# blocked or concatenated. With 1.31.1 each but the first was seen to make a weight dead.
_COPYING_OPTIMIZERS = [
    "AttentionFusion",
    "ConvAddFusion",
    "ConvBNFusion",
    "ConvMulFusion",
    "MatMul_BatchNormalization_Fusion",
    "NchwcTransformer",
    "TransposeOptimizer",
    "TransposeOptimizer_CPUExecutionProvider",
]
# Those that turn a product into another operator: prepacked bytes are found by the operator's name.
_FUSING_OPTIMIZERS = ["GemmActivationFusion", "MatMulAddFusion", "MatMulScaleFusion", "MatmulTransposeFusion"]


# Measured by bench/session.py; the figures are in bench/README.md.
_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
_FP16_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # above it, casts of fp16 weights are folded into copies
_OPTIONS = {
    "enable_cpu_mem_arena": True,
    "enable_mem_pattern": False,  # it plans memory for one shape of batch, beside what the first run took
}
_ENTRIES = {
    # A thread that spins during a run starts the next operator at once; after the run it would take a core from the
    # kernels.
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",
}


class Session(Protocol):
    """What runs a graph, as onnxruntime's own sessions do."""

    def run(
        self, names: list[str] | None, feed: Mapping[str, NDArray[Any]], options: ort.RunOptions | None = None, /
    ) -> list[NDArray[Any]]:
        """Return outputs by their names."""


def open_plain(
    bundle: Bundle, values: Mapping[str, ort.OrtValue], threads: int, graph: Path | None = None
) -> ort.InferenceSession:
    """Create a session over weights in the plain layout, with the optimisations that keep them live.

    Its graph is the bundle's ``model.onnx``, or another one over the same weights.
    """
    level = _FP16_LEVEL if bundle.is_fp16 else _LEVEL
    return create_session(graph or bundle.model_path, values, threads, prepacked=False, level=level)


def open_constant(graph: Path, threads: int) -> ort.InferenceSession:
    """Create a session that takes all weights from the file for constants: it may optimise and prepack everything.

    Raises
    ------
    BundleError
        onnxruntime refuses the graph.
    """
    try:
        return _create(utf8_path(graph), _options({}, threads, _LEVEL), [])
    except NotPrepackableError as error:
        raise _refused(graph, error) from error.__cause__


def open_bytes(model: bytes, folder: Path, threads: int) -> ort.InferenceSession:
    """Create a session as :func:`open_constant` does, of a graph in memory over the weights in a folder.

    Raises
    ------
    BundleError
        onnxruntime refuses the graph.
    """
    try:
        return _create(model, _options({}, threads, _LEVEL, folder=folder), [])
    except NotPrepackableError as error:
        raise _refused(folder, error) from error.__cause__


def open_with_constants(
    bundle: Bundle, model: bytes, values: Mapping[str, ort.OrtValue], threads: int
) -> ort.InferenceSession:
    """Create a session that prepacks constants; weights that are declared as inputs are read where they are.

    Parameters
    ----------
    bundle : Bundle
    model : bytes
        See :func:`pocketzo.runtime.variables.model_with_variables`, or :func:`pocketzo.runtime.frozen.model_over_base`.
    values : mapping of str to OrtValue
        With the values that constants have; they must outlive the session. Other weights are mapped from the bundle's
        file.
    threads : int
    """
    level = _FP16_LEVEL if bundle.is_fp16 else _LEVEL
    options = _options(values, threads, level, folder=bundle.path)
    return _create(model, options, _COPYING_OPTIMIZERS)


def open_unoptimised(
    bundle: Bundle, values: Mapping[str, ort.OrtValue], model: bytes | None = None
) -> ort.InferenceSession:
    """Create a session that folds and packs nothing, and so reads every weight where it is.

    Its graph is the bundle's, or ``model``. Weights without a value are mapped from the bundle's file.
    """
    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if model is None:
        return create_session(bundle.model_path, values, 1, prepacked=False, level=level)
    options = _options(values, 1, level, folder=bundle.path)
    options.add_session_config_entry("session.disable_prepacking", "1")
    return _create(model, options, [])


def create_session(
    graph: Path,
    values: Mapping[str, ort.OrtValue],
    threads: int,
    *,
    prepacked: bool,
    level: ort.GraphOptimizationLevel | None = None,
) -> ort.InferenceSession:
    """Create a session over a graph whose weights are supplied.

    Parameters
    ----------
    graph : Path
    values : mapping of str to OrtValue
        The weights; they must outlive the session.
    threads : int
    prepacked : bool
        Whether the graph's file names prepacked bytes, by which the session is to multiply.
    level : GraphOptimizationLevel, optional
        All optimisations by default.

    Raises
    ------
    BundleError or NotPrepackableError
        onnxruntime refuses the graph: without or with prepacked weights.
    """
    options = _options(values, threads, _LEVEL if level is None else level)
    disabled = _COPYING_OPTIMIZERS
    if prepacked:
        disabled = disabled + _FUSING_OPTIMIZERS
    else:
        # A prepacked copy of a weight would be used in place of the weight.
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return _create(utf8_path(graph), options, disabled)
    except NotPrepackableError as error:
        if prepacked:
            raise
        raise _refused(graph, error) from error.__cause__


def _refused(graph: Path, error: NotPrepackableError) -> BundleError:
    return BundleError(f"{graph}: onnxruntime refuses the graph: {joined_lines(error.__cause__ or error)}")


def _options(
    values: Mapping[str, ort.OrtValue], threads: int, level: ort.GraphOptimizationLevel, folder: Path | None = None
) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for name, value in _OPTIONS.items():
        setattr(options, name, value)
    for key, entry in _ENTRIES.items():
        options.add_session_config_entry(key, entry)
    if folder is not None:  # of the weights, for a graph that is no file
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", utf8_path(folder))
    for name, value in values.items():
        options.add_initializer(name, value)
    return options


def _create(model: str | bytes, options: ort.SessionOptions, disabled: list[str]) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise NotPrepackableError(
            f"onnxruntime {ort.__version__} refuses prepacked weights: {joined_lines(error)}"
        ) from error
