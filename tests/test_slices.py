"""Prepacked language models: logits in slices, and a tied matrix that is kept once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from decoders import VOCABULARY, llama_weights, write_llama
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from test_language_tasks import write_tokenizer

import pocketzo as pz
from pocketzo._core import Packing
from pocketzo.runtime import slices
from pocketzo.runtime.onnx_proto import read_graph
from pocketzo.tasks.objective import Objective, metric_objective
from pocketzo.tasks.parts import parts
from pocketzo.tasks.registry import task_of

ROW = 4 * VOCABULARY  # bytes of the logits of a position


@pytest.fixture
def bundle(tmp_path: Path) -> pz.Bundle:
    """A decoder whose output projection is its embedding."""
    path = write_llama(tmp_path / "m.onnx", llama_weights(kv_heads=2, tied=True), 2)
    return pz.prepare(path, tmp_path / "base", task="causal-lm")


def batch_of(rows: int, width: int) -> dict[str, NDArray[np.int64]]:
    """Return random tokens, of which all but the first of each row count."""
    ids = np.random.default_rng(7).integers(0, VOCABULARY, (rows, width))
    places = np.arange(rows * width).reshape(rows, width)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(width), (rows, 1)),
        "positions": places[:, :-1].ravel(),
        "targets": ids[:, 1:].ravel(),
    }


def in_slices(monkeypatch: pytest.MonkeyPatch, bundle: pz.Bundle) -> pz.Model:
    """Load a model whose logits of 512 positions need 4 slices."""
    monkeypatch.setattr(slices, "LOGITS_MEMORY", 128 * ROW)
    model = pz.load(bundle, threads=1, prepack=True)
    assert model.slices == slices.Slices(4, VOCABULARY)
    return model


@pytest.mark.parametrize("positions", [1, 2, 3, 5, 10])
def test_slices_give_the_losses_of_all_positions_at_once(
    positions: int, bundle: pz.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pz.load(bundle, threads=1, prepack=False)
    model = in_slices(monkeypatch, bundle)
    for rows, width in ((1, 2), (1, 3), (1, 5), (3, 6), (4, 3)):  # 1 to 15 positions: slices that are empty, or uneven
        batch = batch_of(rows, width)
        expected = plain.run(batch)
        got = model.run(batch, logits_memory=positions * ROW)
        for name, values in expected.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("room", "sizes"), [(100, [12]), (12, [12]), (11, [6, 6]), (5, [4, 4, 4]), (3, [3] * 4), (1, [3] * 4)]
)
def test_slices_are_as_few_as_may_be_and_equal(
    room: int, sizes: list[int], bundle: pz.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "LOGITS_MEMORY", 128 * ROW)
    model = read_graph(bundle.model_path)
    (tied,) = (tensor.name for tensor in bundle.tensors if tensor.shape[0] == VOCABULARY)
    cut = slices.cut_losses(model, {tied: VOCABULARY})
    for at in range(cut.count):
        output = model.graph.output.add(name=f"targets/slice{at}")
        output.type.tensor_type.elem_type = 7
        output.type.tensor_type.shape.dim.add(dim_param=f"slice{at}")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    batch = batch_of(4, 4)
    feed = {spec.name: batch[spec.name] for spec in bundle.inputs} | cut.feed(room * ROW)
    found = session.run([f"targets/slice{at}" for at in range(cut.count)], feed)
    assert [len(part) for part in found if len(part)] == sizes
    np.testing.assert_array_equal(np.concatenate(found), batch["targets"])


def test_a_part_of_a_batch_holds_the_positions_of_all_slices(
    bundle: pz.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, batch = in_slices(monkeypatch, bundle), task_of(bundle), batch_of(8, 5)
    memory = 96 * 4 * 5 * 2  # of the widest activations of two rows
    assert len(parts(task, batch, memory)) == 4
    few = 2 * ROW  # the logits of half a row
    monkeypatch.setattr("pocketzo.tasks.parts.LOGITS_MEMORY", few)
    assert len(parts(task, batch)) == 8
    assert len(parts(task, batch, slices=model.slices.count)) == 4
    whole = Objective(metric_objective("loss", bundle), task)(model, batch)
    monkeypatch.setattr(slices, "LOGITS_MEMORY", few)
    assert Objective(metric_objective("loss", bundle), task)(model, batch) == pytest.approx(whole, rel=1e-6)


def test_prompts_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their logits are of the label words."""
    monkeypatch.setattr(slices, "LOGITS_MEMORY", 128 * ROW)
    path = write_llama(tmp_path / "m.onnx", llama_weights(kv_heads=2, tied=True), 2)
    options: dict[str, Any] = {"template": "{text} w1", "label_words": ["w2", "w3"]}
    write_tokenizer(tmp_path)
    bundle = pz.prepare(path, tmp_path / "base", task="prompt", **options)
    assert pz.load(bundle, threads=1, prepack=True).slices == slices.WHOLE


# ---- a tied matrix ---------------------------------------------------------------------------------------------------


def test_a_tied_matrix_is_kept_once_and_both_uses_are_live(bundle: pz.Bundle) -> None:
    packed, plain = (pz.load(bundle, threads=1, prepack=prepack) for prepack in (True, False))
    (tied,) = (tensor.name for tensor in bundle.tensors if tensor.shape[0] == VOCABULARY)
    ((_, _, packing),) = packed.weights.segments(tied)
    assert packing is not None
    batch = batch_of(3, 6)
    for seed in range(3):
        for model in (packed, plain):
            pz.MeZO(model, lr=1e-2, eps=1e-2, seed=seed).step(lambda _: 1.0)
        assert packed.weights[tied].tobytes() == plain.weights[tied].tobytes()
        np.testing.assert_allclose(packed.loss(batch), plain.loss(batch), rtol=1e-5)
    other = np.random.default_rng(0).normal(size=packed.weights[tied].shape).astype(np.float32)
    before = packed.loss(batch)
    for model in (packed, plain):
        model.weights[tied] = other
    np.testing.assert_allclose(packed.loss(batch), plain.loss(batch), rtol=1e-5)
    assert packed.loss(batch) != pytest.approx(before, rel=1e-3)


def test_rows_are_looked_up_as_onnxruntime_does(bundle: pz.Bundle) -> None:
    """From the end with negative numbers, and not beyond the last."""
    packed, plain = (pz.load(bundle, threads=1, prepack=prepack) for prepack in (True, False))
    batch = batch_of(2, 4)
    batch["input_ids"][0] -= VOCABULARY
    np.testing.assert_allclose(packed.loss(batch), plain.loss(batch), rtol=1e-5)
    for wrong in (VOCABULARY, -VOCABULARY - 1):
        batch["input_ids"][1, 2] = wrong
        for model in (packed, plain):
            with pytest.raises(pz.Error, match="cannot be run on this batch"):
                model.loss(batch)


@given(data=st.data())
def test_take_gives_rows_of_any_packing(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 100))
    transposed = data.draw(st.booleans())
    stride = -(-columns // 16) * 16
    packing = Packing(rows=rows, columns=columns, stride=stride, depth=64, transposed=transposed)
    tensor = np.arange(rows * columns, dtype=np.float32).reshape((columns, rows) if transposed else (rows, columns))
    packed = np.zeros(packing.size, np.float32)
    packing.pack(packed, tensor, 0)
    ids = data.draw(arrays(np.int64, st.sampled_from([(), (3,), (2, 4)]), elements=st.integers(0, len(tensor) - 1)))
    np.testing.assert_array_equal(packing.take(packed, ids), tensor[ids])
    np.testing.assert_array_equal(packing.take(packed, np.asarray(ids - len(tensor))), tensor[ids])
    for wrong in (len(tensor), -len(tensor) - 1):
        with pytest.raises(IndexError, match=f"row {wrong} of a tensor with {len(tensor)} rows"):
            packing.take(packed, np.array([0, wrong]))
