"""The registry of tasks, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import DESCRIPTION, TaskSpec, ValueSpec
from pocketzo.tasks.classification import Classification
from pocketzo.tasks.tokens import TokenClassification

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle
    from pocketzo.tasks.base import Task

TASKS: Final[Mapping[str, type[Task]]] = {
    task.name: task
    for task in (
        Classification,
        TokenClassification,
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
    inputs: Iterable[ValueSpec], outputs: Iterable[ValueSpec], logits: str | None, labels: Sequence[str] | None
) -> TaskSpec | None:
    """Return the first task that suits a graph, or None.

    Parameters
    ----------
    inputs, outputs : iterable of ValueSpec
        The graph's inputs and outputs.
    logits : str or None
        The name of the logits output.
    labels : sequence of str or None
        The names of the classes.
    """
    label_input = next((value for value in inputs if value.name == "labels"), None)
    scores = next((value for value in outputs if value.name == logits), None)
    settings = {} if labels is None else {"labels": list(labels)}
    for name, task in TASKS.items():
        if task.suits(label_input, scores):
            return TaskSpec(name, settings)
    return None
