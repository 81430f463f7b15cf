"""Exact match: how often a language model, given the prompt, generates the completion of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pocketzo.arguments import check_integer
from pocketzo.data.order import Data
from pocketzo.errors import TrainingError
from pocketzo.runtime.model import Model
from pocketzo.tasks.causal_lm import CausalLM
from pocketzo.tasks.registry import task_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.runtime.generate import Generator


class Completion(NamedTuple):
    """A prompt of the data, and what follows it.

    Attributes
    ----------
    prompt : str
    expected, got : str
        The completion of the data, and the generated one: each up to a token that ends a text, and without spaces and
        line breaks around it.
    ended : bool
        Whether the model ended its text, or the data does not say where it ends.
    """

    prompt: str
    expected: str
    got: str
    ended: bool

    @property
    def matches(self) -> bool:
        """Whether the two completions are equal, and the generated one ended."""
        return self.ended and self.expected == self.got


def exact_match(model: Model, data: Data, *, max_tokens: int | None = None) -> float:
    """Return the share of a dataset's prompts whose greedy continuation is the completion; see :func:`complete`."""
    return float(np.mean([completion.matches for completion in complete(model, data, max_tokens=max_tokens)]))


def complete(model: Model, data: Data, *, max_tokens: int | None = None) -> Iterator[Completion]:
    """Continue the prompts of a dataset, with the most probable token each time.

    The prompt is what comes before the last tokens that count: before the completion, or before the last message of a
    chat that is the assistant's. Texts, which have no prompt, are left out.

    Parameters
    ----------
    model : Model
        A bundle for ``causal-lm`` that holds ``generate.onnx``. There is one copy of the weights if it was loaded with
        ``prepack=False``; see :meth:`Model.stream`.
    data : Data
    max_tokens : int, optional
        The most tokens that are generated for a prompt. By default as many as its completion has in the data, with its
        end token.

    Yields
    ------
    Completion
        In the order of the data. The weights must not change before the end.

    Raises
    ------
    BundleError
        The bundle has no ``generate.onnx``.
    DataError
        It has no tokenizer.
    TrainingError
        The bundle has another task, or no example has a prompt.
    ValueError
        ``max_tokens`` is below 1.
    """
    task = task_of(model.bundle)
    if not isinstance(task, CausalLM):
        raise TrainingError(
            f"{model.bundle.path}: completions are generated for the task {CausalLM.name!r}, and the bundle's is "
            f"{task.name!r}"
        )
    if max_tokens is not None:
        check_integer("max_tokens", max_tokens, 1)
    prompted = getattr(data, "prompted", None)
    indices = np.arange(len(data)) if prompted is None else np.flatnonzero(prompted)
    if not indices.size:
        raise TrainingError(
            "no example has a prompt to complete: give lines with 'prompt' and 'completion', or chats in 'messages'"
        )
    return _completions(model.generator, data, indices, max_tokens)


def _completions(
    generator: Generator, data: Data, indices: NDArray[np.int64], max_tokens: int | None
) -> Iterator[Completion]:
    for index in indices:
        batch = data.batch(np.array([index]))
        places = batch["positions"]
        start = int(np.flatnonzero(np.diff(places, prepend=-2) != 1)[-1])  # of the last tokens that follow each other
        prompt = batch["input_ids"][0, : places[start] + 1].tolist()
        expected = batch["targets"][start:].tolist()
        stream = generator.stream(prompt, max_tokens=len(expected) if max_tokens is None else max_tokens)
        got = "".join(stream)
        ended = stream.stop == "eos" or expected[-1] not in generator.eos
        yield Completion(generator.decode(prompt), generator.decode(expected).strip(), got.strip(), ended)
