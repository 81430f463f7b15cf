from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from pocketzo import BundleError
from pocketzo.formats.bundle import FILES, Bundle, TaskSpec, tensor_ids
from pocketzo.formats.bundle_writer import copy_bundle, staged_bundle
from pocketzo.formats.exchange import exchange
from pocketzo.formats.probe import write_probe
from pocketzo.formats.safetensors import write
from pocketzo.prepare import prepare

MODELS = Path(__file__).parent / "models"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    prepare(
        MODELS / "bert-old.onnx",
        folder / "bundle",
        tokenizer=folder / "tokenizer.json",
        labels=["a", "b", "c"],
        max_length=32,
        train="layer",
    )
    return folder / "bundle"


@pytest.fixture
def bundle(prepared: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "bundle"))


def test_what_was_prepared_is_read(prepared: Path) -> None:
    bundle = Bundle.read(prepared)
    assert bundle.labels == ("a", "b", "c")
    assert bundle.max_length == 32
    assert (bundle.loss, bundle.logits) == ("loss", "logits")
    assert bundle.tokenizer_path == prepared / "tokenizer.json"
    assert [value.name for value in bundle.inputs] == ["input_ids", "attention_mask", "token_type_ids", "labels"]
    assert bundle.inputs[0].shape == ("batch", "sequence")
    assert {value.dtype for value in bundle.inputs} == {"int64"}
    assert [(value.name, value.shape) for value in bundle.outputs] == [("logits", ("batch", 3)), ("loss", ())]
    assert {tensor.dtype for tensor in bundle.tensors} == {"float32"}
    assert all(tensor.trainable == ("layer" in tensor.name) for tensor in bundle.tensors)
    assert bundle.trainable == {"layer": tuple(tensor.name for tensor in bundle.tensors if "layer" in tensor.name)}
    assert bundle.task == TaskSpec("classification", {"labels": ["a", "b", "c"], "loss": "cross-entropy"})
    assert bundle.base_sha256 == hashlib.sha256(bundle.weights_path.read_bytes()).hexdigest()


def test_ids_are_the_hashes_of_the_names() -> None:
    expected = int.from_bytes(hashlib.sha256(b"encoder.weight").digest()[:4], "little")
    assert tensor_ids(["encoder.weight"]) == {"encoder.weight": expected}


def test_an_id_that_is_taken_moves_the_later_name() -> None:
    # Two names found by search whose hashes begin with the same four bytes.
    first, second = "t.53242", "t.89305"
    ids = tensor_ids([second, first])
    hashes = [hashlib.sha256(name.encode()).digest()[:4] for name in (first, second)]
    assert hashes[0] == hashes[1]
    assert ids[first] == int.from_bytes(hashes[0], "little")
    assert ids[second] == int.from_bytes(hashlib.sha256(second.encode() + b"\0").digest()[:4], "little")


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]))))
def test_ids_do_not_depend_on_the_order(names: set[str]) -> None:
    ids = tensor_ids(sorted(names, reverse=True))
    assert ids == tensor_ids(sorted(names))
    assert len(set(ids.values())) == len(names)
    assert all(0 <= number < 0xFFFFFFFF for number in ids.values())


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "weights.safetensors", "tokenizer.json", "probe.npz"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.read(bundle)


def test_a_damaged_probing_batch_is_named(bundle: Path) -> None:
    data = (bundle / "probe.npz").read_bytes()
    arrays = dict(np.load(bundle / "probe.npz"))
    inside = data.index(b"NUMPY") + 140
    for damaged in (b"", data[:-40], data[:inside] + b"?" + data[inside + 1 :]):
        (bundle / "probe.npz").write_bytes(damaged)
        with pytest.raises(BundleError, match=r"probe\.npz: not an \.npz of plain arrays"):
            Bundle.read(bundle)
    del arrays["labels"]
    write_probe(bundle / "probe.npz", arrays)
    with pytest.raises(BundleError, match=r"probe\.npz: the input 'labels' .* is missing"):
        Bundle.read(bundle)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        Bundle.read(tmp_path / "nothing")


def edited(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda description: description.update(fields)


def first(key: str, **fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda description: description[key][0].update(fields)


def a_set(name: object, *tensors: object) -> dict[str, object]:
    return {"name": name, "tensors": tensors}


LAYER = "layer.weight"  # there is no such tensor
LONG = ["y" * 50] * 50
GENERATION: dict[str, Any] = {"graph_sha256": "0" * 64, "eos": [2], "chat_template": None, "special_tokens": {}}

FAULTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (edited(format="other"), "not the description of a bundle"),
    (edited(version=1), "version 1"),
    (edited(version=3), "'adapter' is missing"),
    (edited(version=4), "version 4"),
    (edited(graph_sha256="0" * 64), "not the graph"),
    (edited(header_sha256="0" * 64), "header"),
    (edited(base_sha256="0" * 63), "'base_sha256' is '0+', expected a SHA-256 in hex"),
    (edited(base_sha256=None), "'base_sha256' is None"),
    (edited(max_length="128"), "'max_length' is '128', expected an integer of 1 to"),
    (edited(max_length=0), "'max_length' is 0"),
    (edited(max_length=True), "'max_length' is True"),
    (edited(tokenizer="../secret"), r"'tokenizer' is '../secret', expected 'tokenizer\.json' or null"),
    (edited(tokenizer=""), "'tokenizer'"),
    (edited(probe="../secret"), r"'probe' is '../secret', expected 'probe\.npz' or null"),
    (lambda description: description.pop("probe"), "'probe' is missing"),
    (edited(generation=[]), r"'generation' is \[\], expected an object|generation is \[\]"),
    (edited(generation=dict(GENERATION, eos=[-1])), r"generation: 'eos' is \[-1\], expected a list of token ids"),
    (edited(generation=dict(GENERATION, chat_template="../secret")), "expected 'chat_template.jinja' or null"),
    (edited(generation=dict(GENERATION, special_tokens={"bos_token": 1})), "'bos_token' is 1, expected a string"),
    (edited(generation=GENERATION), "generate.onnx: a file of the bundle is missing"),
    (edited(inputs=[{"name": "x"}]), r"inputs\[0\]: 'dtype' is missing"),
    (edited(inputs=[7]), r"inputs\[0\] is 7, expected an object"),
    (edited(inputs={}), r"'inputs' is {}, expected a list"),
    (edited(inputs=[{"name": "x", "dtype": "int64", "shape": [None]}]), r"inputs\[0\]: 'shape' is \[None\]"),
    (edited(inputs=[{"name": "x", "dtype": "int64", "shape": [-1]}]), "'shape'"),
    (edited(inputs=[{"name": "x", "dtype": "bfloat16", "shape": []}]), r"inputs\[0\]: 'dtype' is 'bfloat16', expected"),
    (edited(outputs=[{"name": "x", "dtype": "é", "shape": []}]), r"outputs\[0\]: 'dtype' is 'é', expected an element"),
    (first("outputs", name=3), r"outputs\[0\]: 'name' is 3, expected a string"),
    (lambda description: description.pop("loss"), "'loss' is missing"),
    (edited(loss="cost"), "'loss' is 'cost', expected the name of an output, or null"),
    (edited(logits=["logits"]), "'logits'"),
    (lambda description: description.pop("task"), "'task' is missing"),
    (edited(task="classification"), "task is 'classification', expected an object"),
    (edited(task={"name": "classification"}), "task: 'settings' is missing"),
    (edited(task={"settings": {}}), "task: 'name' is missing"),
    (
        edited(task={"name": "x", "settings": {"labels": [1]}}),
        r"task.settings: 'labels' is \[1\], expected a list of nam",
    ),
    (edited(task={"name": "x", "settings": {"labels": ["a", "b", "a"]}}), "'labels' is .*, expected each name once"),
    (edited(task={"name": "x", "settings": {"labels": LONG}}), r"'labels' is .{77}\.\.\., expected"),
    (edited(trainable=[]), r"'trainable' is \[\], expected at least one set"),
    (edited(trainable=True), "'trainable' is True"),
    (edited(frozen=None), "'frozen' is None, expected a list"),
    (
        edited(frozen=[{"name": "w", "dtype": "float32", "elements": -1, "reason": "x"}]),
        r"frozen\[0\]: 'elements' is -1",
    ),
    (edited(frozen=[{"name": "w", "dtype": "float32", "elements": 1}]), r"frozen\[0\]: 'reason' is missing"),
    (edited(trainable=[a_set("all")]), r"trainable\[0\]: 'tensors' is \[\]"),
    (edited(trainable=[a_set("", LAYER)]), r"trainable\[0\]: 'name' is ''"),
    (edited(trainable=[a_set("all", LAYER)]), "set 'all' of 'trainable': tensor 'layer.weight' does not exist"),
    (
        lambda description: description["trainable"].append(description["trainable"][0]),
        r"trainable\[1\]: 'name' is 'layer'",
    ),
    (first("tensors", dtype="int64"), "tensors are not those"),
    (lambda description: description["tensors"].pop(0), "tensors are not those"),
    (lambda description: description["tensors"].pop(), "set 'layer' of 'trainable': tensor .* does not exist"),
    (first("tensors", shape=[1]), "tensors are not those"),
    (first("tensors", shape=[1.5]), r"tensors\[0\]: 'shape' is \[1.5\], expected a list of sizes$"),
    (first("tensors", id=5), "ids"),
    (first("tensors", id=2**32 - 1), r"tensors\[0\]: 'id' is 4294967295, expected an integer of 0 to 4294967293"),
]


@pytest.mark.parametrize(("edit", "fault"), FAULTS)
def test_a_description_that_does_not_fit_is_refused(
    bundle: Path, edit: Callable[[dict[str, Any]], object], fault: str
) -> None:
    description = json.loads((bundle / "bundle.json").read_text())
    edit(description)
    (bundle / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(BundleError, match=fault) as caught:
        Bundle.read(bundle)
    assert str(caught.value).startswith(f"{bundle}/")


def test_a_trainable_set_of_integers_is_refused(bundle: Path) -> None:
    description = json.loads((bundle / "bundle.json").read_text())
    name = description["trainable"][0]["tensors"][0]
    next(tensor for tensor in description["tensors"] if tensor["name"] == name)["dtype"] = "int64"
    (bundle / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(BundleError, match=f"set 'layer' of 'trainable': tensor '{name}' is int64, expected float32 or"):
        Bundle.read(bundle)


def test_sets_may_share_tensors_and_a_reader_passes_over_unknown_keys(bundle: Path) -> None:
    description = json.loads((bundle / "bundle.json").read_text())
    names = description["trainable"][0]["tensors"]
    description["trainable"] = [a_set("last", *names[-2:]), a_set("adapter", names[-1])]
    description["comment"] = {"of": "a later version"}
    (bundle / "bundle.json").write_text(json.dumps(description))
    read = Bundle.read(bundle)
    assert read.trainable == {"last": tuple(names[-2:]), "adapter": (names[-1],)}
    assert [tensor.name for tensor in read.tensors if tensor.trainable] == names[-2:]
    read.write_description()
    assert Bundle.read(bundle) == read


@pytest.mark.parametrize("text", ["", "[]", "{", "\ufeff", "[" * 100_000])
def test_a_description_that_is_none_is_refused(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle.read(bundle)


def test_a_changed_graph_is_refused(bundle: Path) -> None:
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="not the graph"):
        Bundle.read(bundle)


def test_cut_off_weights_are_refused(bundle: Path) -> None:
    path = bundle / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="cut off"):
        Bundle.read(bundle)


def test_weights_that_another_library_wrote_are_refused(bundle: Path) -> None:
    """They may be right, but the graph points to other offsets."""
    path = bundle / "weights.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: tensors[name] for name in tensors if "padding" not in name}, path)
    with pytest.raises(BundleError, match="points into"):
        Bundle.read(bundle)


def tuned(bundle: Bundle) -> Callable[[Path], None]:
    tensors = safetensors.numpy.load_file(bundle.weights_path)
    return lambda path: write(path, ((tensor.name, tensors[tensor.name] + np.float32(1)) for tensor in bundle.tensors))


def test_a_copy_differs_in_its_weights_only(prepared: Path, tmp_path: Path) -> None:
    base = Bundle.read(prepared)
    copy_bundle(base, tmp_path / "deep" / "copy", tuned(base))
    copy = Bundle.read(tmp_path / "deep" / "copy")
    assert copy.base_sha256 == base.base_sha256
    before, after = (safetensors.numpy.load_file(bundle.weights_path) for bundle in (base, copy))
    for tensor in base.tensors:
        np.testing.assert_array_equal(after[tensor.name], before[tensor.name] + np.float32(1))
    for name in "model.onnx", "bundle.json", "tokenizer.json":
        assert (copy.path / name).read_bytes() == (base.path / name).read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]


def test_a_copy_with_other_tensors_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="header"):
        copy_bundle(Bundle.read(prepared), tmp_path / "copy", lambda path: write(path, [("a", np.ones(3, np.float32))]))
    assert not list(tmp_path.iterdir())


# ---- in the place of another one -------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below a folder, by path."""
    return {
        os.fspath(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def put_run_and_note(folder: Path) -> None:
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "journal.pzj").write_bytes(b"PZOJ")
    (folder / "note.txt").write_text("mine")


def only_files(folder: Path) -> None:
    (folder / "bundle.json").unlink()


def of_another_tool(folder: Path) -> None:
    (folder / "bundle.json").write_text('{"format": "webpack"}')


def folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").mkdir()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (put_run_and_note, "holds more than the files of a bundle: note.txt, runs; move that away"),
        (folder_in_place_of_a_file, "holds more than the files of a bundle: tokenizer.json; move"),
        (only_files, "already exists and is not a bundle"),  # a model as the hub has it: model.onnx, tokenizer.json
        (of_another_tool, "already exists and is not a bundle"),
    ],
)
def test_only_a_bundle_and_nothing_else_is_replaced(
    prepared: Path, bundle: Path, harm: Callable[[Path], None], said: str
) -> None:
    harm(bundle)
    before = everything(bundle.parent)
    base = Bundle.read(prepared)
    with pytest.raises(BundleError, match=said):
        copy_bundle(base, bundle, tuned(base), overwrite=True)
    assert everything(bundle.parent) == before


def test_nothing_is_replaced_unless_that_is_wanted(prepared: Path, bundle: Path) -> None:
    before = everything(bundle.parent)
    base = Bundle.read(prepared)
    with pytest.raises(BundleError, match="already exists; choose another folder, or replace"):
        copy_bundle(base, bundle, tuned(base))
    assert everything(bundle.parent) == before
    copy_bundle(base, bundle, tuned(base), overwrite=True)
    assert Bundle.read(bundle).weights_path.read_bytes() != before["bundle/weights.safetensors"]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_an_old_or_damaged_bundle_can_be_replaced(prepared: Path, bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "bundle.json").write_text('{"format": "pocketzo-bundle", "version": 1}')
    base = Bundle.read(prepared)
    copy_bundle(base, bundle, tuned(base), overwrite=True)
    assert Bundle.read(bundle).tensors == base.tensors


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_a_bundle_never_takes_the_place_of_its_base(bundle: Path, through: str) -> None:
    base = Bundle.read(bundle)
    before = everything(bundle)
    out = bundle
    if through == "a link":
        out = bundle.parent / "link"
        out.symlink_to(bundle)
    with pytest.raises(BundleError, match=f"{out}: is the base of these weights"):
        copy_bundle(base, out, tuned(base), overwrite=True)
    assert everything(bundle) == before


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_comes_while_a_bundle_is_written_is_kept(
    prepared: Path, bundle: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Bundle.read(prepared)
    before = everything(bundle)

    def write_and_put(path: Path) -> None:
        tuned(base)(path)
        (bundle / "note.txt").write_text("mine")

    with pytest.raises(BundleError, match=r"holds more than the files of a bundle: note\.txt"):
        copy_bundle(base, bundle, write_and_put, overwrite=True)
    assert everything(bundle) == {**before, "note.txt": b"mine"}
    (bundle / "note.txt").unlink()

    def exchanged_a_moment_later(a: Path, b: Path) -> bool:
        (bundle / "note.txt").write_text("mine")
        return exchange(a, b) if can_exchange else False

    monkeypatch.setattr("pocketzo.formats.staging.exchange", exchanged_a_moment_later)
    copy_bundle(base, bundle, tuned(base), overwrite=True)
    assert (bundle / "note.txt").read_text() == "mine"
    assert (bundle / "weights.safetensors").read_bytes() != before["weights.safetensors"]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_what_comes_into_an_empty_place_is_kept(prepared: Path, tmp_path: Path) -> None:
    base, out = Bundle.read(prepared), tmp_path / "copy"

    def write_and_put(path: Path) -> None:
        tuned(base)(path)
        out.mkdir()

    with pytest.raises(BundleError, match="already exists"):
        copy_bundle(base, out, write_and_put)
    assert everything(tmp_path) == {"copy": None}


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_a_failure_keeps_the_old_bundle(
    bundle: Path, late: bool, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(bundle.parent)
    if not can_exchange:
        monkeypatch.setattr("pocketzo.formats.staging.exchange", lambda a, b: False)
    rename = Path.rename

    def interrupt_before_the_new_one_comes(path: Path, target: Path) -> Path:
        if target == bundle:
            monkeypatch.undo()  # only once, as the old bundle has to come back
            raise KeyboardInterrupt
        return rename(path, target)

    def interrupt_exchange(a: Path, b: Path) -> bool:
        raise KeyboardInterrupt

    def fail() -> None:
        with staged_bundle(bundle, overwrite=True) as folder:
            (folder / "weights.safetensors").write_text("half")
            if not late:
                raise KeyboardInterrupt
            if can_exchange:
                monkeypatch.setattr("pocketzo.formats.staging.exchange", interrupt_exchange)
            else:
                monkeypatch.setattr(Path, "rename", interrupt_before_the_new_one_comes)

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert everything(bundle.parent) == before


def test_the_files_of_a_bundle_are_all_in_the_list(bundle: Path) -> None:
    assert {path.name for path in bundle.iterdir()} <= set(FILES)
