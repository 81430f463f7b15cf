"""Several directions in one forward pass give what they give one after the other, and so do the runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import Array
from graphs import model_of, node, weight
from independent_reader import read_bundle, read_journal, read_tensors, replay
from test_decoders import FLOATS
from test_language_models import QUANTISED, Sentences
from test_language_tasks import DATA, lines, prepared
from test_trainable import DECODERS, words_of

import pocketzo as pz
from pocketzo.data.load import load_dataset
from pocketzo.formats.safetensors import file_sha256
from pocketzo.optim.methods import METHODS
from pocketzo.optim.optimizer import Share
from pocketzo.optim.program import Point
from pocketzo.runtime.model import Model
from pocketzo.tasks import parts
from pocketzo.tasks.objective import Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of
from pocketzo.tasks.together import shares

pytestmark = [
    pytest.mark.usefixtures("quiet_quantiser"),
    pytest.mark.filterwarnings("ignore:.*prepacked, which is slower"),
]

SETS = ["lora:r=2", "ia3", "adapter:4"]
WITH_PREFIX = [*SETS, "prefix:3", "lora:r=2,train=B+ia3+adapter:2"]
BOTH: list[Share] = ["batch", "split"]


class At(pz.MeZO):
    """Evaluates given points, one after the other."""

    def __init__(self, model: pz.Model, points: Sequence[Point], **settings: Any) -> None:
        self.given = points
        super().__init__(model, lr=0.0, queries=max(max(point, default=0) for point in points) + 1, **settings)

    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        for point in self.given:
            _ = yield point
        return dict.fromkeys(draws, 0.0)


def on(bundle: pz.Bundle, batch: Mapping[str, Array], queries: int, memory: int | None = None) -> OnBatch:
    return OnBatch(Objective(metric_objective("loss", bundle), task_of(bundle), memory), batch, queries)


def disturb(*models: pz.Model) -> None:
    """Give trained tensors other values than those that they begin with: B is zeros."""
    for tensor in models[0].bundle.tensors:
        if tensor.trainable:
            values = np.random.default_rng(tensor.id).normal(0, 0.1, tensor.shape) + models[0].weights[tensor.name]
            for model in models:
                model.weights[tensor.name] = values.astype(np.float32)


def bundle_and_batch(name: str, train: str, folder: Path) -> tuple[pz.Bundle, dict[str, Array]]:
    """Return a bundle, and a batch of seven texts."""
    if name.startswith("bert"):
        feed, source = words_of(name)
        feed = {key: np.concatenate([values] * 4)[:7] for key, values in feed.items()}
        feed["input_ids"] = np.random.default_rng(3).integers(1, 60, feed["input_ids"].shape)
        return pz.prepare(source, folder / "base", train=train), feed
    path = DECODERS[name](folder / "m.onnx")
    bundle = pz.prepare(path, folder / "base", task="causal-lm", train=train)
    return bundle, dict(Sentences(path).batch(np.arange(7)))


def some_rows(batch: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """Return some texts of a batch."""
    width = batch["input_ids"].shape[1]
    count = len(batch["input_ids"])
    found = {name: array[rows] if len(array) == count else array for name, array in batch.items()}
    if "positions" in batch:
        row, column = np.divmod(batch["positions"], width)
        kept = np.isin(row, rows)
        found |= {
            "positions": np.searchsorted(rows, row[kept]) * width + column[kept],
            "targets": batch["targets"][kept],
        }
    return found


CASES = [
    *((name, train) for name in ("bert-old", "gpt2", "llama", "qwen2") for train in SETS),
    *(("bert-new", train) for train in SETS[:2]),
    ("llama", "norm"),
    *((name, "prefix:3") for name in ("gpt2", "llama, int4", "qwen2")),
    *((name, "lora:r=2,train=B+ia3+adapter:2") for name in ("merged gpt2", "genai", "llama, int4")),
    *((name, "lora") for name in ("qwen3", "genai, QDQ", "gpt2, int8 in blocks")),
]


@pytest.mark.parametrize(("name", "train"), CASES)
def test_estimates_are_those_of_one_direction_after_the_other(name: str, train: str, tmp_path: Path) -> None:
    bundle, batch = bundle_and_batch(name, train, tmp_path)
    model, plain = pz.load(bundle, threads=1, queries=True), pz.load(bundle, threads=1)
    disturb(model, plain)
    before = {tensor: np.array(model.weights[tensor]) for tensor in model.weights}
    eps, queries, lr = 0.1, 3, 1e-3
    trained = {tensor.name for tensor in bundle.tensors if tensor.trainable}
    thirds = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6])]

    def one_by_one(points: Sequence[Point], distribution: Any) -> list[float]:
        batches = iter([seen[next(iter(point), 0)] for point in points])
        optimizer = At(plain, points, eps=eps, seed=5, distribution=distribution, exact=True)
        return list(optimizer.step(lambda model: loss(model, next(batches))).losses)

    def loss(model: pz.Model, feed: Mapping[str, Array]) -> float:
        if "positions" in feed:
            return on(bundle, feed, 1)(model)
        rows = [some_rows(feed, np.array([row])) for row in range(len(feed["input_ids"]))]
        return float(np.mean([model.loss(row) for row in rows]))  # of several, the graph rounds it to float32

    for share in BOTH:
        seen = [some_rows(batch, rows) for rows in (thirds if share == "split" else [np.arange(7)] * queries)]
        settings: dict[str, Any] = {"lr": lr, "eps": eps, "seed": 5, "queries": queries, "share": share}
        info = pz.MeZO(model, **settings).step(on(bundle, batch, queries))
        losses = one_by_one([{draw: sign} for draw in range(queries) for sign in (1.0, -1.0)], "gaussian")
        assert info.losses == pytest.approx(losses, rel=1e-6)
        slopes = (np.array(losses[::2]) - losses[1::2]) / (2 * eps * queries)
        assert np.ptp(slopes) > 1e-4
        np.testing.assert_allclose([*info.coefficients.values()], lr * slopes, rtol=1e-5, atol=lr * 1e-6)
        for tensor, values in before.items():
            assert np.array_equal(model.weights[tensor], values) == (tensor not in trained)
            if tensor in trained:
                model.weights[tensor] = values

        info = pz.FZOO(model, **settings).step(on(bundle, batch, queries))
        bases: list[Point] = [{draw: 0.0} for draw in range(queries)] if share == "split" else [{}]
        losses = one_by_one([*bases, *({draw: 1.0} for draw in range(queries))], "rademacher")
        assert info.losses == pytest.approx(losses, rel=1e-6)
        assert info.loss == pytest.approx(np.mean(losses[: len(bases)]), rel=1e-6)
        differences = np.array(losses[len(bases) :]) - losses[: len(bases)]
        expected = lr * differences / (queries * np.std(differences, ddof=1))
        np.testing.assert_allclose([*info.coefficients.values()], expected, rtol=1e-5, atol=lr * 1e-6)
        for tensor in trained:
            model.weights[tensor] = before[tensor]


@pytest.mark.parametrize("share", BOTH)
@pytest.mark.parametrize("method", [*METHODS, "block", "candidates"])
def test_a_run_replays_and_resumes_to_the_same_bits(method: str, share: Share, tmp_path: Path) -> None:
    path = FLOATS["llama"](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train="lora:r=2")
    data = Sentences(path)

    def trainer(run: str, share: Share | None) -> pz.Trainer:
        model = pz.load(bundle, threads=1, queries=share is not None)
        made: Callable[..., pz.Optimizer] = METHODS.get(method, pz.MeZO)
        lever: dict[str, Any] = {"candidates": 7} if method == "candidates" else {}
        if method == "block":
            lever["subset"] = pz.Block(0.4)
        optimizer = made(
            model, lr=1e-2, eps=1e-2, seed=4, queries=3, weight_decay=0.1, share=share, exact=True, **lever
        )
        return pz.Trainer(
            model, optimizer, data, eval=data, steps=6, batch_size=5, run=tmp_path / run, snapshot_every=4
        )

    whole = trainer("whole", share)
    assert whole.optimizer.forwards == type(whole.optimizer).evaluations(3, share)
    whole.fit()
    whole.model.save(tmp_path / "tuned")
    past = pz.Run(tmp_path / "whole")
    assert past.recipe.method["share"] == share
    assert past.recipe.method["exact"] is True
    assert past.recipe.takes_queries

    broken = trainer("broken", share)
    broken.callback = lambda progress: setattr(broken, "stop_requested", progress.info.step == 2)
    broken.fit()
    resumed = pz.Trainer.resume(tmp_path / "broken", data, eval=data)
    assert resumed.model.takes_queries
    assert resumed.optimizer.step_number == 3
    resumed.fit()
    resumed.model.save(tmp_path / "resumed")
    past.replay(tmp_path / "replayed")
    shutil.rmtree(tmp_path / "whole" / "snapshots")
    pz.Run(tmp_path / "whole").replay(tmp_path / "from the first step")
    names = "tuned", "resumed", "replayed", "from the first step"
    assert len({file_sha256(tmp_path / name / "weights.safetensors") for name in names}) == 1
    assert resumed.evaluations[6] == whole.evaluations[6]

    alone = trainer("alone", None)
    alone.fit()
    assert "share" not in pz.Run(tmp_path / "alone").recipe.method
    entries = pz.Run(tmp_path / "alone").entries
    if method != "candidates" or share == "batch":  # the choice depends on the last estimate
        assert [[*entry.coefficients] for entry in past.entries] == [[*entry.coefficients] for entry in entries]
    if share == "batch":  # the same estimates, but for roundings
        for entry, other in zip(past.entries, entries, strict=True):
            np.testing.assert_allclose(
                [*entry.coefficients.values()], [*other.coefficients.values()], rtol=1e-3, atol=1e-6
            )


def test_an_independent_replay_agrees(tmp_path: Path) -> None:
    path = FLOATS["gpt2"](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train="lora:r=2")
    model = pz.load(bundle, threads=1, queries=True)
    optimizer = pz.MeZO(model, lr=1e-2, eps=1e-2, queries=4, share="split")
    pz.Trainer(model, optimizer, Sentences(path), steps=5, batch_size=6, run=tmp_path / "run").fit()
    described, data = read_bundle(bundle.path)
    header, _, entries, _ = read_journal(tmp_path / "run" / "journal.pzj")
    replay(described, data, header, entries)
    for tensor in bundle.tensors:
        if tensor.trainable:
            np.testing.assert_array_equal(model.weights[tensor.name], read_tensors(data)[tensor.name])


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["lora:r=2", "prefix:2"])
@pytest.mark.parametrize("task", DATA)
def test_parts_bound_the_logits_of_all_directions(
    task: str, train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, options = DATA[task]
    bundle = prepared(tmp_path, task, train=train, **options)
    data = load_dataset(lines(tmp_path / "d.jsonl", *records), bundle)
    batch = data.batch(np.arange(len(data)))
    model, plain = pz.load(bundle, threads=1, queries=True), pz.load(bundle, threads=1)
    disturb(model, plain)
    optimizer = pz.FZOO(model, lr=0.0, eps=0.1, queries=3, share="split")
    weights, of = optimizer.points()
    whole = on(bundle, batch, 3)
    expected = {share: whole.together(model, weights, share) for share in (tuple(of), (None,) * 6)}
    for index, found in enumerate(whole.forward(model, weights, of)):  # what each sees is a batch by itself
        for name, values in weights.items():
            plain.weights[name] = values[index]
        assert on(bundle, found.batch, 1)(plain) == pytest.approx(expected[tuple(of)][index], rel=1e-6)
    sizes: list[tuple[int, int]] = []
    run = Model.run

    def counted(self: Model, feed: Any, *arguments: Any) -> Any:
        sizes.append((len(next(iter(arguments[1].values()))), feed["positions"].size))
        return run(self, feed, *arguments)

    monkeypatch.setattr(Model, "run", counted)
    vocabulary = task_of(bundle).vocabulary
    for positions in (1, 6, 10, 30):
        monkeypatch.setattr(parts, "LOGITS_MEMORY", 4 * vocabulary * positions)
        for share, losses in expected.items():
            sizes.clear()
            assert whole.together(model, weights, list(share)) == pytest.approx(losses, rel=1e-6)
            most = max(np.bincount(batch["positions"] // batch["input_ids"].shape[1]))
            assert all(size <= max(positions, most) for _, size in sizes)
            if positions == 30:
                assert max(directions for directions, _ in sizes) > 2


LOSSES: dict[str, tuple[tuple[str, ...], int, Any]] = {
    "cross-entropy": (("batch",), 3, np.array([0, 2, 1, 1, 0, 2, 1])),
    "cross-entropy of tokens": (("batch", "length"), 3, np.array([[0, -100], [2, 1], [-100, 1], [0, 0]] * 2)[:7]),
    "bce": (("batch",), 1, np.array([0, 1, 1, 0, 1, 0, 0])),
    "bce of several": (("batch",), 3, np.eye(3, dtype=np.float32)[[0, 2, 1, 1, 0, 2, 1]]),
    "mse": (("batch",), 2, np.arange(14, dtype=np.float32).reshape(7, 2)),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_any_loss_that_is_a_mean(kind: str, tmp_path: Path) -> None:
    axes, columns, labels = LOSSES[kind]
    nodes = [node("MatMul", "x fc.weight", "product"), node("Add", "product fc.bias", "logits")]
    weights = [weight("fc.weight", 4, columns), weight("fc.bias", columns)]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        weights,
        inputs=[("x", onnx.TensorProto.FLOAT, (*axes, 4))],
        outputs=[("logits", (*axes, columns))],
    )
    loss: Any = kind.partition(" ")[0]
    bundle = pz.prepare(path, tmp_path / "base", loss=loss)
    model, plain = pz.load(bundle, threads=1, queries=True), pz.load(bundle, threads=1)
    shape = (*labels.shape[: len(axes)], 4)
    batch = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32), "labels": labels}
    optimizer = pz.MeZO(model, lr=0.0, eps=0.1, queries=3, share="split")
    values, of = optimizer.points()
    thirds = [slice(0, 3), slice(3, 5), slice(5, 7)]
    losses = on(bundle, batch, 3).together(model, values, of)
    repeated = on(bundle, batch, 3).together(model, values, [None] * 6)
    for index, share in enumerate(of):
        assert share is not None
        for name, array in values.items():
            plain.weights[name] = array[index]
        seen = {name: array[thirds[share]] for name, array in batch.items()}
        assert losses[index] == pytest.approx(plain.loss(seen), rel=1e-6)
        assert repeated[index] == pytest.approx(plain.loss(batch), rel=1e-6)
    assert len({*losses, *repeated}) == 12


def test_shares_are_of_examples(tmp_path: Path) -> None:
    records, options = DATA["choice"]
    bundle = prepared(tmp_path, "choice", train="lora:r=2", **options)
    data = load_dataset(lines(tmp_path / "d.jsonl", *records), bundle)
    batch = data.batch(np.arange(4))
    assert [rows.tolist() for rows in shares(bundle, batch, 3)] == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9, 10]]
    with pytest.raises(ValueError, match="a batch of 4 examples cannot be split for 5 directions"):
        shares(bundle, batch, 5)


@pytest.mark.parametrize("share", BOTH)
def test_an_objective_of_the_caller_gets_what_each_direction_sees(share: Share, tmp_path: Path) -> None:
    bundle, batch = bundle_and_batch("bert-old", "lora:r=2", tmp_path)
    model = pz.load(bundle, threads=1, queries=True)
    seen: list[tuple[int, ...]] = []

    def objective(outputs: Mapping[str, Array], part: Mapping[str, Array]) -> float:
        seen.append((len(part["labels"]), len(outputs["logits"])))
        assert outputs["loss"].shape == ()
        return float(-outputs["logits"][np.arange(len(part["labels"])), part["labels"]].mean())

    function = OnBatch(Objective(objective, task_of(bundle)), batch, 2)
    info = pz.MeZO(model, lr=1e-3, queries=2, share=share).step(function)
    assert seen == ([(4, 4), (4, 4), (3, 3), (3, 3)] if share == "split" else [(7, 7)] * 4)
    assert len(info.losses) == 4


# ---- methods ---------------------------------------------------------------------------------------------------------


class Pacing(pz.MeZO):
    """Takes fewer points, or more, than it would if losses were NaN."""

    method = "pacing"
    steep = 1e-4
    more = 0

    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        slopes: dict[int, float] = {}
        for draw in draws:
            plus = yield {draw: 1.0}
            minus = yield {draw: -1.0}
            slopes[draw] = plus - minus
            if abs(slopes[draw]) > self.steep:
                break
        for size in range(self.more if np.isfinite(sum(slopes.values())) else 0):
            yield {draws[0]: size + 2.0}
        return {draw: lr * slope for draw, slope in slopes.items()}


@pytest.mark.parametrize("steep", [0.0, 1e9])
@pytest.mark.parametrize("more", [0, 2])
def test_points_may_depend_on_losses(steep: float, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pacing, "steep", steep)
    monkeypatch.setattr(Pacing, "more", more)
    bundle, batch = bundle_and_batch("bert-old", "lora:r=2", tmp_path)
    model, plain = pz.load(bundle, threads=1, queries=True), pz.load(bundle, threads=1)
    disturb(model, plain)
    shared: list[Share | None] = ["batch", None]
    found = [
        Pacing(one, lr=1e-3, eps=0.1, queries=3, share=share, exact=True).step(on(bundle, batch, 3))
        for one, share in zip((model, plain), shared, strict=True)
    ]
    assert len(found[0].losses) == (2 if steep == 0.0 else 6) + more
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-6)
    assert found[0].coefficients.keys() == found[1].coefficients.keys()


class Pair(pz.MeZO):
    method = "pair"

    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        loss = yield dict.fromkeys(draws, 1.0)
        return dict.fromkeys(draws, lr * loss)


def test_a_step_that_fails_changes_nothing(tmp_path: Path) -> None:
    bundle, batch = bundle_and_batch("bert-old", "lora:r=2", tmp_path)
    model = pz.load(bundle, threads=1, queries=True)
    before = model.weights.sha256()
    with pytest.raises(ValueError, match="needs points along one direction each, and pair has one along 2"):
        Pair(model, lr=1.0, queries=2, share="split").step(on(bundle, batch, 2))
    with pytest.raises(TypeError, match="with share='batch' the objective needs a method 'together'"):
        pz.MeZO(model, lr=1.0, share="batch").step(lambda model: 1.0)

    class Wrong:
        losses: Any = ()

        def together(self, *_: Any) -> Any:
            if isinstance(self.losses, Exception):
                raise self.losses
            return self.losses

    wrong = Wrong()
    optimizer = pz.MeZO(model, lr=1.0, share="batch")
    for losses, error in ((RuntimeError("out of luck"), RuntimeError), ([1.0], ValueError)):
        wrong.losses = losses
        entries: list[Any] = []
        with pytest.raises(error):
            optimizer.step(wrong, entries.append)
        assert [entry.lr for entry in entries] == [0.0]
    wrong.losses = [1.0, np.nan]
    assert optimizer.step(wrong).skipped
    assert model.weights.sha256() == before
    wrong.losses = [2.0, 1.0]
    assert not optimizer.step(wrong).skipped
    assert model.weights.sha256() != before


# ---- what cannot be done --------------------------------------------------------------------------------------------

REFUSED = [
    ("bert-old", "all", r"'bert.embeddings.word_embeddings.weight' \[64, 16\] is read by Gather"),
    ("bert-new", "norm", r"'bert.embeddings.LayerNorm.weight' \[16\] is read by LayerNormalization"),
    ("bert-old", "bias", r"'bert.pooler.dense.bias' \[16\] is read by Gemm"),
    ("gpt2, dynamic int8", "lora:r=2", "DynamicQuantizeLinear rounds each row of a batch by all of them"),
]


@pytest.mark.parametrize(("name", "train", "reason"), REFUSED)
def test_what_is_trained_otherwise_is_refused(name: str, train: str, reason: str, tmp_path: Path) -> None:
    bundle, _ = bundle_and_batch(name, train, tmp_path)
    expected = f"cannot be run in one forward pass: {reason}; prepare the model with --train lora.*, without --share"
    with pytest.raises(pz.BundleError, match=expected):
        pz.load(bundle, threads=1, queries=True)


def test_a_tensor_that_is_used_beside_the_rows_is_refused(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMean", "x", "mean", axes=[0], keepdims=0),
        node("Mul", "mean t.weight", "shift"),
        node("Add", "x shift", "moved"),
        node("MatMul", "moved fc.weight", "logits"),
    ]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("t.weight", 4), weight("fc.weight", 4, 3)])
    bundle = pz.prepare(path, tmp_path / "base", train=r"t\.weight", loss="cross-entropy")
    with pytest.raises(pz.BundleError, match="the rows of the probing batch cannot be given twice"):
        pz.load(bundle, threads=1, queries=True)


def test_a_loss_that_is_no_mean_is_refused(tmp_path: Path) -> None:
    bundle, _ = bundle_and_batch("bert-old", "lora:r=2", tmp_path)
    graph = onnx.load(bundle.model_path, load_external_data=False)
    (mean,) = (one for one in graph.graph.node if one.op_type == "ReduceMean" and one.name.startswith("pocketzo.loss"))
    mean.op_type = "ReduceMax"
    path = tmp_path / "base" / "model.onnx"
    onnx.save(graph, path)
    description = tmp_path / "base" / "bundle.json"
    description.write_text(description.read_text().replace(bundle.graph_sha256, file_sha256(path)))
    with pytest.raises(pz.BundleError, match="the loss 'loss' is computed by ReduceMax, expected a mean over the rows"):
        pz.load(bundle.path, threads=1, queries=True)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = FLOATS["llama"](tmp_path / "m.onnx")
    bundle = pz.prepare(path, tmp_path / "base", task="causal-lm", train="lora:r=2")
    data = Sentences(path)
    plain, model = pz.load(bundle, threads=1), pz.load(bundle, threads=1, queries=True)
    with pytest.raises(ValueError, match="leave prepack=False"):
        pz.load(bundle, threads=1, queries=True, prepack=False)
    with pytest.raises(ValueError, match="share must be 'batch', 'split' or None, got 'both'"):
        pz.MeZO(model, lr=0.1, share="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exact must be True with share='batch'"):
        pz.MeZO(model, lr=0.1, share="batch", exact=False)
    with pytest.raises(ValueError, match="needs a model that was loaded with queries=True"):
        pz.Trainer(plain, pz.MeZO(plain, lr=0.1, share="batch"), data)
    with pytest.raises(ValueError, match="an example for each of 8 directions, batch_size is 5"):
        pz.Trainer(model, pz.FZOO(model, lr=0.1, share="split"), data, batch_size=5)
    batch, values = data.batch(np.arange(4)), {name: model.weights[name] for name in bundle.trainable["lora:r=2"]}
    with pytest.raises(ValueError, match="load the bundle with queries=True"):
        plain.run(batch, weights=values)
    with pytest.raises(ValueError, match=r"lora_A'\] is \[64, 2\], expected \[Q, \*\[64, 2\]\]"):
        model.run(batch, weights=values)
    stacked = {name: np.stack([value, value]) for name, value in values.items()}
    first = next(iter(stacked))
    with pytest.raises(ValueError, match="is missing or not trained"):
        model.run(batch, weights={name: value for name, value in stacked.items() if name != first})
    with pytest.raises(ValueError, match=r"expected \[Q, "):
        model.run(batch, weights={**stacked, first: stacked[first][:1]})
    twice = model.run(batch, ["token_losses"], stacked)["token_losses"]
    np.testing.assert_allclose(twice, plain.run(batch, ["token_losses"])["token_losses"], rtol=1e-6)
    assert QUANTISED  # the kinds of DECODERS


def test_the_command_trains_resumes_and_replays(tmp_path: Path) -> None:
    pytest.importorskip("click", reason="the command line needs it")
    pytest.importorskip("rich", reason="the command line needs it")
    from click.testing import CliRunner

    from pocketzo.cli.app import cli

    def command(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        return done.exit_code, " ".join(done.output.split())

    records, _ = DATA["causal-lm"]
    bundle = prepared(tmp_path, "causal-lm", train="lora:r=2")
    texts = {pz.load(bundle, threads=1, queries=several).generate("w1 w2", max_tokens=4) for several in (False, True)}
    assert len(texts) == 1
    data, run = lines(tmp_path / "d.jsonl", *records), tmp_path / "run"
    settings = ["--data", data, "--batch-size", 6, "--lr", "1e-2", "--eps", "1e-2", "--threads", 1]
    new = ["train", bundle.path, "-o", run, *settings, "--steps", 3]
    code, output = command(*new, "--share", "split", "--queries", 5)
    assert code == 0, output
    assert "a forward pass of the largest batch, all directions at once, takes" in output
    assert pz.Run(run).recipe.method["share"] == "split"
    assert all(len(entry.coefficients) == 5 for entry in pz.Run(run).entries)
    assert command("replay", run, "-o", tmp_path / "tuned")[0] == 0
    assert file_sha256(pz.Bundle.read(tmp_path / "tuned").trained_path) != file_sha256(bundle.trained_path)
    code, output = command("train", "--resume", run)
    assert code == 0
    assert "all 3 steps are done" in output
    for share, found in (
        (["--share", "batch"], "share is split there and batch here"),
        ([], "share is split there and"),
    ):
        code, output = command(*new, *share, "--queries", 5)
        assert code == 1
        assert found in output
    for more, found in (
        (["--share", "split", "--no-prepack"], "--share prepacks what is not trained: leave --no-prepack out"),
        (["--share", "split", "--queries", 7], "an example for each of 7 directions, batch_size is 6"),
        (["--share", "both"], "is not one of 'batch', 'split'"),
    ):
        code, output = command("train", bundle.path, "-o", tmp_path / "other", *settings, *more)
        assert code in (1, 2)
        assert found in output
        assert not (tmp_path / "other").exists()
