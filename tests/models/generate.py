"""Make the ONNX fixtures of this folder: tiny models as torch's two exporters write them.

    python tests/models/generate.py        # torch, transformers and onnxscript are needed here only

``README.md`` says with which versions the files here were made. Each ``NAME.onnx`` comes with ``NAME.npz``: inputs
(``input.*``), the logits that torch computes from them, and for each parameter of the torch module its name, its shape
sorted in size, and the sum of its elements and of their squares: all of them the same if it is transposed.

The new exporter writes a stack trace into each node, with the paths of the machine and more bytes than all else. It is
removed here, the names of the modules (``pkg.torch.onnx.name_scopes``) stay; nothing else is changed.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

import importlib.metadata
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

FOLDER = Path(__file__).parent
BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}


class Causal(torch.nn.Module):
    """A causal language model without the cache that neither exporter can write."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter elements that differ, as training does; a fresh one has biases of zeros, scales of ones."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(
            parameter, mean=1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, std=0.1
        )
    return model


def export(name: str, model: torch.nn.Module, *, new: bool, external: bool = False, folded: bool = True) -> None:
    model.eval()
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(1, 64, (2, 7), generator=generator), "attention_mask": torch.ones(2, 7).long()}
    inputs["attention_mask"][1, 5:] = 0
    if not isinstance(model, Causal):
        inputs["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]])
    axes = {key: {0: "batch", 1: "sequence"} for key in inputs}
    path = FOLDER / f"{name}.onnx"
    if new:
        shapes = {key: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for key in inputs}
        torch.onnx.export(
            model,
            kwargs=inputs,
            f=path,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=shapes,
            external_data=external,
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
        remove_traces(path)
    else:
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "batch"}},
            opset_version=14,
            do_constant_folding=folded,
            dynamo=False,
        )
    with torch.no_grad():
        logits = model(**inputs)
    parameters = {key: value.detach().double() for key, value in model.named_parameters()}
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        logits=getattr(logits, "logits", logits).numpy(),
        names=np.array(list(parameters)),
        shapes=np.array(["x".join(map(str, sorted(value.shape))) for value in parameters.values()]),
        sums=np.array([value.sum() for value in parameters.values()]),
        squares=np.array([value.square().sum() for value in parameters.values()]),
        **{f"input.{key}": value.numpy() for key, value in inputs.items()},
    )


def remove_traces(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    path.write_bytes(model.SerializeToString())


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for new, kind in (False, "old"), (True, "new"):
        torch.manual_seed(0)
        bert = randomised(BertForSequenceClassification(BertConfig(**BERT, num_labels=3)))
        export(f"bert-{kind}", bert, new=new)
        if new:
            export("bert-new-external", bert, new=True, external=True)
        else:
            export("bert-old-unfolded", bert, new=False, folded=False)
        export(f"fresh-{kind}", BertForSequenceClassification(BertConfig(**BERT, num_labels=3)), new=new)
        export(f"mlm-{kind}", randomised(BertForMaskedLM(BertConfig(**BERT))), new=new)
        gpt2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, attn_implementation="eager")
        export(f"gpt2-{kind}", Causal(randomised(GPT2LMHeadModel(gpt2))), new=new)
    opt = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        attn_implementation="eager",
    )
    export("opt-old", Causal(randomised(OPTForCausalLM(opt))), new=False)

    versions = "\n".join(
        f"| {package} | {importlib.metadata.version(package)} |"
        for package in ("torch", "transformers", "onnxscript", "onnx", "numpy")
    )
    (FOLDER / "README.md").write_text(
        "# Tiny models as exporters write them\n\n"
        "Random weights, no training; made by `python tests/models/generate.py`, which says what is in them, with\n\n"
        f"| package | version |\n|---|---|\n| Python | {sys.version.split()[0]} |\n{versions}\n\n"
        "| file | what is special |\n|---|---|\n"
        "| `bert-old`, `bert-new` | a classifier, by the TorchScript exporter (opset 14) and dynamo (opset 18) |\n"
        "| `bert-new-external` | the same with its weights in a second file |\n"
        "| `bert-old-unfolded` | exported with do_constant_folding=False: a Transpose stands before each MatMul |\n"
        "| `fresh-old`, `fresh-new` | as initialised: biases of zeros and scales of ones, merged by the exporters |\n"
        "| `mlm-old`, `mlm-new` | a masked language model; the output projection is the embedding |\n"
        "| `gpt2-old`, `gpt2-new` | a causal language model with Gemm layers, tied too |\n"
        "| `opt-old` | scopes that do not match the parameters' names |\n"
    )


if __name__ == "__main__":
    main()
