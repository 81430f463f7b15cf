"""Whether a decoder's graph computes what its model in transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from pocketzo.graph.sessions import open_source

Array = npt.NDArray[Any]
_LENGTH: Final = 12
_COLD: Final = 8  # tokens before the cache is used


def difference(model: Any, path: Path) -> float:
    """Return the largest difference of the logits of two rows of random tokens, relative to the largest logit.

    The second row is padded on the right. Both rows are computed at once and, without padding, in two parts with a
    cache between them. The graph's inputs and outputs are those of :func:`write_float_graph`; it may lack
    ``position_ids``.
    """
    session = open_source(path, external=True)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, _LENGTH))
    mask = np.ones_like(ids)
    mask[1, _LENGTH // 2 :] = 0
    whole, _ = _run(session, ids, mask, 0, None)
    _, cache = _run(session, ids[:, :_COLD], mask[:, :_COLD] | 1, 0, None)
    warm, _ = _run(session, ids[:, _COLD:], mask | 1, _COLD, cache)
    expected, unpadded = (
        model(torch.from_numpy(ids), attention_mask=torch.from_numpy(each)).logits.detach().numpy()
        for each in (mask, mask | 1)
    )
    largest = np.abs(expected[mask > 0]).max()
    found = np.abs(whole - expected)[mask > 0].max(), np.abs(warm - unpadded[:, _COLD:]).max()
    return float(max(found) / largest)


def _run(
    session: ort.InferenceSession, ids: Array, mask: Array, start: int, cache: list[Array] | None
) -> tuple[Array, list[Array]]:
    positions = np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape)
    values = {"input_ids": ids, "attention_mask": mask, "position_ids": np.ascontiguousarray(positions)}
    inputs = {value.name: value for value in session.get_inputs()}
    feed = {name: array for name, array in values.items() if name in inputs}
    pasts = [value for name, value in inputs.items() if name not in feed]
    for index, past in enumerate(pasts):
        empty = np.empty((len(ids), past.shape[1], 0, past.shape[3]), np.float32)
        feed[past.name] = empty if cache is None else cache[index]
    names = [past.name.replace("past_key_values", "present") for past in pasts]
    logits, *found = session.run(["logits", *names], feed)
    return logits, found
