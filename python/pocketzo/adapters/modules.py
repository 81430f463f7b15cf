"""The module of a checkpoint that a projection of the graph was, by names.

Exporters keep names, or change them in known ways: they wrap the model in a module, put the operator behind the name,
cut a projection of queries, keys and values into three, or join three.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from pocketzo.adapters.checkpoint import Checkpoint
from pocketzo.errors import BundleError
from pocketzo.formats.added import ROLES, AddedSpec, Place

_CUT: Final = {f"{role[0]}_proj": role for role in ROLES}
_JOINED: Final = ("c_attn", "qkv_proj")
_JOINED_IN: Final = {"gpt2": "c_attn", "phi3": "qkv_proj"}
"""What a family calls its projection of queries, keys and values, if that is one."""
_GPT2: Final = {"attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
_CONV1D: Final = ("gpt2", "openai-gpt")
"""Families whose modules keep weights as [in, out]."""


@dataclass(frozen=True)
class Target:
    """Columns of a module's output, or of its input.

    Attributes
    ----------
    module : str
    start, count : int
    size : int
        The number of columns of the module.
    """

    module: str
    start: int
    count: int
    size: int


def is_conv1d(checkpoint: Checkpoint, modules: Iterable[str]) -> bool:
    """Return whether a family's modules are transformers' Conv1D; without a checkpoint, by their names."""
    if checkpoint.model_type is not None:
        return checkpoint.model_type in _CONV1D
    return any(re.search(r"\.h\.\d+\.attn\.c_|\.h\.\d+\.mlp\.c_", module) for module in modules)


def stem_of(item: AddedSpec) -> str:
    """Return the name of the projection: that of the tensors without what a set adds to it."""
    assert item.place is not None, "of a projection"
    stem = re.sub(r"\.(lora_[AB]|ia3)$", "", item.tensors[0])
    return stem if item.place.role is None else stem.removesuffix(f".{item.place.role}")


def target_of(item: AddedSpec, checkpoint: Checkpoint) -> Target:
    """Return the module of what was added.

    Raises
    ------
    BundleError
        The checkpoint has no module of such a name and shape.
    """
    place = item.place
    assert place is not None, "of a projection"
    found = find_target(item, checkpoint)
    if found is not None:
        return found
    names = list(dict.fromkeys(target.module for target in _candidates(stem_of(item), place, checkpoint)))
    raise BundleError(
        f"{checkpoint.path}: has no module for {item.tensors[0]!r}: none of {', '.join(map(repr, names))} with a "
        f"weight of {place.rows} x {place.columns}; expected the checkpoint that the model was exported from, or names "
        "of its modules in the export"
    )


def find_target(item: AddedSpec, checkpoint: Checkpoint) -> Target | None:
    """Return the module of what was added; None if the checkpoint has none of such a name and shape."""
    place = item.place
    assert place is not None, "of a projection"
    for target in _candidates(stem_of(item), place, checkpoint):
        if not checkpoint.shapes:
            return target
        inner, size = (place.rows, target.size) if not place.input else (target.size, place.columns)
        name = next((name for name in checkpoint.shapes if is_same(name, target.module)), None)
        if name is not None and sorted(checkpoint.shapes[name]) == sorted((inner, size)):
            return target
    return None


def is_same(name: str, module: str) -> bool:
    """Whether names are of one module: a checkpoint may lack the prefix of the class around its base model."""
    return name == module or name.endswith(f".{module}") or module.endswith(f".{name}")


def _candidates(stem: str, place: Place, checkpoint: Checkpoint) -> Iterator[Target]:
    """Yield modules, the likeliest first."""
    name = re.sub(r"\.(MatMul|Gemm)(_\w+)?$", "", re.sub(r"\.weight([._]\w+)*$", "", stem))
    if name.startswith("model.model.") or name == "model.lm_head":  # the wrapper of an exporter
        name = name.removeprefix("model.")
    whole = Target(name, place.start, place.count, place.rows if place.input else place.columns)
    if place.input:
        yield from (Target(other, 0, place.rows, place.rows) for other in _renamed(name))
        return
    parent, _, last = name.rpartition(".")
    is_gpt2 = checkpoint.model_type == "gpt2" or (checkpoint.model_type is None and ".h." in name and ".attn." in name)
    likely = "c_attn" if is_gpt2 else _JOINED_IN.get(checkpoint.model_type or "")
    for joined in (_JOINED if checkpoint.shapes else () if likely is None else (likely,)) if last in _CUT else ():
        size = _joined_size(f"{parent}.{joined}", place, checkpoint)
        at = {"q_proj": 0, "k_proj": size - 2 * place.columns, "v_proj": size - place.columns}[last]
        yield Target(f"{parent}.{joined}", at + place.start, place.count, size)
    is_cut = bool(checkpoint.shapes) or checkpoint.model_type not in (None, *_JOINED_IN)
    if last in _JOINED and place.role is not None and is_cut:
        cut = f"{place.role[0]}_proj"
        for before in dict.fromkeys((parent, re.sub(r"\.attn$", ".self_attn", parent))):
            yield Target(f"{before}.{cut}", 0, place.count, place.count)
    if is_cut:
        name = re.sub(r"^(model\.layers\.\d+)\.attn\.", r"\1.self_attn.", name)
    yield from (Target(other, whole.start, whole.count, whole.size) for other in _renamed(name))


def _renamed(name: str) -> Iterator[str]:
    for old, new in _GPT2.items():
        if re.search(rf"\.h\.\d+\.{re.escape(old)}$", name):
            yield name.removesuffix(old) + new
    yield name


def _joined_size(module: str, place: Place, checkpoint: Checkpoint) -> int:
    """Return the number of columns of a module that queries, keys and values share."""
    for name, shape in checkpoint.shapes.items():
        if is_same(name, module) and len(shape) == 2 and place.rows in shape:
            return shape[0] if shape[1] == place.rows else shape[1]
    if checkpoint.heads and checkpoint.kv_heads:
        count, others = checkpoint.heads, checkpoint.kv_heads
        own = others if re.search(r"[kv]_proj$", place.weight.split(".weight")[0]) else count
        return place.columns // own * (count + 2 * others)
    return 3 * place.columns
