"""Which layout fits on some devices: arithmetic by known answers, and memory as it is measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_decoders import FLOATS

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.demo import minilm
from pocketzo.doctor import products
from pocketzo.errors import DataError, MemoryLimitError
from pocketzo.export.bert import build_onnx
from pocketzo.pipeline.layout import (
    PROCESS,
    Batch,
    Device,
    Engine,
    Layout,
    Network,
    Share,
    best_layout,
    layouts,
    passes_of,
    read_devices,
    rows_by_speed,
    step_seconds,
)
from pocketzo.pipeline.split import split, stage_path
from pocketzo.runtime.stages import measured, plan_stages, stored_bytes

BATCH = Batch(rows=8, tokens=16, positions=8, passes=4)
FAST = Network(bandwidth=1e12, latency=0.0)
NOTHING = Engine(0, 0, -PROCESS)  # as if no process led the run

MEASURE = """
import sys
import numpy as np
import pocketzo as pz
from pocketzo.machine.memory import process_memory
from pocketzo.pipeline.stage import Stage
path, rows, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stage = None if pz.Bundle.read(path).stage is None else Stage(path, threads=1)
model = pz.load(path, threads=1) if stage is None else stage.model
feed = {}
for spec in model.bundle.inputs:
    sizes = [rows, tokens, 384][: len(spec.shape)]
    sizes = [given if isinstance(own, str) else own for own, given in zip(spec.shape, sizes)]
    feed[spec.name] = np.ones(sizes, spec.dtype)
if stage is None:
    model.run(feed, [model.bundle.logits])
else:
    stage.forward(None, feed, feed, [model.bundle.logits])
print(process_memory()[1])
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pz.Bundle:
    folder = tmp_path_factory.mktemp("llama")
    return pz.prepare(FLOATS["llama"](folder / "m.onnx"), folder / "base", task="causal-lm", train="all")


def test_the_seconds_of_a_step_of_a_pipeline() -> None:
    assert step_seconds([1.0], [], 6) == 6  # one device
    assert step_seconds([1.0, 1.0], [0.0], 6) == 7  # one pass to fill it
    assert step_seconds([1.0, 2.0], [0.5], 4) == 1 + 0.5 + 2 + 3 * 2  # the slower stage
    assert step_seconds([1.0, 2.0, 1.0], [3.0, 0.5], 2) == 4 + 3.5 + 3  # a connection is slower than that
    assert Network(bandwidth=1e6, latency=0.5).seconds(2_000_000) == 2.5


def test_rows_by_speed() -> None:
    assert rows_by_speed(32, [1.0, 1.0]) == [16, 16]
    assert rows_by_speed(32, [3.0, 1.0]) == [24, 8]
    assert rows_by_speed(10, [1.0, 1.0, 1.0]) == [4, 3, 3]
    assert rows_by_speed(1, [1.0, 2.0]) == [0, 1]
    assert passes_of("mezo", 4) == 8
    assert passes_of("fzoo", 4) == 5


def test_work_and_bytes_are_those_of_the_graph(llama: pz.Bundle) -> None:
    (whole,) = plan_stages(llama, 1)
    read = set(whole.tensors)
    matrices = [t for t in llama.tensors if len(t.shape) == 2 and t.name in read and "embed" not in t.name]
    products_ = sum(np.prod(tensor.shape) for tensor in matrices)
    head = max(np.prod(tensor.shape) for tensor in matrices if "head" in tensor.name or tensor.shape[1] > 50)
    per_row = whole.work(1, 16, 1)
    assert 1 < per_row / (16 * (products_ - head) + head) < 1.3  # and attention, norms
    assert whole.work(8, 16, 8) == pytest.approx(8 * per_row, rel=0.05)
    first, second = plan_stages(llama, 2)
    (hidden,) = first.gives
    assert first.sent(8, 16) == 8 * 16 * 4 * hidden.sizes.axes[-1]
    assert second.sent(8, 16) == 0


def test_a_table_that_stays_in_its_file_takes_no_memory(tmp_path: Path) -> None:
    path = FLOATS["qwen2"](tmp_path / "m.onnx")  # the first and the last stage read one table
    for train in ("all", "lora:r=2"):
        bundle = pz.prepare(path, tmp_path / train, task="causal-lm", train=train)
        (whole,) = plan_stages(bundle, 1)
        first, last = plan_stages(bundle, 2)
        sizes = stored_bytes(bundle)
        (table,) = (name for name, kinds in whole.readers().items() if "Gather" in kinds and sizes[name] > 4096)
        assert table in set(first.tensors) & set(last.tensors)
        trained = sum(sizes[tensor.name] for tensor in bundle.tensors if tensor.trainable)
        if train == "all":
            assert [plan.resident for plan in (whole, first, last)] == [whole.nbytes, first.nbytes, last.nbytes]
        else:
            assert whole.resident == whole.nbytes + trained
            assert first.resident + last.resident == pytest.approx(whole.resident, rel=0.05)
            assert first.nbytes + last.nbytes == pytest.approx(whole.nbytes + sizes[table], rel=0.05)
        for plan in (first, last):
            assert 0.3 < plan.resident / (first.resident + last.resident) < 0.7


def test_the_values_of_a_batch_count(llama: pz.Bundle) -> None:
    graph = measured(llama)
    (logits,) = (node.output[0] for node in graph.nodes if "lm_head.MatMul" in node.input)
    many = replace(graph.sizes[logits], axes=(*graph.sizes[logits].axes[:-1], 4000))  # as if it had 4,000 words
    graph = graph._replace(sizes={**graph.sizes, logits: many})
    batch = (2.0, 16.0, 32.0)
    weights, both = (plan_stages(llama, 2, graph=graph, batch=values) for values in (None, batch))
    assert both[1].activations(*batch) == weights[1].activations(*batch) > 32 * 4000 * 4
    assert both[1].resident < weights[1].resident
    worst = [max(plan.resident + plan.activations(*batch) for plan in plans) for plans in (weights, both)]
    assert worst[1] < worst[0]


def test_the_quickest_layout_that_fits(llama: pz.Bundle) -> None:
    (whole,) = plan_stages(llama, 1)
    need = layouts(llama, [Device("a", 1 << 40, 1e9)], BATCH)[0].shares[0].memory
    seconds = BATCH.passes * whole.work(8, 16, 8) / 1e9

    alone = layouts(llama, [Device("a", need, 1e9)], BATCH, FAST)
    assert [layout.kind for layout in alone] == ["one device"]
    assert alone[0].seconds == pytest.approx(seconds)

    both = best_layout(layouts(llama, [Device("a", need, 1e9), Device("b", need, 1e9)], BATCH, FAST))
    assert both.kind == "data parallel"
    assert [share.rows for share in both.shares] == [4, 4]
    assert both.seconds == pytest.approx(seconds / 2, rel=0.05)

    slow = layouts(llama, [Device("a", need, 1e9), Device("b", need, 1e9)], BATCH, Network(1e12, 10.0))
    assert best_layout(slow).kind == "one device"

    small = [Device(name, need - 10_000, 1e9) for name in "ab"]
    assert not any(layout.fits for layout in layouts(llama, small, BATCH, FAST))  # Ray takes more than a stage saves
    found = best_layout(layouts(llama, small, BATCH, FAST, NOTHING))
    assert found.kind == "pipeline"
    assert [share.rows for share in found.shares] == [8, 8]
    assert sum(share.weights for share in found.shares) == whole.nbytes
    each = [plan.work(8, 16, 8) / 1e9 for plan in plan_stages(llama, 2)]
    assert found.seconds == pytest.approx(step_seconds(each, [0.0], BATCH.passes), rel=1e-4)
    assert found.cuts == (tuple(kept.name for kept in plan_stages(llama, 2)[0].gives),)

    tiny = [Device("board", PROCESS, 1e9), Device("phone", 2 * PROCESS, 1e9)]
    with pytest.raises(
        MemoryLimitError, match=r"in no layout \(pipeline of 2: board has 65 MB of \d+ MB, .*Ray's.*one device"
    ):
        best_layout(layouts(llama, [tiny[0], tiny[0]], BATCH))
    assert best_layout(layouts(llama, tiny, BATCH)).shares[0].device.name == "phone"


def test_the_engine_of_a_pipeline_counts(llama: pz.Bundle) -> None:
    devices = [Device(name, 1 << 40, 1e9) for name in "abc"]
    engine = Engine(process=1, device=20, first=300)
    without, with_ = (
        next(one for one in layouts(llama, devices, BATCH, FAST, used) if len(one.cuts) == 2)
        for used in (NOTHING, engine)
    )
    first, second = (plan.sent(8, 16) for plan in plan_stages(llama, 3)[:2])
    under_way = [BATCH.passes * nbytes for nbytes in (first, first + second, second)]
    assert [share.engine for share in without.shares] == under_way
    own = [1 + 20 + 300 + PROCESS + 1, 1 + 20, 1 + 20]
    assert [share.engine for share in with_.shares] == [sum(each) for each in zip(own, under_way, strict=True)]
    assert all(b.memory - b.engine == a.memory - a.engine for a, b in zip(without.shares, with_.shares, strict=True))
    alone = next(one for one in layouts(llama, devices, BATCH, FAST) if one.kind == "one device")
    assert alone.shares[0].engine == 0


def test_a_layout_fits_where_every_share_does() -> None:
    device = Device("a", 100, 1.0)
    fits, not_ = Share(device, 1, 1, 1, 100, 0, 1.0), Share(device, 1, 1, 1, 101, 0, 1.0)
    assert Layout("pipeline", (fits, fits), (), 1.0).fits
    assert not Layout("pipeline", (fits, not_), (), 1.0).fits


def test_devices_are_read(tmp_path: Path) -> None:
    doctor = {
        "memory": {"total": 4_000_000_000, "available": 2_000_000_000},
        "products": {"threads": 4, "multiply_adds_per_second": 5e9},
        "speed": {"gaussian": {"1 thread": 3.0, "4 threads": 1.0}},
    }
    (tmp_path / "board.json").write_text(json.dumps(doctor))
    path = tmp_path / "devices.toml"
    path.write_text(
        '[[device]]\nname = "board"\ndoctor = "board.json"\n[[device]]\nname = "phone"\nmemory = "1.5G"\nspeed = 2e9\n'
        '[[device]]\nname = "other"\ndoctor = "board.json"\nmemory = "500 MiB"\n[network]\nlatency = 0.01\n'
    )
    devices, network = read_devices(path)
    assert devices == [
        Device("board", 2_000_000_000, 5e9, 1e-9),
        Device("phone", 1_500_000_000, 2e9),
        Device("other", 500 << 20, 5e9, 1e-9),
    ]
    assert network == Network(latency=0.01)
    as_json = tmp_path / "devices.json"
    as_json.write_text(json.dumps([{"name": "board", "doctor": doctor}]))
    assert read_devices(as_json) == (devices[:1], Network())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected at least one device"),
        ("[1]", "expected at least one device"),
        ("[{}]", "device 1: expected a name"),
        ('[{"name": "a", "cores": 2}]', "'cores' is not one of"),
        ('[{"name": "a", "memory": 1}]', "expected memory and speed, or doctor"),
        ('[{"name": "a", "memory": "much", "speed": 1}]', "memory is 'much', expected a positive number"),
        ('[{"name": "a", "memory": 1, "speed": 0}]', "speed is 0, expected a positive number"),
        ('[{"name": "a", "memory": 1, "speed": null}]', "speed is None"),
        ('[{"name": "a", "doctor": "none.json"}]', "none.json: cannot be read"),
        ('[{"name": "a", "doctor": {"memory": {"available": null}, "products": null}}]', "expected memory and speed"),
        ('[{"name": "a", "memory": 1, "speed": 1}, {"name": "a", "memory": 1, "speed": 1}]', "a name of its own"),
        ('{"device": [{"name": "a", "memory": 1, "speed": 1}], "network": {"latency": -1}}', "network: expected"),
        ('{"device": [{"name": "a", "memory": 1, "speed": 1}], "network": {"speed": 1}}', "network: expected"),
    ],
)
def test_a_wrong_file_of_devices_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_devices(path)


def test_the_command(llama: pz.Bundle, tmp_path: Path) -> None:
    def command(*more: str) -> Any:
        return CliRunner().invoke(cli, ["plan", str(llama.path), "--devices", str(tmp_path / "devices.json"), *more])

    devices = [{"name": name, "memory": "2G", "speed": 1e9} for name in ("board", "phone")]
    (tmp_path / "devices.json").write_text(json.dumps(devices))
    shown = command()
    assert shown.exit_code == 0
    assert "(the quickest that fits)" in shown.stdout
    assert len(re.findall(r"\(\d+ MB of them Ray's\), ", shown.stdout)) == 2
    assert "16 of 16 examples" in shown.stdout  # as for train
    assert len(re.findall(r"^pipeline", shown.stdout, re.MULTILINE)) == 1
    split_ = re.search(r"^  pocketzo (pipeline split .*)$", shown.stdout, re.MULTILINE)
    assert split_
    words = [str(tmp_path / word) if word == "stages" else word for word in split_[1].split()]
    assert CliRunner().invoke(cli, words).exit_code == 0
    (layout,) = (one for one in json.loads(command("--json").stdout) if one["layout"] == "pipeline")
    stage = pz.Bundle.read(stage_path(tmp_path / "stages", 0)).stage
    assert stage
    assert [[*stage.gives]] == layout["cuts"]
    found = json.loads(command("--json", "--method", "mezo", "--queries", "2").stdout)
    assert {layout["layout"] for layout in found} == {"one device", "data parallel", "pipeline"}
    (tmp_path / "devices.json").write_text(json.dumps([devices[0] | {"memory": "10M"}]))
    refused = command()
    assert refused.exit_code == 1
    assert "board has 10 MB of" in refused.stderr


def test_the_doctor_measures_products() -> None:
    found = products(rows=8, size=64, repeats=1)
    assert found is not None
    assert found["multiply_adds_per_second"] > 1e6


def peak_of(path: Path) -> int:
    """Return the peak memory of a process that runs a batch of 8 x 64 through a bundle or a stage."""
    words = [sys.executable, "-c", MEASURE, str(path), "8", "64"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.usefixtures("quiet_quantiser")
def test_the_memory_of_a_stage_is_as_predicted(tmp_path: Path) -> None:
    checkpoint = minilm.find_checkpoint()
    build_onnx(checkpoint, tmp_path / "m.onnx", num_labels=2)
    for train in ("lora:r=4", "all"):
        base = pz.prepare(tmp_path / "m.onnx", tmp_path / train, train=train)
        stages = split(base, tmp_path / f"{train}-stages", 2)
        batch = Batch(rows=8, tokens=64, positions=8, passes=2)
        devices = [Device(name, 1 << 40, 1e9) for name in "ab"]
        (layout,) = (found for found in layouts(base, devices, batch, None, NOTHING) if found.kind == "pipeline")
        (alone, *_) = (found for found in layouts(base, devices, batch) if found.kind == "one device")
        whole = peak_of(base.path)
        for number, share in enumerate(layout.shares):
            assert share.weights == pytest.approx(stages[number].weights_nbytes, rel=0.01)
            peak = peak_of(stage_path(tmp_path / f"{train}-stages", number))
            assert 0.75 < share.memory / peak < 1.33
            assert peak < 0.95 * whole
            assert share.memory < alone.shares[0].memory
