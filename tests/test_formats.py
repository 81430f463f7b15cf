"""docs/formats.md: the golden files, what an independent reader finds in them, and what damage does to them."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import independent_reader
import numpy as np
import pytest
from golden import generate
from golden.generate import BUNDLES, GOLDEN, SNAPSHOT, STATE
from hypothesis import given
from hypothesis import strategies as st
from sizes import full_or_small

import pocketzo as pz
from pocketzo._core import Segments
from pocketzo.formats import activations as activations_format
from pocketzo.formats import bundle as bundle_format
from pocketzo.formats import journal as journal_format
from pocketzo.formats import snapshot as snapshot_format
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.journal import Entry, Journal
from pocketzo.formats.safetensors import file_sha256, write
from pocketzo.formats.snapshot import check_snapshot
from pocketzo.optim.methods import METHODS
from pocketzo.optim.program import GATHER, SHIFT, Part, Program
from pocketzo.train.recipe import Recipe

DOCUMENT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text("utf-8")
EXPECTED: Mapping[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
RUNS = GOLDEN / "runs"
MEZO = RUNS / "mezo"
each_run = pytest.mark.parametrize("name", EXPECTED)


def journal(name: str) -> Path:
    return RUNS / name / "journal.pzj"


def entries(name: str) -> list[Entry]:
    return [Entry(lr, dict(map(tuple, coefficients))) for lr, coefficients in EXPECTED[name]["entries"]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> Path:
    """Return the file that training changes."""
    adapter = folder / "adapter.safetensors"
    return adapter if adapter.exists() else folder / "weights.safetensors"


# ---- what is written today -------------------------------------------------------------------------------------------


def test_the_writer_of_today_writes_the_golden_files(tmp_path: Path) -> None:
    generate.write_runs(GOLDEN, tmp_path)
    made = ("runs/", "state/", "expected.json")
    golden = {name: content for name, content in files(GOLDEN).items() if name.startswith(made)}
    written = files(tmp_path)
    assert len(golden) > len(EXPECTED)
    assert sorted(written) == sorted(golden)
    assert [name for name in golden if written[name] != golden[name]] == []


@pytest.mark.parametrize("name", BUNDLES)
def test_the_writer_of_today_writes_the_golden_bundles(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    bundle = Bundle.read(tmp_path / name)
    tensors = independent_reader.read_tensors(bytearray(weights(GOLDEN / name).read_bytes()))
    bundle.write_description()
    write(bundle.trained_path, tensors.items())
    assert files(tmp_path / name) == files(GOLDEN / name)


def test_prepare_makes_the_golden_bundles_but_for_the_bytes_of_the_graph(tmp_path: Path) -> None:
    generate.write_bundles(tmp_path)
    for name in BUNDLES:
        written, golden = files(tmp_path / name), files(GOLDEN / name)
        assert sorted(written) == sorted(golden)
        for file in {"weights.safetensors", weights(GOLDEN / name).name}:
            assert written[file] == golden[file]
        described, expected = json.loads(written["bundle.json"]), json.loads(golden["bundle.json"])
        assert list(described) == list(expected)
        assert described.pop("graph_sha256") == sha256(written["model.onnx"]).hexdigest()
        del expected["graph_sha256"]
        assert described == expected


# ---- what readers find -----------------------------------------------------------------------------------------------


@each_run
def test_a_journal_is_read_as_it_was_written_by_both_readers(name: str) -> None:
    ours = Journal.open(journal(name), write=False)
    header, run, theirs, crcs = independent_reader.read_journal(journal(name))
    assert ours.entries == entries(name) == [Entry(lr, moves) for lr, moves in theirs]
    assert [list(e.coefficients) for e in ours.entries] == [list(e.coefficients) for e in entries(name)]
    assert ours.header == header
    assert [ours.position(step) for step in range(len(crcs))] == [(run, step, crc) for step, crc in enumerate(crcs)]
    assert ours.notice is None
    recipe = Recipe.read(ours.header, journal(name))
    base, model = GOLDEN / EXPECTED[name]["bundle"], recipe.model
    assert model.weights_sha256 == file_sha256(base / "weights.safetensors")
    assert (model.adapter_sha256 or model.weights_sha256) == file_sha256(weights(base))


@each_run
def test_both_replay_a_run_to_the_weights_that_its_steps_left(name: str, tmp_path: Path) -> None:
    folder = GOLDEN / EXPECTED[name]["bundle"]
    pz.Run(RUNS / name).replay(tmp_path / "tuned", bundle=folder)
    assert file_sha256(weights(tmp_path / "tuned")) == EXPECTED[name]["weights_sha256"] != file_sha256(weights(folder))
    bundle, data = independent_reader.read_bundle(folder)
    header, _, found, _ = independent_reader.read_journal(journal(name))
    independent_reader.replay(bundle, data, header, found)
    assert sha256(data).hexdigest() == EXPECTED[name]["weights_sha256"]


def test_both_read_a_snapshot_and_go_on_from_it() -> None:
    header, run, found, crcs = independent_reader.read_journal(journal("mezo"))
    folder = MEZO / "snapshots" / f"step-{SNAPSHOT:08d}"
    step, content = independent_reader.read_snapshot(folder, run, crcs)
    assert (step, list(content)) == (SNAPSHOT, ["weights.safetensors"])
    path, state = check_snapshot(folder, Journal.open(journal("mezo"), write=False).position(SNAPSHOT))
    assert path.read_bytes() == content["weights.safetensors"]
    assert state == {}
    bundle, data = independent_reader.read_bundle(GOLDEN / "bundle")
    independent_reader.replay(bundle, data, header, found[:SNAPSHOT])
    assert data == content["weights.safetensors"]
    independent_reader.replay(bundle, data, header, found[SNAPSHOT:], SNAPSHOT)
    assert sha256(data).hexdigest() == EXPECTED["mezo"]["weights_sha256"]


def test_both_go_on_from_a_snapshot_with_momentum(tmp_path: Path) -> None:
    header, run, found, crcs = independent_reader.read_journal(journal("momentum"))
    folder = RUNS / "momentum" / "snapshots" / f"step-{SNAPSHOT:08d}"
    _, content = independent_reader.read_snapshot(folder, run, crcs)
    bundle, data = independent_reader.read_bundle(GOLDEN / "bundle")
    state: dict[str, Any] = {}
    independent_reader.replay(bundle, data, header, found[:SNAPSHOT], state=state)
    expected = independent_reader.read_tensors(content["state.safetensors"])
    assert data == content["weights.safetensors"]
    assert sorted(state) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array.reshape(-1) if array.shape else array, err_msg=name)
    state = {name: array.reshape(-1) if array.shape else array for name, array in expected.items()}
    independent_reader.replay(bundle, data, header, found[SNAPSHOT:], SNAPSHOT, state)
    assert sha256(data).hexdigest() == EXPECTED["momentum"]["weights_sha256"]
    model: Any = generate.Unloaded(Bundle.read(GOLDEN / "bundle"))  # ours begins at the snapshot
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pz.Run(RUNS / "momentum").replay_onto(model)
    assert model.weights.sha256() == EXPECTED["momentum"]["weights_sha256"]
    shutil.copytree(RUNS / "momentum", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    pz.Run(tmp_path / "run").replay_onto(model)  # and without one, at the base
    assert model.weights.sha256() == EXPECTED["momentum"]["weights_sha256"]


def test_both_read_the_state_in_a_snapshot() -> None:
    _, run, _, crcs = independent_reader.read_journal(journal("mezo"))
    folder = GOLDEN / "state" / f"step-{SNAPSHOT:08d}"
    _, content = independent_reader.read_snapshot(folder, run, crcs)
    _, ours = check_snapshot(folder, Journal.open(journal("mezo"), write=False).position(SNAPSHOT))
    for state in ours, independent_reader.read_tensors(content["state.safetensors"]):
        assert list(state) == list(STATE)
        for key, array in STATE.items():
            np.testing.assert_array_equal(state[key], array, strict=True)


def test_a_snapshot_of_another_journal_is_refused() -> None:
    _, run, _, crcs = independent_reader.read_journal(journal("mezo-decay"))
    with pytest.raises(AssertionError, match="of another journal"):
        independent_reader.read_snapshot(GOLDEN / "state" / f"step-{SNAPSHOT:08d}", run, crcs)


@pytest.mark.parametrize("name", BUNDLES)
def test_both_read_a_bundle(name: str) -> None:
    ours = Bundle.read(GOLDEN / name)
    theirs, data = independent_reader.read_bundle(GOLDEN / name)
    base = bytearray((GOLDEN / name / "weights.safetensors").read_bytes())
    arrays = independent_reader.read_tensors(base) | independent_reader.read_tensors(data)
    assert [(t.name, t.id, t.dtype, list(t.shape)) for t in ours.tensors] == [
        (t["name"], t["id"], t["dtype"], t["shape"]) for t in theirs["tensors"]
    ]
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        tensor.name: (tensor.dtype, tensor.shape) for tensor in ours.tensors
    }
    assert ours.labels == ("rouge", "bleu", "vert très pâle")
    trained = ["embedding.weight", "norm.weight", "norm.bias", "tête.weight", "tête.bias"]
    if ours.adapter is not None:
        trained = ["norm.weight", "norm.bias", "tête.lora_B"]
        assert list(independent_reader.read_tensors(data)) == [*trained[:2], "tête.lora_A", "tête.lora_B"]
        assert base == bytearray((GOLDEN / "bundle" / "weights.safetensors").read_bytes())
    assert [tensor.name for tensor in ours.tensors if tensor.trainable] == trained


def test_metrics_are_read() -> None:
    lines = pz.Run(MEZO).metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6]
    assert lines[3] == {"step": 4, "loss": None, "lr": 0.0, "seconds": 0.25}
    assert lines[4] == {"step": 4, "eval": {"accuracy": 0.5, "loss": None}}


def test_the_independent_reader_is_short_and_independent() -> None:
    path = Path(independent_reader.__file__)
    assert len(path.read_text().splitlines()) <= 172
    for file in path, path.parent / "vectors" / "reference.py":
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "pocketzo" for name in names), file


# ---- damage ----------------------------------------------------------------------------------------------------------


def boundaries(name: str) -> list[int]:
    """Return the offset behind the header, and behind each entry."""
    data = journal(name).read_bytes()
    ends = [12 + int.from_bytes(data[4:8], "little")]
    for entry in entries(name):
        ends.append(ends[-1] + 12 + 12 * len(entry.coefficients))
    assert ends[-1] == len(data)
    return ends


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str, bytes, int]:
    """Draw the name of a golden journal, a kind of damage, the bytes with it, and where in the original it ends."""
    name = draw(st.sampled_from(list(EXPECTED)))
    data, ends = journal(name).read_bytes(), boundaries(name)
    # Often in the entries, and often at their boundaries: the header is long.
    offset = st.one_of(st.integers(0, len(data)), st.integers(ends[0], len(data)), st.sampled_from(ends))
    start, stop = sorted((draw(offset), draw(offset)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "delete", "overwrite", "swap", "repeat"]))
    match kind:
        case "flip":
            start = min(start, len(data) - 1)
            stop = start + 1
            new = bytes([data[start] ^ 1 << draw(st.integers(0, 7))])
        case "cut":
            stop, new = len(data), b""
        case "insert":
            stop, new = start, draw(st.one_of(st.binary(min_size=1, max_size=64), st.integers(1, 99).map(bytes)))
        case "delete":
            new = b""
        case "overwrite":
            new = draw(st.binary(min_size=1, max_size=64))
            stop = min(start + len(new), len(data))
        case "swap":
            middle = draw(st.integers(start, stop))
            new = data[middle:stop] + data[start:middle]
        case _:
            new = 2 * data[start:stop]
    return name, kind, data[:start] + new + data[stop:], stop


@given(case=damaged())
def test_damage_is_an_error_that_says_where_or_costs_the_end_alone(
    case: tuple[str, str, bytes, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, kind, data, stop = case
    original, ends = journal(name).read_bytes(), boundaries(name)
    path = tmp_path_factory.mktemp("damaged") / "journal.pzj"
    path.write_bytes(data)
    differ = (i for i, (a, b) in enumerate(zip(data, original, strict=False)) if a != b)
    same = next(differ, min(len(data), len(original)))
    whole = sum(end <= same for end in ends) - 1  # entries before the damage; -1 if it is in the header
    # An entry after the damage can be recognised if the checksum of the one before it is whole too.
    follows = data != original and any(start >= stop + 4 for start in ends[:-1])
    try:
        got = Journal.open(path, write=False)
    except pz.JournalError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        assert data != original
        if whole < 0:
            assert re.search(r"header|not a PocketZO journal", message)
        else:
            assert f"entry {whole}, at byte {ends[whole]}, is damaged, and there are good ones after it: it" in message
            assert stop <= ends[-2] or kind in ("swap", "repeat")
        return
    assert whole >= 0
    assert not follows
    assert got.entries == entries(name)[:whole]
    if data[ends[whole] :]:
        assert got.notice is not None
        assert f"{path}: the last {len(data) - ends[whole]} bytes are an incomplete entry" in got.notice
        assert f"entry {whole}, at byte {ends[whole]}: it" in got.notice
    else:
        assert got.notice is None


@each_run
def test_a_flipped_bit_in_a_journal_is_noticed(name: str, tmp_path: Path) -> None:
    path, data, ends = tmp_path / "journal.pzj", journal(name).read_bytes(), boundaries(name)
    for at in (*range(0, ends[0], 15), *range(ends[0], len(data), full_or_small(1, 7))):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        if at < ends[-2]:
            with pytest.raises(pz.JournalError, match=re.escape(f"{path}: ")):
                Journal.open(path, write=False)
        else:
            assert Journal.open(path, write=False).entries == entries(name)[:-1]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_flipped_bit_in_a_bundle_but_in_its_weights_is_noticed(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    stops: dict[str, int | None] = {"model.onnx": None}
    for file in {"weights.safetensors", weights(GOLDEN / name).name}:
        stops[file] = 8 + int.from_bytes((GOLDEN / name / file).read_bytes()[:8], "little")
    for file, stop in stops.items():
        data = (tmp_path / name / file).read_bytes()
        for at in range(0, len(data[:stop]), full_or_small(5, 29)):
            flipped = bytearray(data)
            flipped[at] ^= 1 << at % 8
            (tmp_path / name / file).write_bytes(flipped)
            with pytest.raises(pz.BundleError, match=re.escape(f"{tmp_path / name / file}: ")):
                Bundle.read(tmp_path / name)
        (tmp_path / name / file).write_bytes(data)
    Bundle.read(tmp_path / name)


# ---- the document ----------------------------------------------------------------------------------------------------


def block(kind: str) -> str:
    (found,) = re.findall(f"```{kind}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(found)


def test_the_example_of_the_document_is_a_journal(tmp_path: Path) -> None:
    data = b""
    for line in block("hexdump").splitlines():
        match = re.fullmatch(r"([0-9a-f]{8})  ((?:[0-9a-f]{2} )+) *\|(.*)\|", line)
        assert match is not None
        assert int(match[1], 16) == len(data)
        row = bytes.fromhex(match[2])
        assert match[3] == "".join(chr(c) if 32 <= c < 127 else "." for c in row)
        data += row
    path = tmp_path / "journal.pzj"
    path.write_bytes(data)
    header, _, found, crcs = independent_reader.read_journal(path)
    ours = Journal.open(path, write=False)
    assert header == ours.header == {"format": 2, "spec": 1}
    assert ours.entries == [Entry(2.0**-10, {258: -0.5})] == [Entry(*found[0])]
    assert crcs == [0xBF88776E, 0x5A46A152]
    again = Journal.create(tmp_path / "again", {})
    again.append(ours.entries[0])
    again.close()
    assert (tmp_path / "again").read_bytes() == data
    rows = re.findall(r"^\| (\d+) \| `([0-9a-f. ]+)` \|", DOCUMENT, re.MULTILINE)
    at = 0
    for offset, content in rows:
        assert int(offset) == at
        at += 24 if ".." in content else len(bytes.fromhex(content))
        assert ".." in content or data[:at].endswith(bytes.fromhex(content))
    assert at == len(data)


def operations(method: str, dtype: str, draws: list[int]) -> Iterator[str]:
    """Yield what the optimizer does in a step, in the words of the document: with eps 1 and a move of 1/8."""
    model: Any = generate.Unloaded(Bundle.read(GOLDEN / "bundle"))
    optimizer = METHODS[method](model, lr=1.0)
    update = optimizer.update(Entry(1.0, dict.fromkeys(draws, -0.125)))
    part = Part(Segments([]), 1.0, 1.0, decays=False, is_16bit=dtype == "float16")
    scales: list[tuple[str, int, float]] = []
    at: Mapping[int, float] = {}
    for point in optimizer._points(draws):
        program = Program(part, eps=1.0, weight_decay=0.0)
        program.move(at, point)
        scales += [("shift", term.draw, scale) for term in program._terms for scale in term.scales]
        at = point
    program = Program(part, eps=1.0, weight_decay=0.0)
    update(program, at)
    for term in program._terms:
        if term.role != SHIFT:
            scales.append(("gather" if term.role == GATHER else "follow", term.draw, sum(term.scales)))
            continue
        *before, last = term.scales
        scales += [("shift", term.draw, scale) for scale in before]
        scales.append(("shift" if term.rounding == 0 else "update", term.draw, last))
    for kind, draw, scale in scales:
        if kind in ("gather", "follow"):
            yield f"{kind} {'ab'[draw]} {'gain' if kind == 'gather' else 'move'}" if scale else "forget"
            continue
        eps = int(scale - 0.125 * (kind == "update"))
        words = [f"{eps:+d} eps"] * bool(eps) + ["move"] * (kind == "update")
        yield f"{kind} {'ab'[draw]} {' + '.join(words)}"


def test_the_operations_of_the_document_are_those_of_a_step() -> None:
    steps = [text.splitlines() for text in block("steps").split("\n\n")]
    assert {step[0].split()[0] for step in steps} == set(METHODS)
    for title, *lines in steps:
        method, dtype, *draws = title.split()
        assert list(operations(method, dtype, ["ab".index(draw) for draw in draws])) == lines, title


def test_the_document_has_the_versions_and_the_fields_of_the_code() -> None:
    rows = dict(re.findall(r"^\| \[`?(\w+)[^|]*\|[^|]*\| (\d+) \|$", DOCUMENT, re.MULTILINE))
    assert rows == {
        "activations": str(activations_format.VERSION),
        "bundle": str(bundle_format.VERSION),
        "journal": str(journal_format._FORMAT),
        "snapshot": str(snapshot_format.VERSION),
    }
    recipe = Recipe.read(Journal.open(journal("adapter"), write=False).header, journal("adapter"))
    fields = {"format", "spec"} | set(recipe.method)
    for part in (recipe, *vars(recipe).values()):
        fields |= {field.name for field in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set()
    for path in (
        GOLDEN / "bundle-adapter" / "bundle.json",
        MEZO / "snapshots" / f"step-{SNAPSHOT:08d}" / "snapshot.json",
    ):
        fields |= set(json.loads(path.read_text()))
    named = set(re.findall(r"`(?:loop|session|data)?\.?(\w+)`", DOCUMENT))
    assert fields - named == set()
