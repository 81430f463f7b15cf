"""The activation cache: what is read from it is what was computed, whatever happened to its files."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from decoders import Array
from independent_reader import read_activations
from test_language_models import Sentences
from test_language_tasks import DATA, MODES, lines, prepared

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.errors import CacheError
from pocketzo.formats.activations import Dtype, Layout, New, Segment, StoredValue, write_segment
from pocketzo.runtime.activations import ActivationCache, layout_of, segments
from pocketzo.runtime.cut import plan_cut
from pocketzo.runtime.load import load
from pocketzo.train.cached import fill, open_cache

pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")

TRAIN = "lora:r=2,layers=1-"
ERRORS: dict[Dtype, float] = {"fp32": 0.0, "fp16": 2**-11, "int8": 0.5 / 127}


def layout(dtype: Dtype = "fp32", front: bytes = bytes(32)) -> Layout:
    values = StoredValue("hidden", "float32", (None, 40)), StoredValue("other", "float16", (3, None))
    return Layout(front, dtype, values)


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def values_of(number: int) -> tuple[int, list[Array]]:
    """Return the tokens of an example, and values that nothing but its number decides."""
    rng = np.random.default_rng(number)
    tokens = 1 + number % 7
    return tokens, [
        rng.normal(size=(tokens, 40)).astype(np.float32),
        rng.normal(size=(3, tokens)).astype(np.float16),
    ]


def put(cache: ActivationCache, number: int) -> list[Array]:
    tokens, arrays = values_of(number)
    return cache.put(key_of(number), tokens, arrays)


def check(cache: ActivationCache, number: int) -> bool:
    """Return whether an example is kept; its values must then be its own."""
    got = cache.get(key_of(number))
    if got is None:
        return False
    for values, expected in zip(got, values_of(number)[1], strict=True):
        np.testing.assert_array_equal(values, expected)
    return True


# ---- segments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ERRORS)
def test_both_readers_find_what_was_written(dtype: Dtype, tmp_path: Path) -> None:
    own = layout(dtype, os.urandom(32))
    new = {key_of(n): New(values_of(n)[0], own.encode(values_of(n)[1])) for n in range(9)}
    write_segment(tmp_path / "a.pza", own, new)
    segment = Segment(tmp_path / "a.pza")
    assert segment.layout == own
    described, theirs = read_activations(tmp_path / "a.pza")
    assert (described["front"], described["dtype"]) == (own.front.hex(), dtype)
    assert list(segment.entries) == list(theirs) == list(new)
    for number in range(9):
        expected = values_of(number)[1]
        for arrays in segment.read(key_of(number)), theirs[key_of(number)]:
            for got, value in zip(arrays, expected, strict=True):
                assert (got.dtype, got.shape) == (value.dtype, value.shape)
                bound = ERRORS[dtype] * np.abs(value).max() + (1e-3 if value.dtype == np.float16 else 1e-7) * (
                    dtype != "fp32"
                )
                assert np.abs(got.astype(np.float64) - value).max() <= bound
    assert stat.S_IMODE((tmp_path / "a.pza").stat().st_mode) == 0o600


def test_what_a_type_cannot_keep_is_refused() -> None:
    _, (hidden, other) = values_of(3)
    hidden[1, 2] = 1e5
    with pytest.raises(CacheError, match=r"hidden has the element 100000, which fp16 cannot keep: .* fp32"):
        layout("fp16").encode([hidden, other])
    hidden[1, 2] = np.nan
    with pytest.raises(CacheError, match="int8 cannot keep"):
        layout("int8").encode([hidden, other])
    assert np.isnan(layout().decode(memoryview(layout().encode([hidden, other])), 4)[0][1, 2])


@pytest.mark.parametrize("damage", ["flip", "cut", "zeros"])
def test_no_damaged_value_is_read(damage: str, tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, layout())
    for number in range(4):
        put(cache, number)
    cache.flush()
    ((path, _),) = segments(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(1)
    found = 0
    for _ in range(150):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        if damage == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif damage == "cut":
            del data[at:]
        else:
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        path.write_bytes(data)
        with (
            pytest.warns(UserWarning, match=rf"{path.name}: offset \d+: .*; the segment is removed")
            if (bytes(data) != whole and is_seen(path))
            else pytest.MonkeyPatch.context()
        ):
            again = ActivationCache(tmp_path, layout())
            found += sum(check(again, number) for number in range(4))
    assert found < 600
    assert found or damage == "cut"


def is_seen(path: Path) -> bool:
    """Return whether damage is within what is checked, and not between entries."""
    try:
        segment = Segment(path)
        for key in segment.entries:
            segment.read(key)
    except CacheError:
        return True
    return False


# ---- a cache ---------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
import test_cache
from pocketzo.runtime import activations
activations._SEGMENT = 4000
cache = activations.ActivationCache(Path(sys.argv[1]), test_cache.layout())
print("begun", flush=True)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    if cache.get(test_cache.key_of(number)) is None:
        test_cache.put(cache, number)
cache.flush()
"""


def writer(folder: Path, first: int, last: int, limit: int | None = None) -> subprocess.Popen[str]:
    code = WRITER
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(first), str(last)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )


def test_killed_writers_leave_whole_segments(tmp_path: Path) -> None:
    rng = random.Random(5)
    kept = 0
    for _ in range(20):
        process = writer(tmp_path, 0, 100_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0.005, 0.06))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        cache = ActivationCache(tmp_path, layout())
        now = sum(check(cache, number) for number in range(len(cache)))
        assert now == len(cache) >= kept
        kept = now
    assert kept > 100


def test_two_runs_fill_one_cache(tmp_path: Path) -> None:
    processes = [writer(tmp_path, 0, 300), writer(tmp_path, 150, 450)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    cache = ActivationCache(tmp_path, layout())
    assert len(cache) == 450
    assert all(check(cache, number) for number in range(450))


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path: Path) -> None:
    ActivationCache(tmp_path, layout()).flush()
    process = writer(tmp_path, 0, 40, limit=3000)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "File too large" in errors
    assert ".pza'" in errors
    assert "no more activations are kept" in errors
    assert not segments(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_the_limit_removes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    sizes = []
    for number in range(3):
        cache = ActivationCache(tmp_path, layout(front=bytes([number] * 32)))
        for example in range(50):
            put(cache, example)
        cache.flush()
        sizes.append(sum(state.st_size for _, state in segments(tmp_path)))
        for path, _ in segments(tmp_path):
            if path.parent == cache._own:
                os.utime(path, (number, number))
    assert len(ActivationCache(tmp_path, layout(front=bytes(32)))) == 50  # which uses it
    cache = ActivationCache(tmp_path, layout(front=bytes([9] * 32)), limit=sizes[2] + 9000)
    for example in range(50):
        put(cache, example)
    cache.flush()
    left = [len(ActivationCache(tmp_path, layout(front=bytes([number] * 32)))) for number in (0, 1, 2, 9)]
    assert left == [50, 0, 50, 50]
    small = ActivationCache(tmp_path, layout(front=bytes([8] * 32)), limit=5000)
    for example in range(50):
        put(small, example)
    with pytest.warns(UserWarning, match=r"the limit of 0 MB leaves no room .*--cache-limit"):
        small.flush()
    assert small.is_full
    assert check(small, 3) is False


# ---- models ----------------------------------------------------------------------------------------------------------


def test_another_base_or_tokenizer_finds_nothing(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", train=TRAIN)
    own = layout_of(plan_cut(bundle), "fp32")
    # What is trained does not count, nor where a weight is in its file; what the front reads does.
    model = pz.load(bundle, threads=1)
    for tensor in bundle.tensors:
        if tensor.trainable:
            model.weights[tensor.name] = 0.5
    model.save(tmp_path / "tuned")
    assert layout_of(plan_cut(pz.Bundle.read(tmp_path / "tuned")), "fp32") == own
    other = pz.prepare(tmp_path / "m.onnx", tmp_path / "other", task="causal-lm", train="lora:r=4,layers=1-,train=B")
    assert layout_of(plan_cut(other), "fp32").front == own.front
    path = bundle.weights_path
    data = bytearray(path.read_bytes())
    entry = next(entry for name, (_, entry) in bundle.places.items() if "layers.0" in name and "mlp" in name)
    data[entry.start] ^= 1
    path.write_bytes(data)
    assert layout_of(plan_cut(pz.Bundle.read(bundle.path)), "fp32").front != own.front


def test_tokenizers_and_lengths_share_a_cache_and_read_their_own_values_only(tmp_path: Path) -> None:
    """The texts, the model and the folder are the same; what the front reads of a text is not."""
    texts = lines(tmp_path / "d.jsonl", *({"text": f"w{n} w{n + 1} w3 w{n + 2} w5 w{n}"} for n in range(1, 9)))
    expected: dict[str, list[float]] = {}
    computed: dict[str, int] = {}
    for name, mode, length in [
        ("plain", MODES[0], 6),
        ("plain again", MODES[0], 6),
        ("longer, with nothing to cut", MODES[0], 16),
        ("shorter", MODES[0], 4),
        ("other tokens", MODES[2], 16),
        ("turned", MODES[0], 6),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        bundle = prepared(folder, "causal-lm", mode, train=TRAIN, max_length=length)
        if name == "turned":  # the same lengths, and other tokens: w1 is the token of w2, and w2 that of w1
            assert bundle.tokenizer_path is not None
            told = json.loads(bundle.tokenizer_path.read_text())
            words = told["model"]["vocab"]
            words["w1"], words["w2"] = words["w2"], words["w1"]
            bundle.tokenizer_path.write_text(json.dumps(told))
        data = pz.load_dataset(texts, bundle)
        batches = [data.batch(np.arange(at, at + 4)) for at in (0, 4)]
        whole = pz.load(bundle, threads=1)
        expected[name] = [whole.loss(batch) for batch in batches]
        model = pz.load(bundle, threads=1, cut=(cut := plan_cut(bundle)))
        open_cache(model, tmp_path / "cache", layout_of(cut, "fp32"))
        assert model.halves is not None
        before = model.halves.computed
        assert fill(model, data).rows == model.halves.computed - before
        assert [model.loss(batch) for batch in batches] == pytest.approx(expected[name], rel=1e-6)
        computed[name] = model.halves.computed - before
    assert len({str(losses) for losses in expected.values()}) == 4, "four ways to read the same texts"
    assert [*computed.values()] == [8, 0, 0, 8, 8, 2]  # w1 or w2 is in two of the texts


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 3e-2)])
def test_losses_from_a_cache(dtype: Dtype, bound: float, tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", train=TRAIN)
    cut = plan_cut(bundle)
    data = Sentences(tmp_path / "m.onnx")
    batch = dict(data.batch(np.arange(7)))
    whole = pz.load(bundle, threads=1).loss(batch)
    for turn in range(2):
        model = load(bundle, threads=1, cut=cut)
        assert model.halves is not None
        model.halves.store = ActivationCache(tmp_path / "cache", layout_of(cut, dtype))
        before = model.halves.computed
        first = model.loss(batch)
        assert first == pytest.approx(whole, rel=bound or 1e-6)
        assert model.loss(batch) == first  # also right after it was computed
        assert (model.halves.computed > before) == (turn == 0)
        model.halves.store.flush()


@pytest.mark.parametrize("task", DATA)
def test_training_over_a_cache_is_training_without(task: str, tmp_path: Path) -> None:
    records, options = DATA[task]
    bundle = prepared(tmp_path, task, train=TRAIN, **options)
    data = lines(tmp_path / "d.jsonl", *records)
    words = [
        "train",
        bundle.path,
        "--data",
        data,
        "--method",
        "mezo",
        "--lr",
        "0.01",
        "--batch-size",
        3,
        "--threads",
        1,
    ]

    def losses(name: str, *more: object) -> list[float]:
        result = CliRunner().invoke(cli, [*map(str, words), "-o", str(tmp_path / name), *map(str, more)])
        assert result.exit_code == 0, result.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        if name != "whole":
            assert "come before what is trained" in result.stderr
            spared = re.search(
                r"; (\S+) ms an example, which (\d+) later forward passes .* are spared: 0:00", result.stderr
            )
            assert (spared is not None) == (name == "kept")  # the last run found all rows
            if spared is not None:
                assert float(spared[1]) > 0
                assert int(spared[2]) == 6 * 3 * 2 - len(DATA[task][0])
        return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]

    expected = losses("whole", "--cache", "off", "--steps", 6)
    folder = tmp_path / "cache"
    assert losses("kept", "--cache", folder, "--steps", 6) == pytest.approx(expected, rel=1e-6)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    found = segments(folder)
    assert found
    assert losses("again", "--cache", folder, "--steps", 6) == pytest.approx(expected, rel=1e-6)
    assert [path for path, _ in segments(folder)] == [path for path, _ in found]
    session = pz.Run(tmp_path / "kept").recipe.session
    assert (session.cache, session.cache_folder) == ("fp32", str(folder))
    assert pz.Run(tmp_path / "whole").recipe.session.cache is None
    for name in "whole", "kept":
        pz.Run(tmp_path / name).replay(tmp_path / f"{name}-tuned")
    assert f"in {len(found)} files" in CliRunner().invoke(cli, ["cache", "info", "--dir", str(folder)]).output
    result = CliRunner().invoke(cli, ["cache", "clear", "--dir", str(folder)])
    assert result.exit_code == 0
    assert f"removed {len(found)} files" in result.output
    assert not segments(folder)


def test_a_run_resumes_with_its_cache(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", train=TRAIN)
    data = lines(tmp_path / "d.jsonl", *DATA["causal-lm"][0])
    words: list[Any] = ["train", bundle.path, "--data", data, "--method", "mezo", "--lr", "0.01", "--batch-size", "3"]
    words += ["--threads", "1", "--steps", "8", "--cache", tmp_path / "cache", "--cache-dtype", "int8"]
    whole = CliRunner().invoke(cli, [*map(str, words), "-o", str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.stderr
    stopped = pz.Run(tmp_path / "whole").recipe
    assert stopped.session.cache == "int8"

    class StopError(Exception):
        pass

    original = pz.Trainer._step

    def step(self: Any, batch: Any) -> Any:
        if self.optimizer.step_number == 4:
            raise StopError
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pz.Trainer, "_step", step)
        result = CliRunner().invoke(cli, [*map(str, words), "-o", str(tmp_path / "run")])
        assert isinstance(result.exception, StopError)
    result = CliRunner().invoke(cli, ["train", "--resume", str(tmp_path / "run")])
    assert result.exit_code == 0, result.stderr
    assert pz.Run(tmp_path / "run").entries == pz.Run(tmp_path / "whole").entries
    for more, said in (
        (["--cache", "off"], f"cache is {tmp_path / 'cache'} there and off here"),
        (["--cache-dtype", "fp16"], "cache_dtype is int8 there and fp16 here"),
    ):
        result = CliRunner().invoke(cli, [*map(str, words), *more, "-o", str(tmp_path / "run")])
        assert result.exit_code == 1
        assert said in result.stderr
    again = CliRunner().invoke(cli, [*map(str, words), "-o", str(tmp_path / "run")])
    assert again.exit_code == 0, again.stderr


def test_a_tiny_run_keeps_nothing_unless_it_is_asked_to(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "causal-lm", train=TRAIN)
    data = lines(tmp_path / "d.jsonl", *DATA["causal-lm"][0])
    words = ["train", str(bundle.path), "--data", str(data), "--steps", "1", "--threads", "1", "--batch-size", "3"]
    result = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.stderr
    assert pz.Run(tmp_path / "run").recipe.session.cache is None
    result = CliRunner().invoke(
        cli, [*words, "-o", str(tmp_path / "small"), "--cache", str(tmp_path / "c"), "--cache-limit", "0.001M"]
    )
    assert result.exit_code == 1
    assert "the activations do not fit: they take 0 MB, and the limit is 0 MB (--cache-limit)" in result.stderr
