"""The tasks of language models: from the options to the training graph and the settings in ``bundle.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle, TaskSpec
from pocketzo.formats.companions import Companions
from pocketzo.formats.files import write_file
from pocketzo.formats.generation import CHAT_TEMPLATE, GENERATE, Generation
from pocketzo.formats.safetensors import file_sha256
from pocketzo.graph.language import LanguageGraph, set_calibration
from pocketzo.prepare.calibrate import mean_logits
from pocketzo.prepare.options import PER, TASKS
from pocketzo.runtime.tokenizer import open_tokenizer
from pocketzo.tasks.prompt import label_tokens

if TYPE_CHECKING:
    import onnx_ir as ir
    from tokenizers import Tokenizer

    from pocketzo.graph.weight import Weight

_MASKS: Final = ("[MASK]", "<mask>")
"""The mask tokens of BERT and RoBERTa and their kin, where no file names another."""


@dataclass(frozen=True)
class LanguageTask:
    """A task of a language model, as the options state it.

    Attributes
    ----------
    spec : TaskSpec
    graph : LanguageGraph
    tokenizer : Path or None
    companions : Companions
        What was found beside the model.
    """

    spec: TaskSpec
    graph: LanguageGraph
    tokenizer: Path | None
    companions: Companions

    @classmethod
    def of(
        cls,
        task: str,
        model: Path,
        *,
        tokenizer: Path | None,
        labels: Sequence[str] | None,
        template: str | None,
        label_words: Sequence[str] | None,
        per: str,
        calibrated: bool,
        note: Callable[[str], None] | None,
    ) -> Self:
        """Check the options; see :func:`pocketzo.prepare`."""
        companions = Companions.of(model)
        if tokenizer is None and companions.tokenizer is not None:
            tokenizer = companions.tokenizer
            if note is not None:
                note(f"tokenizer: {tokenizer}, as none was given")
        settings: dict[str, Any] = {"loss": "cross-entropy"}
        if task != "prompt":
            if labels is not None:
                raise ValueError(f"labels are for classes, and the task {task!r} has none")
            if task == "choice":
                settings["per"] = per
            return cls(TaskSpec(task, settings), LanguageGraph(causal=True), tokenizer, companions)
        if template is None or label_words is None:
            raise ValueError(
                "the task 'prompt' needs a template and label words, such as '{text} It was' and bad, good"
            )
        if len(label_words) < 2:
            raise ValueError(f"label_words must be two or more, a word for each class, got {list(label_words)!r}")
        if labels is not None and len(labels) != len(label_words):
            raise ValueError(f"{len(labels)} labels and {len(label_words)} label_words: expected a word for each label")
        if tokenizer is None:
            raise BundleError(
                f"{model}: a prompt needs the model's tokenizer, and there is none beside it: give --tokenizer"
            )
        opened = open_tokenizer(tokenizer)
        mask = _mask_token(opened, tokenizer, companions) if "{mask}" in template else None
        tokens = label_tokens(opened, template, label_words)
        settings |= {
            "labels": list(labels or label_words),
            "template": template,
            "label_words": list(label_words),
            "label_tokens": list(tokens),
            "mask_token": mask,
            "calibration": None,
        }
        graph = LanguageGraph(
            causal=mask is None,
            label_tokens=tuple(tokens),
            calibration=(0.0,) * len(tokens) if calibrated else None,  # until the texts were seen
        )
        return cls(TaskSpec(task, settings), graph, tokenizer, companions)

    def mark_unread(self, model: ir.Model, weights: Iterable[Weight]) -> None:
        """Freeze the weights that the training graph of a model does not read."""
        reduced = model.clone()
        self.graph.reduce(reduced)
        for weight in weights:
            read = weight.inline or weight.name in reduced.graph.initializers
            if weight.parameter and weight.frozen is None and not read:
                weight.frozen = "unused: the training graph does not read it"

    def calibrate(self, folder: Path, texts: Path, note: Callable[[str], None] | None) -> None:
        """Calibrate a bundle that is complete in its folder by the texts of a file of examples."""
        bundle = Bundle.read(folder)
        values = mean_logits(bundle, texts)
        set_calibration(bundle.model_path, values)
        settings = {**self.spec.settings, "calibration": list(values)}
        replace(
            bundle, task=TaskSpec(self.spec.name, settings), graph_sha256=file_sha256(bundle.model_path)
        ).write_description()
        if note is not None:
            means = ", ".join(
                f"{word} {value:.3f}" for word, value in zip(settings["label_words"], values, strict=True)
            )
            note(f"calibration: {means}, the mean logits over the texts of {texts}")

    def write_generation(self, folder: Path, graph: bytes) -> Generation:
        """Write what a bundle holds for generating text."""
        write_file(folder / GENERATE, graph)
        template = self.companions.chat_template
        if template is not None:
            write_file(folder / CHAT_TEMPLATE, template.encode())
        return Generation(
            file_sha256(folder / GENERATE),
            self.companions.eos,
            None if template is None else CHAT_TEMPLATE,
            self.companions.special_tokens,
        )


def check_task(task: str | None, options: dict[str, object], loss: str | None, per: str) -> None:
    """Raise ValueError for an unknown task, or an option that it does not have."""
    if task not in (None, *TASKS):
        raise ValueError(f"task must be {', '.join(map(repr, TASKS))} or None, got {task!r}")
    for name, value in options.items():
        if value is not None and task != "prompt":
            raise ValueError(f"{name} is an option of the task 'prompt', and the task is {task!r}")
    if per not in PER:
        raise ValueError(f"per must be {' or '.join(map(repr, PER))}, got {per!r}")
    if per != PER[0] and task != "choice":
        raise ValueError(f"per is an option of the task 'choice', and the task is {task!r}")
    if task is not None and loss not in (None, "cross-entropy"):
        raise ValueError(f"the loss of the task {task!r} is cross-entropy, got {loss!r}")


def _mask_token(tokenizer: Tokenizer, path: Path, companions: Companions) -> int:
    names = (companions.special_tokens.get("mask_token"), *_MASKS)
    found = next((token for name in names if name and (token := tokenizer.token_to_id(name)) is not None), None)
    if found is None:
        raise BundleError(
            f"{path}: the tokenizer has no mask token, and the template has {{mask}}: leave it out for a decoder"
        )
    return int(found)
