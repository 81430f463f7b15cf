"""Trace a module with torch's exporter: the one place that calls it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from pocketzo.errors import Error, first_line


def trace(module: Any, name: str, arguments: Sequence[Any], **options: Any) -> Any:
    """Return a module as torch's exporter writes it.

    Parameters
    ----------
    module : Module
    name : str
        What errors call it.
    arguments : sequence
        Those of its ``forward``.
    **options
        Of :func:`torch.onnx.export`: names, dynamic shapes and so on.

    Returns
    -------
    ONNXProgram
        With the graph as ``model``.

    Raises
    ------
    Error
        If torch cannot trace it, as with control flow that depends on data.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dozen, about torch itself and the names of axes
        try:
            return torch.onnx.export(module, tuple(arguments), dynamo=True, verbose=False, **options)
        except torch.onnx.OnnxExporterError as error:
            reason = first_line(error.__cause__ or error)
            raise Error(f"torch cannot export {name}: {reason}") from error
