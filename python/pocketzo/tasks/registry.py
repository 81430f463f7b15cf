"""The registry of tasks, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import DESCRIPTION, TaskSpec, ValueSpec
from pocketzo.tasks.causal_lm import CausalLM
from pocketzo.tasks.choice import Choice
from pocketzo.tasks.classification import Classification
from pocketzo.tasks.multi_label import MultiLabel
from pocketzo.tasks.prompt import Prompt
from pocketzo.tasks.regression import Regression
from pocketzo.tasks.tokens import TokenClassification

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle
    from pocketzo.tasks.base import Task

TASKS: Final[Mapping[str, type[Task]]] = {
    task.name: task
    for task in (
        Classification,
        TokenClassification,
        MultiLabel,
        Regression,
        Prompt,
        CausalLM,
        Choice,
    )
}


def task_of(bundle: Bundle) -> Task:
    """Create the task of a bundle.

    A bundle without a task is treated as classification. If it has a loss, only the metrics of the loss are available.

    Raises
    ------
    BundleError
        The task is unknown, or one of its settings is wrong.
    """
    spec = bundle.task or TaskSpec(Classification.name)
    file = bundle.path / DESCRIPTION
    if spec.name not in TASKS:
        raise BundleError(f"{file}: unknown task {spec.name!r}; this PocketZO knows {', '.join(TASKS)}")
    task = TASKS[spec.name]
    for key in spec.settings:
        if key not in task.settings:
            raise BundleError(f"{file}: setting {key!r} of task {spec.name!r} is unknown to this PocketZO")
    try:
        return task(bundle, **spec.settings)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{file}: task {spec.name!r}: {error}") from None


def task_for(
    inputs: Iterable[ValueSpec],
    outputs: Iterable[ValueSpec],
    scores: str | None,
    *,
    labels: Sequence[str] | None = None,
    loss: str | None = None,
    threshold: float | None = None,
) -> TaskSpec | None:
    """Return the task of a graph; None if it is none of the tasks.

    Parameters
    ----------
    inputs, outputs : iterable of ValueSpec
        The graph's inputs and outputs.
    scores : str or None
        The name of the output of class scores or predicted numbers.
    labels : sequence of str or None
        The names of the classes.
    loss, threshold : optional
        The kind of loss that was added, and the threshold of its scores: see :class:`Task`.
    """
    label_input = next((value for value in inputs if value.name == "labels"), None)
    found = next((value for value in outputs if value.name == scores), None)
    settings = {"labels": None if labels is None else list(labels), "loss": loss, "threshold": threshold}
    # The shapes of a regression and of several labels an example are the same: the loss decides.
    kind = "cross-entropy" if loss is None and threshold is None else loss or "bce"
    for name, task in TASKS.items():
        if kind in task.losses and task.suits(label_input, found, threshold):
            given = {key: value for key, value in settings.items() if key in task.settings and value is not None}
            return TaskSpec(name, given)
    return None


def loss_text(bundle: Bundle) -> str:
    """Return what the loss of a bundle is, for people, such as "cross-entropy of 'logits' over 3 classes"."""
    if bundle.loss is None:
        return "none"
    task = task_of(bundle)
    if task.loss is None:
        return f"the graph's own output {bundle.loss!r}"
    if bundle.logits is None:
        return f"{task.loss} of the next tokens"
    count = next((value.shape[-1] for value in bundle.outputs if value.name == bundle.logits and value.shape), None)
    columns = {"classes": "classes", "label sets": "labels", "numbers": "values", "texts": "tokens"}[task.predicts]
    over = f" over {count} {columns}" if isinstance(count, int) and count > 1 else ""
    return f"{task.loss} of {bundle.logits!r}{over}"
