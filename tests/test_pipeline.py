"""A model that is cut into stages computes and learns what one device does, and a stage holds its own weights only."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from decoders import Array
from test_language_models import Sentences
from test_queries import on
from test_trainable import DECODERS, words_of

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.errors import BundleError, NotCuttableError
from pocketzo.formats import bundle as bundles_module
from pocketzo.formats.bundle_writer import copy_bundle
from pocketzo.formats.journal import Entry
from pocketzo.optim.block import Block
from pocketzo.optim.groups import ParamGroup
from pocketzo.optim.methods import METHODS
from pocketzo.optim.pace import Pace
from pocketzo.pipeline.chain import busy, pooled_model
from pocketzo.pipeline.local import Threads
from pocketzo.pipeline.optimizer import Pooled, pooled_method
from pocketzo.pipeline.split import split, stage_path
from pocketzo.pipeline.stage import Stage
from pocketzo.runtime.stages import plan_stages

pytestmark = [
    pytest.mark.usefixtures("quiet_quantiser"),
    pytest.mark.filterwarnings("ignore:.*prepacked, which is slower"),
]


@dataclass
class Case:
    """A bundle, a batch, and a folder of its stages."""

    bundle: pz.Bundle
    batch: dict[str, Array]
    folder: Path
    count: int

    @contextmanager
    def threads(self) -> Iterator[Threads]:
        with Threads([Stage(stage_path(self.folder, n), threads=1) for n in range(self.count)]) as workers:
            yield workers


def case_of(name: str, train: str, count: int, folder: Path, shares: list[float] | None = None) -> Case:
    if name.startswith("bert"):
        feed, source = words_of(name)
        bundle = pz.prepare(source, folder / "base", train=train)
        batch = {key: np.concatenate([values] * 4)[:7] for key, values in feed.items()}
    else:
        path = DECODERS[name](folder / "m.onnx")
        bundle = pz.prepare(path, folder / "base", task="causal-lm", train=train)
        batch = dict(Sentences(path).batch(np.arange(7)))
    split(bundle, folder / "stages", count, shares)
    return Case(bundle, batch, folder / "stages", count)


def check_held(case: Case, workers: Threads) -> None:
    """Check that each stage has a part of the weights, and that all of them have all that a run reads."""
    whole = {tensor.name: tensor for tensor in case.bundle.tensors}
    sizes, names = [], set()
    for stage in workers.stages:
        tensors = stage.model.bundle.tensors
        assert all(tensor.id == whole[tensor.name].id for tensor in tensors)
        assert all(tensor.sets == whole[tensor.name].sets for tensor in tensors)
        names |= {tensor.name for tensor in tensors}
        sizes.append(stage.model.bundle.weights_nbytes)
    assert {name for name, tensor in whole.items() if tensor.trainable} <= names
    assert max(sizes) < 0.8 * case.bundle.weights_nbytes


def trained(workers: Threads) -> dict[str, Array]:
    """Return the trained tensors of all stages; one that several stages have must be the same in each."""
    found: dict[str, Array] = {}
    for stage in range(workers.count):
        for name, values in workers.result(workers.call(stage, "trained")).items():
            np.testing.assert_array_equal(found.setdefault(name, values), values)
    return found


def check_training(
    case: Case, workers: Threads, method: str = "mezo", *, microbatches: int = 1, same: bool = True, **settings: Any
) -> None:
    """Take some steps, and compare losses, entries and weights with those of one device, or of the entries' replay."""
    model = pooled_model(case.bundle, workers)
    whole = pz.load(case.bundle, threads=1)
    objective = on(case.bundle, case.batch, 1)
    settings = {"lr": 1e-2, "eps": 1e-2, "seed": 3} | settings
    optimizer = pooled_method(method)(model, microbatches=microbatches, **settings)
    single = METHODS[method](whole, **settings)
    outputs, expected = model.run(case.batch), whole.run(case.batch)
    entries: list[Entry] = []
    others: list[Entry] = []
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    for _ in range(3):
        info = optimizer.step(objective, entries.append)
        other = single.step(objective, others.append)
        np.testing.assert_allclose(info.losses, other.losses, rtol=1e-5)
    if same:
        assert all(np.array_equal(outputs[name], values) for name, values in expected.items())
        assert entries == others
    single.model.weights.read()
    METHODS[method](whole, **settings).replay(entries)
    for name, values in trained(workers).items():
        np.testing.assert_array_equal(values, whole.weights[name], err_msg=name)
    assert any(np.any(values != case.bundle.map_tensors()[name]) for name, values in trained(workers).items())


CASES = [
    ("llama", "lora:r=2", 2),
    ("llama", "all", 2),
    ("llama", "lora:r=2,layers=1-", 3),  # nothing is trained in the first stage
    ("gpt2", "all", 2),
    ("qwen2", "all", 2),  # a table that the first and the last stage read
    ("qwen3", "ia3", 2),
    ("genai", "lora:r=2", 2),
    ("llama, int4", "lora:r=2", 2),
    ("gpt2, int8 in blocks", "adapter:4", 2),
    ("bert-old", "lora:r=2+head", 2),
    ("bert-new", "all", 3),
]


@pytest.mark.parametrize(("name", "train", "count"), CASES)
def test_stages_compute_and_learn_what_one_device_does(name: str, train: str, count: int, tmp_path: Path) -> None:
    case = case_of(name, train, count, tmp_path)
    with case.threads() as workers:
        check_held(case, workers)
        check_training(case, workers, same="bert" not in name)  # onnxruntime fuses other nodes of those


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small decoder of which all is trained, in two stages."""
    return case_of("llama", "all", 2, tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_in_a_pipeline(method: str, llama: Case) -> None:
    with llama.threads() as workers:
        check_training(llama, workers, method, queries=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"exact": True},
        {"subset": Block(0.3)},
        {"weight_decay": 0.1, "groups": [ParamGroup(r"layers\.1", lr=3.0), ParamGroup("embed", eps=0.5)]},
        {"distribution": "rademacher", "schedule": pz.Schedule("linear", steps=5)},
        {"trainable": r"layers\.1"},
    ],
    ids=str,
)
def test_settings_are_the_same_in_a_pipeline(settings: Mapping[str, Any], llama: Case) -> None:
    with llama.threads() as workers:
        check_training(llama, workers, **settings)


def test_a_batch_goes_in_parts(llama: Case) -> None:
    with llama.threads() as workers:
        check_training(llama, workers, microbatches=3, same=False, queries=2)


def test_a_trainer_trains_resumes_and_evaluates_over_stages(llama: Case, tmp_path: Path) -> None:
    data = Sentences(llama.folder.parent / "m.onnx")
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2}
    loop: dict[str, Any] = {"eval": data, "batch_size": 4, "eval_every": 3}
    one = pz.load(llama.bundle, threads=1)
    trainer = pz.Trainer(one, pz.MeZO(one, **settings), data, steps=6, run=tmp_path / "one", **loop)
    trainer.fit()
    with llama.threads() as workers:
        model = pooled_model(llama.bundle, workers)
        pooled = pz.Trainer(
            model, pooled_method("mezo")(model, **settings), data, steps=6, run=tmp_path / "run", **loop
        )
        pooled.callback = lambda progress: setattr(pooled, "stop_requested", progress.info.step == 3)
        pooled.fit()
    assert pz.Run(tmp_path / "run").steps == 4
    with llama.threads() as workers:  # other processes, which have forgotten everything
        model = pooled_model(llama.bundle, workers)
        methods = {name: pooled_method(name) for name in METHODS}
        resumed = pz.Trainer.resume(tmp_path / "run", data, eval=data, model=model, methods=methods)
        resumed.fit()
        assert pz.Run(tmp_path / "run").entries == pz.Run(tmp_path / "one").entries
        assert resumed.evaluations == trainer.evaluations
        for name, values in trained(workers).items():
            np.testing.assert_array_equal(values, one.weights[name])


def test_a_step_that_fails_is_undone_on_every_stage(llama: Case) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "seed": 3}
    whole = pz.load(llama.bundle, threads=1)
    single = pz.MeZO(whole, **settings)
    entries: list[Entry] = []
    good = on(llama.bundle, llama.batch, 1)
    nan = replace(good, objective=replace(good.objective, function=lambda outputs, batch: float("nan")))

    def full(entry: Entry) -> None:
        raise OSError("no space left")

    with llama.threads() as workers:
        optimizer = pooled_method("mezo")(pooled_model(llama.bundle, workers), **settings)
        for objective in (good, nan, good):
            info = optimizer.step(objective, entries.append)
            assert info.skipped == single.step(objective).skipped
        with pytest.raises(OSError, match="no space left"):
            optimizer.step(good, full)
        with pytest.raises(OSError, match="no space left"):
            single.step(good, full)
        optimizer.step(good, entries.append)
        single.step(good)
        for name, values in trained(workers).items():
            np.testing.assert_array_equal(values, whole.weights[name])
        assert optimizer.step_number == single.step_number == len(entries) == 4


def test_an_error_of_a_stage_reaches_the_caller(llama: Case) -> None:
    with llama.threads() as workers:
        optimizer = pooled_method("mezo")(pooled_model(llama.bundle, workers), lr=1e-2)
        wrong = {**llama.batch, "input_ids": llama.batch["input_ids"] + 10_000}
        with pytest.raises(pz.Error, match=r"stage-0: the stage cannot be run on this batch"):
            optimizer.step(on(llama.bundle, wrong, 1))
        optimizer.step(on(llama.bundle, llama.batch, 1))  # and the stages go on


def test_the_first_stage_computes_ahead(llama: Case) -> None:
    """While the second stage waits with the first point, the first stage computes the others."""
    with llama.threads() as workers:
        optimizer = pooled_method("mezo")(pooled_model(llama.bundle, workers), lr=1e-2, queries=2)
        first, second = workers.stages
        done = threading.Semaphore(0)
        for stage, before in ((first, None), (second, done)):
            run = stage.forward

            def forward(*arguments: Any, run: Callable[..., Any] = run, wait: Any = before) -> Any:
                if wait is None:
                    found = run(*arguments)
                    done.release()
                    return found
                for _ in range(4 if arguments[0] == 0 else 0):  # all four points
                    assert wait.acquire(timeout=60)
                return run(*arguments)

            stage.forward = forward  # type: ignore[assignment, method-assign]
        assert len(optimizer.step(on(llama.bundle, llama.batch, 1)).losses) == 4


def test_shares_are_respected(llama: Case, tmp_path: Path) -> None:
    whole = llama.bundle.weights_nbytes
    for shares in ([1.0, 3.0], [3.0, 1.0]):
        plans = plan_stages(llama.bundle, 2, shares)
        assert abs(plans[0].nbytes / whole - shares[0] / 4) < 0.2
    assert plan_stages(llama.bundle, 1)[0].nbytes == sum(  # one stage is the model
        stage.nbytes for stage in plan_stages(llama.bundle, 2)
    )
    with pytest.raises(ValueError, match=r"shares must be 2 positive numbers"):
        plan_stages(llama.bundle, 2, [1.0, 0.0])


def test_what_cannot_be_split_is_refused(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotCuttableError, match="cut into 60 stages; take fewer"):
        split(llama.bundle, tmp_path / "many", 60)
    with pytest.raises(BundleError, match="already exists"):
        split(llama.bundle, llama.folder, 2)
    with pytest.raises(BundleError, match="is a stage already"):
        split(pz.Bundle.read(stage_path(llama.folder, 0)), tmp_path / "again", 2)
    with pytest.raises(BundleError, match="no stage of one; make stages with"):
        Stage(llama.bundle.path)
    ids = bundles_module.tensor_ids
    monkeypatch.setattr(bundles_module, "tensor_ids", lambda names: {name: n + 1 for name, n in ids(names).items()})
    with pytest.raises(BundleError, match="has an id that collides"):
        split(llama.bundle, tmp_path / "ids", 2)
    assert not stage_path(tmp_path / "ids", 0).exists()


def test_other_stages_than_those_of_the_bundle_are_refused(llama: Case, tmp_path: Path) -> None:
    model = pz.load(llama.bundle, threads=1)
    name = next(tensor.name for tensor in llama.bundle.tensors if tensor.trainable)
    model.weights[name] = model.weights[name] + 1
    copy_bundle(llama.bundle, tmp_path / "tuned", model.weights.save)
    with llama.threads() as workers:
        with pytest.raises(BundleError, match=re.escape("was split from another bundle than")):
            pooled_model(pz.Bundle.read(tmp_path / "tuned"), workers)
        with Threads(workers.stages[::-1]) as reversed_, pytest.raises(BundleError, match="has stage 1 of 2; name"):
            pooled_model(llama.bundle, reversed_)
        with Threads(workers.stages[:1]) as short, pytest.raises(BundleError, match="stage 0 of 1: the device there"):
            pooled_model(llama.bundle, short)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "lr must be a number for a pipeline"),
        ({"lr": 1e-2, "pace": Pace(0.1)}, "pace is not for a pipeline"),
        ({"lr": 1e-2, "candidates": 4}, "candidates is not for a pipeline"),
        ({"lr": 1e-2, "share": "batch"}, "share is not for a pipeline"),
        ({"lr": 1e-2, "microbatches": 0}, "microbatches must be"),
    ],
)
def test_settings_that_need_losses_are_refused(settings: Mapping[str, Any], message: str, llama: Case) -> None:
    with llama.threads() as workers, pytest.raises(ValueError, match=message):
        pooled_method("mezo")(pooled_model(llama.bundle, workers), **settings)


def test_a_pipeline_minimises_an_objective_on_a_batch(llama: Case) -> None:
    with llama.threads() as workers:
        model = pooled_model(llama.bundle, workers)
        optimizer = pooled_method("mezo")(model, lr=1e-2)
        assert isinstance(optimizer, Pooled)
        with pytest.raises(TypeError, match="minimises an objective on a batch"):
            optimizer.step(lambda model: 0.0)
        with pytest.raises(ValueError, match="do not average weights"):
            optimizer.replay([], average=True)
    with pytest.raises(TypeError, match="is loaded on this device"):
        pooled_method("mezo")(pz.load(llama.bundle, threads=1), lr=1e-2)


def test_the_share_of_a_step_in_which_stages_compute() -> None:
    assert busy(1, 2) == 1
    assert busy(2, 2) == pytest.approx(2 / 3)
    assert busy(3, 16) == pytest.approx(16 / 18)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 2}, "'number' is 2, expected an integer of 0 to 1"),
        ({"count": 1}, "'count' is 1, expected an integer of 2 to"),
        ({"takes": ["x"]}, "'takes' is .*, expected names of values, of every stage but the first"),
        ({"gives": []}, r"'gives' is \[\], expected names of values, of every stage but the last"),
        ({"graph_sha256": "0"}, "'graph_sha256' is '0', expected a SHA-256"),
    ],
)
def test_a_damaged_stage_is_refused(changes: Mapping[str, Any], message: str, llama: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stage_path(llama.folder, 0), tmp_path / "stage"))
    described = json.loads((folder / "bundle.json").read_text())
    described["stage"] |= changes
    (folder / "bundle.json").write_text(json.dumps(described))
    with pytest.raises(BundleError, match=message):
        pz.Bundle.read(folder)


def test_the_command_splits_and_names_what_is_missing(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: Any) -> Any:
        return CliRunner().invoke(cli, ["pipeline", *map(str, arguments)])

    shown = command("split", llama.bundle.path, "-o", tmp_path / "stages", "--stages", 2, "--shares", "2,1")
    assert shown.exit_code == 0, shown.output
    assert re.search(r"stage-0: \d+ tensors, \d+ of them trainable, .* kB; gives /", shown.output)
    assert "of 2" in CliRunner().invoke(cli, ["info", str(tmp_path / "stages" / "stage-1")]).output
    assert "are not numbers" in command("split", llama.bundle.path, "-o", tmp_path / "x", "--shares", "a").output
    monkeypatch.setitem(sys.modules, "ray", None)
    run = ("run", llama.bundle.path, tmp_path / "stages", "--data", tmp_path / "d", "-o", tmp_path / "r", "--lr", 1)
    assert "pip install 'pocketzo[pipeline]'" in command(*run).output
