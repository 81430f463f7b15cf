"""A frozen base stays in the file of the bundle, and only what is trained is in memory."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoders import HIDDEN, Array, gpt2_weights, llama_weights, write_gpt2, write_llama
from graphs import node
from independent_reader import read_bundle, read_journal, replay
from onnx import helper, numpy_helper
from test_decoders import blocks
from test_language_models import Sentences

import pocketzo as pz
from pocketzo.errors import DeadWeightError
from pocketzo.formats.safetensors import read_header
from pocketzo.runtime import frozen
from pocketzo.runtime.frozen import frozen_base
from pocketzo.runtime.generate import open_decoder
from pocketzo.runtime.loader import Loader
from pocketzo.runtime.onnx_proto import onnx_messages
from pocketzo.train.run import Unloaded

RANK = 2


def add_lora(path: Path) -> None:
    """Add x A B to every product by a square matrix, as LoRA does."""
    model = onnx.load(path)
    graph, rng = model.graph, np.random.default_rng(3)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes = []
    for one in graph.node:
        nodes.append(one)
        attributes = {attribute.name: attribute.i for attribute in one.attribute}
        sizes = (
            (attributes["K"], attributes["N"]) if one.op_type == "MatMulNBits" else shapes.get([*one.input, "", ""][1])
        )
        if one.op_type not in ("MatMul", "MatMulNBits") or sizes != (HIDDEN, HIDDEN):
            continue
        name, output = f"lora.{len(nodes)}", one.output[0]
        for side, shape in (("A", (HIDDEN, RANK)), ("B", (RANK, HIDDEN))):
            values = (0.1 * rng.standard_normal(shape)).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, f"{name}.{side}"))
        one.output[0] = f"{name}/base"
        nodes += [
            helper.make_node("MatMul", [one.input[0], f"{name}.A"], [f"{name}/down"], f"{name}/down"),
            helper.make_node("MatMul", [f"{name}/down", f"{name}.B"], [f"{name}/up"], f"{name}/up"),
            helper.make_node("Add", [f"{name}/base", f"{name}/up"], [output], f"{name}/sum"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


@pytest.fixture(scope="module", params=["gpt2", "gpt2-int4", "llama", "llama-int4", "llama-int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with frozen matrices of 32, 4 or 8 bits; LoRA and, of llama, norms are trained."""
    kind, _, bits = request.param.partition("-int")
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / "model.onnx"
    if kind == "gpt2":
        write_gpt2(path, gpt2_weights(), gemm=False)
    else:
        write_llama(path, llama_weights(kv_heads=2), 2)
    if bits:
        logging.disable(logging.WARNING)  # onnxruntime's quantiser writes to the root logger
        blocks(path, path, int(bits), "MatMul")
        logging.disable(logging.NOTSET)
    add_lora(path)
    pz.prepare(path, folder / "bundle", task="causal-lm", train=r"lora|layers\.1\.input_layernorm")
    return folder / "bundle"


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tiny model's output projection cut, and many tensors trained."""
    monkeypatch.setattr(frozen, "_MOST_TRAINED", 0.5)
    monkeypatch.setattr(frozen, "_WIDE", 4 * HIDDEN * 40)
    monkeypatch.setattr(frozen, "_SLICE", 4 * HIDDEN * 7)


pytestmark = pytest.mark.usefixtures("_small")


def trained(bundle: pz.Bundle) -> set[str]:
    return {tensor.name for tensor in bundle.tensors if tensor.trainable}


def stored(bundle: pz.Bundle, name: str) -> bytes:
    entry = read_header(bundle.weights_path)[name]
    return bundle.weights_path.read_bytes()[entry.start : entry.stop]


def fit(model: pz.Model, run: Path, steps: int = 6, **settings: Any) -> pz.Trainer:
    data = Sentences(model.bundle.path.parent / "model.onnx")
    optimizer = pz.MeZO(model, **{"lr": 1e-2, "eps": 1e-2} | settings)
    trainer = pz.Trainer(model, optimizer, data, run=run, steps=steps, batch_size=4)
    trainer.fit()
    return trainer


def loss(model: pz.Model) -> float:
    return model.loss(Sentences(model.bundle.path.parent / "model.onnx").batch(np.arange(8)))


def test_only_what_is_trained_is_in_memory(bundle: Path) -> None:
    model = pz.load(bundle, threads=1)
    assert model.prepacked
    assert set(model.weights.image.views) == trained(model.bundle) != set(model.weights)
    assert model.weights.nbytes < 0.5 * model.bundle.weights_path.stat().st_size
    for name in model.weights:
        assert model.weights[name].tobytes() == stored(model.bundle, name)
    assert model.weights.sha256() == pz.load(bundle, threads=1, prepack=False).weights.sha256()


def test_a_run_is_that_of_the_plain_layout(bundle: Path, tmp_path: Path) -> None:
    over, plain = pz.load(bundle, threads=1), pz.load(bundle, threads=1, prepack=False)
    assert loss(over) == pytest.approx(loss(plain), rel=1e-5)
    for model, name in ((over, "over"), (plain, "plain")):
        fit(model, tmp_path / name)
    runs = pz.Run(tmp_path / "over"), pz.Run(tmp_path / "plain")
    for one, other in zip(*(run.entries for run in runs), strict=True):
        assert one.coefficients == pytest.approx(other.coefficients, rel=1e-3, abs=1e-7)
    runs[0].replay_onto(plain)
    assert plain.weights.sha256() == over.weights.sha256() != pz.Bundle.read(bundle).base_sha256
    runs[1].replay_onto(over)
    unloaded = Unloaded(pz.Bundle.read(bundle))
    runs[1].replay_onto(unloaded)
    assert set(unloaded.weights.image.views) == trained(unloaded.bundle)
    assert over.weights.sha256() == unloaded.weights.sha256()


def test_a_saved_model_is_what_plain_onnxruntime_computes(bundle: Path, tmp_path: Path) -> None:
    model = pz.load(bundle, threads=1)
    fit(model, tmp_path / "run")
    model.save(tmp_path / "saved")
    pz.Run(tmp_path / "run").replay(tmp_path / "replayed")
    saved = pz.Bundle.read(tmp_path / "saved")
    assert saved.weights_path.read_bytes() == (tmp_path / "replayed/weights.safetensors").read_bytes()
    changed = {name for name in model.weights if stored(saved, name) != stored(model.bundle, name)}
    assert changed == trained(model.bundle)
    session = ort.InferenceSession(saved.model_path, providers=["CPUExecutionProvider"])
    batch = Sentences(bundle.parent / "model.onnx").batch(np.arange(8))
    feed = {value.name: batch[value.name] for value in session.get_inputs()}
    assert session.run([saved.loss], feed)[0] == pytest.approx(loss(model), rel=1e-5)


class Stopping(Sentences):
    """Data whose file is gone after four steps."""

    def batch(self, indices: Array) -> pz.Batch:
        self.left = getattr(self, "left", 4) - (len(indices) == 4)
        if self.left < 0:
            raise OSError("gone")
        return super().batch(indices)


@pytest.mark.parametrize("method", [pz.MeZO, pz.Momentum])
def test_a_run_resumes_from_a_snapshot(bundle: Path, tmp_path: Path, method: type[pz.MeZO]) -> None:
    def trainer(run: str, data: Sentences) -> pz.Trainer:
        model = pz.load(bundle, threads=1)
        optimizer = method(model, lr=1e-2, eps=1e-2)
        return pz.Trainer(model, optimizer, data, run=tmp_path / run, steps=6, batch_size=4, snapshot_every=2)

    path = bundle.parent / "model.onnx"
    whole = trainer("whole", Sentences(path))
    whole.fit()
    with pytest.raises(OSError, match="gone"):
        trainer("stopped", Stopping(path)).fit()
    (snapshot,) = (tmp_path / "stopped/snapshots").iterdir()
    size = (bundle / "weights.safetensors").stat().st_size
    assert (snapshot / "weights.safetensors").stat().st_size == size
    resumed = pz.Trainer.resume(tmp_path / "stopped", Sentences(path))
    assert set(resumed.model.weights.image.views) == trained(resumed.model.bundle)
    resumed.fit()
    assert resumed.model.weights.sha256() == whole.model.weights.sha256()


def test_without_a_learning_rate_every_bit_stays(bundle: Path, tmp_path: Path) -> None:
    model = pz.load(bundle, threads=1)
    optimizer = pz.MeZO(model, lr=0.0, eps=1e-2)
    values = iter(np.random.default_rng(0).standard_normal(2000))
    for _ in range(1000):
        optimizer.step(lambda model: next(values))
    assert model.weights.sha256() == model.bundle.base_sha256
    drifted = pz.MeZO(model, lr=0.0, eps=1e-2, exact=False)
    for value in range(20):
        drifted.step(lambda model, value=value: value)  # type: ignore[misc]
    assert model.weights.sha256() != model.bundle.base_sha256


@pytest.mark.parametrize("method", [pz.MeZO, pz.FZOO, pz.Momentum])
def test_steps_return_by_a_copy_and_others_replay_them(bundle: Path, tmp_path: Path, method: type[pz.MeZO]) -> None:
    model = pz.load(bundle, threads=1)
    data = Sentences(bundle.parent / "model.onnx")
    optimizer = method(model, lr=1e-2, eps=1e-2, queries=3, weight_decay=0.1, subset=pz.Block(0.5))
    pz.Trainer(model, optimizer, data, run=tmp_path / "run", steps=5, batch_size=4).fit()
    header, _, entries, _ = read_journal(tmp_path / "run/journal.pzj")
    assert header["method"]["exact"] is True
    described, weights = read_bundle(bundle)
    replay(described, weights, header, entries)
    assert model.weights.sha256() == hashlib.sha256(weights).hexdigest() != model.bundle.base_sha256


def test_a_failed_step_leaves_the_weights(bundle: Path) -> None:
    model = pz.load(bundle, threads=1)
    optimizer = pz.MeZO(model, lr=1e-2, eps=1e-2)
    answers: Iterator[float | Exception] = iter([1.0, RuntimeError("stop"), 1.0, float("nan")])

    def objective(model: pz.Model) -> float:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step(objective)
    assert optimizer.step(objective).skipped
    assert model.weights.sha256() == model.bundle.base_sha256


def test_texts_are_generated_over_the_base(bundle: Path, tmp_path: Path) -> None:
    over, plain = pz.load(bundle, threads=1), pz.load(bundle, threads=1, prepack=False)
    fit(over, tmp_path / "run", lr=0.3)
    pz.Run(tmp_path / "run").replay_onto(plain)

    def scores(model: pz.Model) -> Array:
        model.weights.flush()
        return np.asarray(open_decoder(model.bundle, model.weights.image, 1).begin().logits([3, 1, 4, 1, 5]))

    np.testing.assert_allclose(scores(over), scores(plain), rtol=1e-4, atol=1e-4)
    assert np.abs(scores(over) - scores(pz.load(bundle, threads=1))).max() > 1e-3


def test_where_much_is_trained_all_of_it_is_in_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = pz.Bundle.read(bundle)
    sizes = {tensor.name: len(stored(read, tensor.name)) for tensor in read.tensors}
    share = sum(sizes[name] for name in trained(read)) / sum(sizes.values())
    monkeypatch.setattr(frozen, "_MOST_TRAINED", share)
    assert frozen_base(read) == sizes.keys() - trained(read)
    monkeypatch.setattr(frozen, "_MOST_TRAINED", share - 1e-6)
    assert not frozen_base(read)
    assert Unloaded(read).weights.image.is_whole


def test_the_base_is_read_from_the_file_that_was_opened(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    model = pz.load(tmp_path / "bundle", threads=1)
    frozen_name = min(set(model.weights) - trained(model.bundle))
    before = model.weights[frozen_name]
    (tmp_path / "other").write_bytes(bytes(model.bundle.weights_path.stat().st_size))
    (tmp_path / "other").replace(model.bundle.weights_path)
    np.testing.assert_array_equal(model.weights[frozen_name], before)
    assert model.weights.sha256() == model.bundle.base_sha256
    with pytest.raises(ValueError, match=f"{frozen_name} is frozen"):
        model.weights[frozen_name] = before


def test_a_file_that_becomes_shorter_is_an_error(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    weights = Unloaded(pz.Bundle.read(tmp_path / "bundle")).weights
    os.truncate(tmp_path / "bundle/weights.safetensors", 4096)
    with pytest.raises(pz.BundleError, match="shorter than it was"):
        weights.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_dead_weight_is_found_and_another_layout_is_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        frozen, "declare_inputs", lambda graph, bundle: None
    )  # so that onnxruntime packs copies of LoRA
    read = pz.Bundle.read(bundle)
    with pytest.raises(DeadWeightError, match=r"does not see what is written to lora\."):
        Loader(read, threads=1, prepack="auto", verify="auto", max_memory=None, forward_seconds={})._load_over_base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these weights are not prepacked in either of the other layouts
        model = pz.load(bundle, threads=1)
    assert model.weights.image.is_whole or model.weights.locations
    before = loss(model)
    for name in trained(read):
        model.weights[name] = 2 * model.weights[name]
    assert loss(model) != before


def quantised(path: Path, layers: int, inner: int, columns: int, bits: int) -> None:
    """Write a model that scales x and multiplies it by integers in blocks of 32, once a layer."""
    rng, nodes, weights = np.random.default_rng(0), [], []
    attributes: dict[str, Any] = {"K": inner, "N": columns, "bits": bits, "block_size": 32, "domain": "com.microsoft"}
    for n in range(layers):
        constants: dict[str, Array] = {
            f"integers{n}": rng.integers(0, 256, (columns, inner // 32, 4 * bits)).astype(np.uint8),
            f"scales{n}": (1e-2 * rng.standard_normal((columns, inner // 32))).astype(np.float32),
            f"zeros{n}": rng.integers(0, 256, (columns, inner // 32 * bits // 8)).astype(np.uint8),
            f"norm{n}.weight": rng.standard_normal(inner).astype(np.float32),
        }
        weights += [numpy_helper.from_array(array, name) for name, array in constants.items()]
        output = "logits" if n == layers - 1 else f"x{n + 1}"
        nodes.append(node("Mul", f"x{n} norm{n}.weight", f"y{n}"))
        nodes.append(node("MatMulNBits", f"y{n} integers{n} scales{n} zeros{n}", output, **attributes))
    values = [
        helper.make_tensor_value_info(*value) for value in (("x0", 1, ("n", inner)), ("logits", 1, ("n", columns)))
    ]
    graph = helper.make_graph(nodes, "products", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def test_loading_and_a_step_take_one_copy_of_the_base(tmp_path: Path) -> None:
    quantised(tmp_path / "model.onnx", 96, 1024, 1024, 4)
    read = pz.prepare(tmp_path / "model.onnx", tmp_path / "bundle")
    size = read.weights_path.stat().st_size
    script = (
        "import sys, numpy as np, pocketzo as pz\n"
        "from pocketzo.machine.memory import process_memory\n"
        "from pocketzo.runtime.layout import detect_layout\n"
        "detect_layout()\n"
        "before = process_memory()[1]\n"
        "model = pz.load(sys.argv[1], threads=1, verify='fast')\n"
        "batch = {'x0': np.ones((4, 1024), np.float32), 'labels': np.zeros(4, np.int64)}\n"
        "pz.MeZO(model, lr=1e-3).step(lambda model: model.loss(batch))\n"
        "print(process_memory()[1] - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, read.path], check=True, capture_output=True, text=True)
    # How much of the file is still mapped while the last matrices are packed differs by the addresses: 1.26 to 1.64.
    assert 0.7 * size < int(done.stdout) < 1.85 * size


def test_planning_and_naming_a_cut_keep_none_of_the_base_in_memory(tmp_path: Path) -> None:
    quantised(tmp_path / "model.onnx", 96, 1024, 1024, 4)
    read = pz.prepare(tmp_path / "model.onnx", tmp_path / "bundle", train=r"norm9[0-9]\.")
    script = (
        "import sys, pocketzo as pz\n"
        "from pocketzo.machine.memory import process_memory\n"
        "bundle = pz.Bundle.read(sys.argv[1])\n"
        "before = process_memory()[1]\n"
        "cut = pz.plan_cut(bundle)\n"
        "assert len(cut.values) == 1 and cut.digest()\n"
        "print(process_memory()[1] - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, read.path], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 0.5 * read.weights_path.stat().st_size


def test_a_wide_product_of_8_bits_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = 1000
    quantised(tmp_path / "model.onnx", 1, HIDDEN, columns, 8)
    read = pz.prepare(tmp_path / "model.onnx", tmp_path / "bundle")

    def products() -> int:
        graph = onnx_messages().Model.FromString(frozen.model_over_base(read)).graph
        return sum(one.op_type == "MatMulNBits" for one in graph.node)

    def logits() -> Array:
        return pz.load(read, threads=1).run({"x0": batch}, ["logits"])["logits"]

    batch = np.random.default_rng(1).standard_normal((3, HIDDEN)).astype(np.float32)
    assert products() == -(-columns // 7)
    cut = logits()
    monkeypatch.setattr(frozen, "_WIDE", 1 << 30)
    assert products() == 1
    np.testing.assert_array_equal(cut, logits())
