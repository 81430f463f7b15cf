"""onnxruntime sessions that read weights in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from pocketzo.errors import BundleError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.layout import OTHER_OPERATORS
from pocketzo.runtime.weights import Weights

# onnxruntime's optimisations that put a copy, made when the session is created, in the place of weights: scaled,
# transposed, blocked or concatenated. With 1.31.1 each but the first was seen to make a weight dead.
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


# Measured by bench/session.py; the figures stand in bench/README.md.
_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
_FP16_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # above it, casts of fp16 weights are folded into copies
_OPTIONS = {
    "enable_cpu_mem_arena": True,
    "enable_mem_pattern": False,  # it plans memory for one shape of batch, beside what the first run took
}
_ENTRIES = {
    # A thread that spins during a run is at the next operator at once; after it, it would keep a core from the kernels.
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",
}


def optimization_level(bundle: Bundle) -> ort.GraphOptimizationLevel:
    """Return the level at which weights stay live."""
    return _FP16_LEVEL if bundle.is_fp16 else _LEVEL


def ort_values(weights: Weights) -> dict[str, ort.OrtValue]:
    """Return weights as values that a session shares."""
    return {name: ort.OrtValue.ortvalue_from_numpy(view) for name, view in weights.plain.items()}


def create_session(
    graph: Path,
    values: Mapping[str, ort.OrtValue],
    threads: int,
    *,
    prepacked: bool,
    level: ort.GraphOptimizationLevel = _LEVEL,
) -> ort.InferenceSession:
    """Create a session over a graph whose weights are supplied."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    disabled = _COPYING_OPTIMIZERS
    if prepacked:
        disabled = disabled + OTHER_OPERATORS
    else:
        # A packed copy of a weight would be used in place of the weight.
        options.add_session_config_entry("session.disable_prepacking", "1")
    for name, value in _OPTIONS.items():
        setattr(options, name, value)
    for key, entry in _ENTRIES.items():
        options.add_session_config_entry(key, entry)
    for name, value in values.items():
        options.add_initializer(name, value)
    try:
        return ort.InferenceSession(
            os.fspath(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base
        if prepacked:
            raise NotPrepackableError(f"onnxruntime {ort.__version__} refuses prepacked weights: {error}") from None
        raise BundleError(f"{graph}: onnxruntime refuses the graph: {error}") from error
