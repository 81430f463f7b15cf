"""The float32 graph of an encoder of transformers, and whether it computes what the model computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter

from pocketzo.export._trace import trace
from pocketzo.graph.sessions import open_source

Array = npt.NDArray[Any]
_AFTER_PADDING: Final = {"mpnet", "roberta"}  # positions are counted from the number of the padding token plus 1
_TRACED: Final = (2, 7)
_COMPARED: Final = ((3, 64), (1, 5))
_OPSET: Final = 20
_MODEL, _LAYERS = "model.", "sentence.layers."


class Encoder(torch.nn.Module):  # type: ignore[misc]  # torch may be missing
    """An encoder with tensors as inputs and outputs, and the names of them.

    Parameters
    ----------
    model : PreTrainedModel
        With logits or hidden states as its first output.
    output : str
        The name of that.
    sentence : Module, optional
        Computes ``sentence_embedding`` from hidden states and mask.
    """

    def __init__(self, model: Any, output: str, sentence: Any = None) -> None:
        super().__init__()
        self.model, self.sentence = model, sentence
        self.inputs = ["input_ids", "attention_mask"]
        if getattr(model.config, "type_vocab_size", 0) > 1:
            self.inputs.append("token_type_ids")
        self.outputs = [output] if sentence is None else [output, "sentence_embedding"]

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Return the first output, and the sentence embedding if there is one."""
        found = self.model(**dict(zip(self.inputs, inputs, strict=True)))[0]
        return (found,) if self.sentence is None else (found, self.sentence(found, inputs[1]))

    def batch(self, rows: int, length: int) -> dict[str, Array]:
        """Return random inputs, shorter if the model has fewer positions; the last of several rows is padded."""
        config, rng = self.model.config, np.random.default_rng(0)
        padding = getattr(config, "pad_token_id", None) or 0
        first = padding + 1 if config.model_type in _AFTER_PADDING else 0
        length = min(length, config.max_position_embeddings - first)
        ids = rng.integers(0, config.vocab_size, (rows, length))
        mask = np.ones_like(ids)
        if rows > 1:
            mask[-1, length // 2 :] = 0
            ids[-1, length // 2 :] = padding
        kinds = rng.integers(0, max(getattr(config, "type_vocab_size", 0), 1), ids.shape)
        return dict(zip(self.inputs, (ids, mask, kinds), strict=False))


def write_encoder_graph(encoder: Encoder, target: Path) -> None:
    """Write the graph to a file, with external data beside it; its weights have the names of the checkpoint.

    Raises
    ------
    Error
        If torch cannot trace the model.
    """
    model = trace(
        encoder,
        type(encoder.model).__name__,
        [torch.from_numpy(array) for array in encoder.batch(*_TRACED).values()],
        input_names=encoder.inputs,
        output_names=encoder.outputs,
        dynamic_shapes=(tuple({0: "batch", 1: "sequence"} for _ in encoder.inputs),),
        opset_version=_OPSET,
        optimize=False,  # it would transpose weights under new names, and merge biases of equal values
    ).model
    common.InlinePass()(model)
    optimizer.fold_constants(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    rewriter.rewrite(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # where in transformers each node comes from
    for value in tuple(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix(_MODEL).removeprefix(_LAYERS)
    ir.save(model, target, external_data=f"{target.name}.data")


def difference(encoder: Encoder, path: Path) -> float:
    """Return the largest difference of a graph's outputs at tokens, relative to the largest element of each output.

    The encoder's parameters have to be without gradients.
    """
    session = open_source(path, external=True)
    found = []
    for shape in _COMPARED:
        batch = encoder.batch(*shape)
        expected = [each.numpy() for each in encoder(*map(torch.from_numpy, batch.values()))]
        for one, other in zip(session.run(encoder.outputs, _read(session, batch)), expected, strict=True):
            off = np.abs(one - other)
            found.append(_at_tokens(off, batch["attention_mask"]).max() / np.abs(other).max())
    return float(np.max(found))


def _read(session: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
    return {value.name: batch[value.name] for value in session.get_inputs()}


def _at_tokens(values: Array, mask: Array) -> Array:
    """Return the values at tokens, of an output that has some for each token; what it has for padding is not used."""
    return values[mask > 0] if values.ndim == 3 else values
