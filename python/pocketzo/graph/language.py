"""The training graph of a language model: the loss of tokens or label words at the positions that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.files import write_file
from pocketzo.formats.past import is_cache_name
from pocketzo.formats.probe import Probe
from pocketzo.graph.build import Builder
from pocketzo.graph.decoder import MASK, TOKENS, keep_only, remove_cache
from pocketzo.graph.loss import RESERVED, Loss, add_loss
from pocketzo.graph.names import free_names
from pocketzo.graph.positions import logits_at
from pocketzo.graph.read import shape_of, to_bytes
from pocketzo.graph.weight import Array

LOGITS: Final = "logits"
POSITIONS: Final = "positions"
TARGETS: Final = "targets"
TOKEN_LOSSES: Final = "token_losses"
CALIBRATION: Final = "pocketzo.calibration"

_ADDED: Final = {*RESERVED, POSITIONS, TARGETS, TOKEN_LOSSES}
_HEADS: Final = "with its output projection, as optimum's tasks text-generation-with-past and fill-mask do"


@dataclass(frozen=True)
class LanguageGraph:
    """What a training graph computes.

    Attributes
    ----------
    causal : bool
        Whether a token is predicted from those before it: then the graph is a decoder, whose export generates text.
    label_tokens : tuple of int or None
        The tokens of the label words, over which a prompt is classified; None for the losses of tokens.
    calibration : tuple of float or None
        What is subtracted from the logits of the label words.
    """

    causal: bool
    label_tokens: tuple[int, ...] | None = None
    calibration: tuple[float, ...] | None = None

    def reduce(self, model: ir.Model) -> Loss:
        """Turn an export into the training graph.

        Inputs are the export's without caches and flags, and int64 ``positions`` [n]: row * sequence + column of each
        position whose logits count. No value has the shape [batch, sequence, vocabulary].

        - For label words: the output ``logits`` [n, words], the input ``labels`` [n] and the output ``loss``, as
          :func:`add_loss` adds them.
        - Else: an int64 input ``targets`` [n], the token that each position should predict; the outputs
          ``token_losses``, float32 [n], the cross-entropy of each, and ``loss``, their mean.

        Parameters
        ----------
        model : Model
            Changed in place.

        Raises
        ------
        BundleError
            The graph is no language model's, or its output projection cannot be found.
        """
        graph = model.graph
        logits = _logits_of(graph)
        kept = {str(value.name) for value in graph.inputs} - _ADDED
        for name in _ADDED & {str(value.name) for value in graph.inputs} - set(RESERVED):
            raise BundleError(f"the graph has an input {name!r}, as one that is added: export it under another name")
        remove_cache(graph)
        logits = next(value for value in graph.outputs if value.name == LOGITS)
        free_names(graph, (LOGITS, *_ADDED))
        build = Builder(graph, "pocketzo.logits.")
        scores = logits_at(build, logits, build.input(POSITIONS, ir.DataType.INT64, ["positions"]))
        if logits.dtype != ir.DataType.FLOAT:
            scores = build.op("Cast", scores, to=ir.DataType.FLOAT)
        if self.label_tokens is None:
            losses, loss = _token_losses(build, scores)
            build.output(losses, ir.DataType.FLOAT, ["positions"])
            build.output(loss, ir.DataType.FLOAT, [])
            keep_only(model, [losses, loss], kept)
            return Loss("cross-entropy", "loss", None, None, "as the task says")
        scores = build.op("Gather", scores, build.constant(list(self.label_tokens)), axis=1)
        if self.calibration is not None:
            stored = build.parameter(CALIBRATION, np.array(self.calibration, np.float32))
            scores = build.op("Sub", scores, stored)
        scores.name = LOGITS
        build.output(scores, ir.DataType.FLOAT, ["positions", len(self.label_tokens)])
        keep_only(model, [scores], kept)
        return add_loss(model, "cross-entropy")._replace(reason="over the label words")

    # ---- the same from the logits of all tokens ----------------------------------------------------------------------

    def feed(self, batch: Probe) -> Probe:
        """Return the inputs that are added, for a batch of an export: of real tokens, as its mask says."""
        tokens = batch[TOKENS]
        for name, array in batch.items():
            if is_cache_name(name) and array.ndim > 2 and array.size:
                raise BundleError(
                    f"the batch has past tokens, {name!r} {list(array.shape)}: a language model is compared on whole "
                    "sequences, with caches of length 0"
                )
        mask = batch.get(MASK, np.ones_like(tokens))
        if mask.shape != tokens.shape:
            raise BundleError(
                f"{MASK!r} is {list(mask.shape)} and {TOKENS!r} is {list(tokens.shape)}: expected the same shape; give "
                "another batch by --probe"
            )
        real = mask != 0
        if self.label_tokens is not None:
            last = tokens.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
            return {
                POSITIONS: np.arange(len(tokens)) * tokens.shape[1] + last,
                "labels": np.arange(len(tokens)) % len(self.label_tokens),
            }
        followed = real[:, :-1] & real[:, 1:]
        if not followed.any():
            raise BundleError(
                "no row of the batch has two tokens, of which one predicts the other: give a longer one by --probe"
            )
        rows, columns = np.nonzero(followed)
        return {
            POSITIONS: rows * tokens.shape[1] + columns,
            TARGETS: tokens[rows, columns + 1].astype(np.int64),
        }

    def expected(self, logits: Array, feed: Mapping[str, Array]) -> dict[str, NDArray[np.float64]]:
        """Return the outputs of the training graph, from all logits of an export.

        Parameters
        ----------
        logits : ndarray
            [batch, sequence, vocabulary].
        feed : mapping of str to ndarray
            The result of :meth:`feed`.
        """
        rows = logits.reshape(-1, logits.shape[-1])[feed[POSITIONS]].astype(np.float64)
        if self.label_tokens is None:
            losses = _cross_entropy(rows, feed[TARGETS])
            return {TOKEN_LOSSES: losses, "loss": losses.mean()}
        scores = rows[:, list(self.label_tokens)]
        if self.calibration is not None:
            scores -= np.array(self.calibration, np.float32)
        return {LOGITS: scores, "loss": _cross_entropy(scores, feed["labels"]).mean()}


def _cross_entropy(scores: NDArray[np.float64], targets: Array) -> NDArray[np.float64]:
    largest = scores.max(axis=1)
    total = largest + np.log(np.exp(scores - largest[:, None]).sum(axis=1))
    losses: NDArray[np.float64] = total - scores[np.arange(len(scores)), targets]
    return losses


def set_calibration(path: Path, values: Sequence[float]) -> None:
    """Replace the calibration in the file of a training graph."""
    model = ir.load(path)
    stored = ir.tensor(np.array(values, np.float32), name=CALIBRATION)
    model.graph.initializers[CALIBRATION].const_value = stored
    write_file(path, to_bytes(model))


def check_scores(shape: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Raise BundleError unless there are logits for each token, as a run on tokens of a shape shows."""
    if len(shape) != 3 or shape[:2] != tokens:
        raise BundleError(_last_only(f"is {list(shape)} for tokens {list(tokens)}"))


def _logits_of(graph: ir.Graph) -> ir.Value:
    """Return the output of logits; raise BundleError if there is none for each token."""
    outputs = {str(value.name): value for value in graph.outputs if not str(value.name).startswith("present")}
    if LOGITS not in outputs:
        raise BundleError(
            f"a language model has an output 'logits' [batch, sequence, vocabulary], this graph has "
            f"{', '.join(map(repr, outputs)) or 'none but its cache'}: it was exported without its output projection; "
            f"export it {_HEADS}"
        )
    shape = shape_of(outputs[LOGITS])
    if shape is not None and (len(shape) != 3 or shape[1] == 1):
        raise BundleError(_last_only(f"is [{', '.join(map(str, shape))}]"))
    return outputs[LOGITS]


def _last_only(found: str) -> str:
    return (
        f"the output 'logits' {found}, and a loss needs logits of every token, [batch, sequence, vocabulary]: export "
        "the model without prune_lm_head (onnxruntime-genai) or a constant logits_to_keep (transformers)"
    )


def _token_losses(build: Builder, scores: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the cross-entropy of each position, by LogSoftmax as :func:`add_loss`, and the mean."""
    last = build.constant([-1])
    targets = build.op("Unsqueeze", build.input(TARGETS, ir.DataType.INT64, ["positions"]), last)
    log_p = build.op("GatherElements", build.op("LogSoftmax", scores, axis=-1), targets, axis=-1)
    losses = build.op("Neg", build.op("Squeeze", log_p, last), name=TOKEN_LOSSES)
    return losses, build.op("ReduceMean", losses, name="loss", keepdims=0)
