"""What an export is made of: a model of transformers, its tokenizer, and the way to its graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from pocketzo.export import _agreement, _encoder_graph
from pocketzo.export._float_graph import write_float_graph
from pocketzo.export._gguf_file import GgufFile
from pocketzo.export.families import Kind


class Source(ABC):
    """A model that was loaded.

    Attributes
    ----------
    path : Path
        The file or folder that it was loaded from.
    kind : {"decoder", "masked", "classifier", "encoder"}
    model : PreTrainedModel
        With float32 weights, in evaluation mode.
    tokenizer : PreTrainedTokenizer or None
    file : GgufFile or None
        Has blocks that a quantised graph can keep.
    """

    def __init__(self, path: Path, kind: Kind, model: Any, tokenizer: Any, file: GgufFile | None = None) -> None:
        self.path, self.kind, self.model, self.tokenizer, self.file = path, kind, model, tokenizer, file

    @abstractmethod
    def write_graph(self, target: Path) -> None:
        """Write the float32 graph, with external data beside it."""

    @abstractmethod
    def difference(self, path: Path) -> float:
        """Return the largest difference of a graph's outputs from the model's, relative to the largest element."""

    def save_settings(self, folder: Path) -> None:
        """Write the tokenizer and the settings of model, tokenizer and generation."""
        self.model.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


class DecoderSource(Source):
    """A decoder."""

    def __init__(self, path: Path, model: Any, tokenizer: Any, file: GgufFile | None = None) -> None:
        super().__init__(path, "decoder", model, tokenizer, file)

    def write_graph(self, target: Path) -> None:
        """Write the graph; see :meth:`Source.write_graph`."""
        write_float_graph(self.model, target)

    def difference(self, path: Path) -> float:
        """Compare a graph; see :meth:`Source.difference`."""
        return _agreement.difference(self.model, path)


class EncoderSource(Source):
    """An encoder; `sentence` is a module that computes an embedding from its hidden states."""

    def __init__(self, path: Path, kind: Kind, model: Any, tokenizer: Any, sentence: Any = None) -> None:
        super().__init__(path, kind, model, tokenizer)
        output = "last_hidden_state" if kind == "encoder" else "logits"
        self.encoder = _encoder_graph.Encoder(model, output, sentence).eval().requires_grad_(False)

    def write_graph(self, target: Path) -> None:
        """Write the graph; see :meth:`Source.write_graph`."""
        _encoder_graph.write_encoder_graph(self.encoder, target)

    def difference(self, path: Path) -> float:
        """Compare a graph; see :meth:`Source.difference`."""
        return _encoder_graph.difference(self.encoder, path)
