"""The weights that a run or a bundle has, for merging them and for adapters."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pocketzo.adapters.merge import merge_tuned
from pocketzo.adapters.peft import read_peft
from pocketzo.adapters.tuned import Tuned
from pocketzo.adapters.write import Format, write_tuned
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import DESCRIPTION, Bundle
from pocketzo.runtime.model import Model
from pocketzo.train.run import JOURNAL, Run, Unloaded


def tuned_of(
    source: str | os.PathLike[str], *, step: int | None = None, base: str | os.PathLike[str] | None = None
) -> Tuned:
    """Return a bundle with the weights of a run, or those that it has.

    Parameters
    ----------
    source : path-like
        A run's folder, or a bundle.
    step : int, optional
        Of a run: the number of steps; by default all.
    base : path-like, optional
        Of a run: its base bundle, if it was moved, or was prepared again.

    Raises
    ------
    BundleError, JournalError
        There is neither, or a file is damaged; or the base is not that of the run.
    ValueError
        `step` or `base` is given for a bundle, or the run has fewer steps.
    """
    path = Path(source)
    if not (path / JOURNAL).is_file():
        if not (path / DESCRIPTION).is_file():
            raise BundleError(f"{path}: neither a bundle (there is no {DESCRIPTION} in it) nor a run (no {JOURNAL})")
        if step is not None or base is not None:
            raise ValueError(f"{path} is a bundle: a step and a base bundle belong to a run")
        return Tuned.of(Bundle.read(path))
    run = Run(path)
    model = Unloaded(run.base(base))
    run.replay_onto(model, step=step)
    trained = {tensor.name: model.weights[tensor.name] for tensor in model.bundle.tensors if tensor.trainable}
    return Tuned.of(model.bundle, trained)


def merge(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | None = None,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Fold the LoRA and the factors of a run into the weights, and write the bundle of the model without them.

    It is as :func:`prepare` makes it without the added sets, with other weights: its graphs run in plain onnxruntime
    at the speed of the export, and it can be trained again. float32 logits agree with those of the tuned model to
    rounding. float16 weights are rounded to float16 again. Neither onnx nor any other package than numpy and
    onnxruntime, with its protobuf, is needed.

    Parameters
    ----------
    source : path-like
        A run, or a tuned bundle, prepared with ``train="lora"`` or ``"ia3"``, which may be joined with others.
    out : path-like
        The folder to write.
    step : int, optional
        Of a run: the number of steps; by default all.
    base : path-like, optional
        Of a run: its base bundle, if it was moved, or was prepared again.
    overwrite : bool
        Whether a bundle at ``out`` is replaced.

    Returns
    -------
    Bundle
        The bundle written.

    Raises
    ------
    BundleError, JournalError
        Something that was added cannot be folded: a quantised weight, one that is read elsewhere, too, a prefix or an
        adapter with an activation; or a file is damaged or missing. Nothing is written then.
    ValueError
        `step` or `base` is given for a bundle, or the run has fewer steps.
    """
    return merge_tuned(tuned_of(source, step=step, base=base), out, overwrite=overwrite)


def write_adapter(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: Format,
    checkpoint: str | os.PathLike[str] | None = None,
    step: int | None = None,
    base: str | os.PathLike[str] | None = None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Write what a run learnt as an adapter of another library.

    ==========  =====================================================  ==========================================
    kind        files                                                  holds
    ==========  =====================================================  ==========================================
    ``"peft"``  ``adapter_config.json``, ``adapter_model.safetensors``  LoRA, or (IA)3
    ``"gguf"``  ``adapter.gguf``, for llama.cpp                        LoRA
    ``"onnx"``  ``adapter.onnx_adapter``, for onnxruntime; the graphs  all added sets, and what is trained beside
                in which its tensors are inputs with defaults; and a
                copy of the weights
    ==========  =====================================================  ==========================================

    Parameters
    ----------
    source : path-like
        A run, or a tuned bundle, prepared with a set that adds tensors.
    out : path-like
        The folder to write; it must not exist.
    kind : {"peft", "onnx", "gguf"}
        The library that is to read it.
    checkpoint : path-like, optional
        The checkpoint that the model was exported from: a folder with ``config.json`` and, to compare names and
        shapes, ``model.safetensors``; for ``"gguf"`` the model's GGUF file will do. ``"gguf"`` needs it. Without it,
        the modules of ``"peft"`` follow from the names in the graph.
    step : int, optional
        Of a run: the number of steps; by default all.
    base : path-like, optional
        Of a run: its base bundle, if it was moved, or was prepared again.
    note : callable, optional
        Called with a line of text for what was not compared.

    Raises
    ------
    BundleError, JournalError
        The adapter cannot hold a set, a module is not found, or a file is damaged, missing or exists already.
    MissingExtraError, BrokenPackageError
        The package gguf is not installed, or cannot be imported.
    ValueError
        An option is out of range, or belongs to another kind.
    """
    write_tuned(tuned_of(source, step=step, base=base), out, kind, checkpoint=checkpoint, note=note)


def load_adapter(model: Model, adapter: str | os.PathLike[str]) -> None:
    """Let a model's LoRA begin from an adapter of PEFT instead of noise and zeros.

    A run that begins then keeps these values in its folder, and its journal their SHA-256: replay needs the folder, and
    not the adapter.

    Parameters
    ----------
    model : Model
        As it was loaded; of a bundle prepared with ``lora``. Its weights are set.
    adapter : path-like
        A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT or :func:`write_adapter` writes
        it. Modules are found by their names. Rank, alpha / r, shapes, and the modules themselves have to be those of
        the bundle's set; the matrices of one module are divided among the parts that the bundle has of it.

    Raises
    ------
    BundleError
        The adapter does not fit; names what does not match. No weight is changed then.
    """
    values = read_peft(Tuned.of(model.bundle), Path(adapter))
    for name, value in values.items():
        model.weights[name] = value
    model.init = dict(values)
