from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sizes import full_or_small

import pocketzo as pz
from pocketzo.formats.journal import Entry, Journal, Position
from pocketzo.formats.safetensors import DTYPES, file_sha256
from pocketzo.formats.snapshot import check_snapshot, snapshots, write_snapshot

OLD = Position("a" * 64, 7, 0x01020304)
NEW = Position("a" * 64, 14, 0xF1F2F3F4)
STATE = {"momentum": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(7)}
JSON = "snapshot.json"
WEIGHTS = "weights.safetensors"
STATE_FILE = "state.safetensors"


def write(folder: Path, position: Position = NEW, state: Mapping[str, Any] = STATE) -> Path:
    def weights(path: Path) -> None:
        path.write_bytes(b"weights at %d" % position.step)

    return write_snapshot(folder, position, weights, state)


def passes(path: Path, position: Position) -> bool:
    try:
        check_snapshot(path, position)
    except pz.JournalError:
        return False
    return True


# ---- what is written is read -----------------------------------------------------------------------------------------


@given(
    state=st.dictionaries(
        st.text(max_size=9).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(DTYPES.values())).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
        ),
        max_size=4,
    )
)
def test_state_of_any_type_and_shape_is_read_as_it_was(
    state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("snapshots"), state=state)
    assert (path / STATE_FILE).exists() == bool(state)
    weights, got = check_snapshot(path, NEW)
    assert weights.read_bytes() == b"weights at 14"
    assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in got.items()} == {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in state.items()
    }
    assert all(array.flags.writeable for array in got.values())


def test_arrays_are_stored_in_one_order_of_bytes_and_of_elements(tmp_path: Path) -> None:
    plain = np.arange(6, dtype="<i4").reshape(2, 3)
    path = write(tmp_path, state={"big": plain.astype(">i4"), "fortran": np.asfortranarray(plain)})
    for array in check_snapshot(path, NEW)[1].values():
        np.testing.assert_array_equal(array, plain, strict=True)


def test_the_newest_comes_first_and_other_names_are_none(tmp_path: Path) -> None:
    for name in (
        "step-00000007",
        "step-123456789",
        "step-00000014",
        "step-7",
        "step-x0000007",
        ".pocketzo-0123456789abcdef",
    ):
        (tmp_path / name).mkdir()
    assert [number for number, _ in snapshots(tmp_path)] == [123456789, 14, 7]


def test_description(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert path.name == "step-00000014"
    assert json.loads((path / JSON).read_text()) == {
        "format": "pocketzo-snapshot",
        "version": 1,
        "run": "a" * 64,
        "step": 14,
        "crc32": 0xF1F2F3F4,
        "files": {name: file_sha256(path / name) for name in (STATE_FILE, WEIGHTS)},
    }


def test_only_the_last_is_kept(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000014"]


# ---- damage ----------------------------------------------------------------------------------------------------------


Harm = Callable[[Path], object]


def at(name: str, harm: Harm) -> Harm:
    """Harm one of the files in a folder."""
    return lambda folder: harm(folder / name)


def write_text(text: str) -> Harm:
    return lambda file: file.write_text(text)


def change(**fields: object) -> Harm:
    """Change fields of a description."""
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        remove(file)


def into_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def into_a_folder(file: Path) -> None:  # a file that cannot be read, by the superuser neither
    remove(file)
    file.mkdir()


def name_a_state(file: Path) -> None:
    files = json.loads(file.read_text())["files"]
    change(files=files | {STATE_FILE: A_HASH})(file)


A_HASH = "0" * 64
DAMAGE: list[tuple[str, Harm, str]] = [
    ("an empty folder", empty, f"{JSON}: cannot be read: No such"),
    ("a file", into_a_file, f"{JSON}: cannot be read: Not a directory"),
    *(
        (name, at(JSON, harm), f"{JSON}: {message}")
        for name, harm, message in (
            ("no description", remove, "cannot be read: No such file"),
            ("description: a folder", into_a_folder, "cannot be read: Is a directory"),
            ("description: cut", cut, "damaged: "),
            ("description: empty", write_text(""), "damaged: "),
            ("description: no UTF-8", lambda file: file.write_bytes(b"\xff"), "damaged: 'utf-8' codec"),
            ("description: a list", write_text("[]"), "damaged: not a JSON object"),
            ("description: null", write_text("null"), "damaged: not a JSON object"),
            ("description: deep", write_text("[" * 10**5), "damaged: nested too deeply"),
            ("description: a name twice", write_text('{"a": 1, "a": 1}'), "damaged: a name occurs twice"),
            ("description: no fields", write_text("{}"), "format is None, expected 'pocketzo-snapshot'"),
            ("another format", change(format="bundle"), "format is 'bundle', expected 'pocketzo-snapshot'"),
            ("another version", change(version=2), "version is 2, expected 1"),
            ("a version that is no number", change(version=True), "version is True, expected 1"),
            ("a step that is no integer", change(step=28.0), r"step is 28\.0, expected 28"),
            ("another run", change(run=A_HASH), "run is '0000.*', expected "),
            ("another step", change(step=21), "step is 21, expected 28"),
            ("another entry", change(crc32=1), "crc32 is 1, expected "),
            ("no files", change(files=None), "files is None, expected "),
            ("files: a list", change(files=[WEIGHTS]), r"files is \['weights"),
            ("files: a text", change(files=WEIGHTS), "files is 'weights"),
            ("files: no weights", change(files={STATE_FILE: A_HASH}), "files is .*, expected weights"),
            ("files: others", change(files={WEIGHTS: A_HASH, "../bundle.json": A_HASH}), "files is .*bundle"),
        )
    ),
    ("no hash", at(JSON, change(files={WEIGHTS: None})), f"{WEIGHTS}: damaged: SHA-256 is .*, expected None"),
    ("a state that is not there", at(JSON, name_a_state), f"{STATE_FILE}: cannot be read: No such file"),
    ("no weights", at(WEIGHTS, remove), f"{WEIGHTS}: cannot be read: No such file"),
    ("weights: a folder", at(WEIGHTS, into_a_folder), f"{WEIGHTS}: cannot be read: Is a directory"),
    ("weights: cut", at(WEIGHTS, cut), f"{WEIGHTS}: damaged: SHA-256 is"),
    ("weights: a flipped bit", at(WEIGHTS, flip), f"{WEIGHTS}: damaged: SHA-256 is"),
    ("weights: longer", at(WEIGHTS, lambda file: file.write_bytes(bytes(10**5))), f"{WEIGHTS}: damaged: SHA-256 is"),
]


@pytest.fixture(scope="module")
def recorded(tiny_bundle: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps with a snapshot after 28; not to be changed."""
    model = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, model.bundle)
    run = tmp_path_factory.mktemp("recorded") / "run"
    pz.Trainer(model, pz.MeZO(model, lr=0.02), data, batch_size=8, steps=30, run=run, snapshot_every=7).fit()
    (run / "weights.sha256").write_text(model.weights.sha256())
    return run


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "run")
    return tmp_path / "run"


def tuned_sha256(run: Path) -> str:
    pz.Run(run).replay(run.parent / "tuned", overwrite=True)
    return file_sha256(run.parent / "tuned" / WEIGHTS)


@pytest.mark.parametrize(("harm", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_named_and_the_journal_alone_gives_the_same_weights(run: Path, harm: Harm, message: str) -> None:
    harm(run / "snapshots" / "step-00000028")
    with pytest.warns(UserWarning, match=f"passed over: {run}/snapshots/step-00000028/{message}") as warned:
        sha256 = tuned_sha256(run)
    assert len(warned) == 1
    assert sha256 == (run / "weights.sha256").read_text()


def test_a_whole_snapshot_is_used(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: list[int] = []
    monkeypatch.setattr(pz.MeZO, "skip", lambda self, entries: skipped.append(len(entries)))
    pz.Run(run).replay(run.parent / "tuned", step=28)
    assert skipped[0] == 28


@pytest.mark.parametrize("harm", [cut, flip, into_a_folder, remove])
def test_a_damaged_state_is_named(tmp_path: Path, harm: Harm) -> None:
    path = write(tmp_path)
    harm(path / STATE_FILE)
    with pytest.raises(pz.JournalError, match=rf"step-00000014/{STATE_FILE}: (damaged|cannot be read): "):
        check_snapshot(path, NEW)


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{}extra"]
)
def test_a_state_that_holds_no_tensors_is_named(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path)
    (path / STATE_FILE).write_bytes(content)
    change(files={name: file_sha256(path / name) for name in (WEIGHTS, STATE_FILE)})(path / JSON)
    with pytest.raises(pz.JournalError, match=f"step-00000014/{STATE_FILE}: "):
        check_snapshot(path, NEW)


def test_a_flipped_bit_in_the_description_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = (path / JSON).read_bytes()
    for bit in range(0, 8 * len(content), full_or_small(1, 29)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / JSON).write_bytes(flipped)
        with pytest.raises(pz.JournalError, match="step-00000014/"):
            check_snapshot(path, NEW)
    (path / JSON).write_bytes(content)
    assert passes(path, NEW)


def test_files_that_the_description_does_not_name_do_not_count(run: Path) -> None:
    for name in ("Thumbs.db", STATE_FILE):
        (run / "snapshots" / "step-00000028" / name).write_bytes(b"not ours")
    left = run / "snapshots" / ".pocketzo-0123456789abcdef" / "new"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"half of")
    assert tuned_sha256(run) == (run / "weights.sha256").read_text()


def test_a_snapshot_of_steps_that_the_journal_has_lost_is_not_used(run: Path) -> None:
    journal = Journal.open(run / "journal.pzj")
    entries = journal.entries
    journal.truncate(25)
    for entry in entries[25:]:  # the run went on in another way, as on another machine
        journal.append(Entry(entry.lr, {draw: -coefficient for draw, coefficient in entry.coefficients.items()}))
    journal.close()
    with pytest.warns(UserWarning, match=f"step-00000028/{JSON}: crc32 is"):
        sha256 = tuned_sha256(run)
    shutil.rmtree(run / "snapshots")
    assert sha256 == tuned_sha256(run) != (run / "weights.sha256").read_text()


def test_weights_that_become_unreadable_are_passed_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(path: Path, position: Position) -> tuple[Path, dict[str, Any]]:
        found = check_snapshot(path, position)
        into_a_folder(path / WEIGHTS)
        return found

    monkeypatch.setattr("pocketzo.train.run.check_snapshot", checked)
    with pytest.warns(UserWarning, match=f"passed over: .*/step-00000028/{WEIGHTS}: "):
        assert tuned_sha256(run) == (run / "weights.sha256").read_text()


# ---- a writer that does not come to its end --------------------------------------------------------------------------

STALE = NEW._replace(crc32=1)  # of steps that the journal has lost
NOT_REACHED = 3


def interrupt_every_stage(base: Path, before: Position, how: str) -> list[int]:
    """Write a snapshot again and again, each time interrupted one request to the file system later.

    Parameters
    ----------
    base : Path
        Gets a folder of snapshots for each time, named 0, 1, ..
    before : Position
        Of the snapshot that is there already.
    how : {"killed", "full"}
        Killed before the request, or refused for want of space.

    Returns
    -------
    list of int
        The exit codes: 0 where the writer finished nevertheless, 1 where it raised OSError.
    """
    codes: list[int] = []
    while True:
        folder = base / str(len(codes))
        write(folder, before)
        child = os.fork()  # as an audit hook cannot be removed
        if not child:
            asked = 0

            def hook(event: str, _: tuple[Any, ...]) -> None:
                nonlocal asked
                if event != "open" and not event.startswith(("os.", "shutil.")):
                    return
                asked += 1
                if asked - 1 != len(codes):
                    return
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            sys.addaudithook(hook)
            try:
                write(folder)
                os._exit(0 if asked > len(codes) else NOT_REACHED)
            except OSError:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == NOT_REACHED:
            return codes
        codes.append(code)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
@pytest.mark.parametrize("how", ["killed", "full"])
@pytest.mark.parametrize("before", [OLD, STALE, NEW], ids=["another step", "lost steps", "the same step"])
def test_a_writer_that_is_killed_or_fails_leaves_the_old_snapshot_or_the_new_one(
    tmp_path: Path, before: Position, how: str
) -> None:
    code = f"""
import json
from pathlib import Path
from test_snapshot import Position, interrupt_every_stage
print(json.dumps(interrupt_every_stage(Path({os.fspath(tmp_path)!r}), Position(*{tuple(before)!r}), {how!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    codes = json.loads(done.stdout)
    assert len(codes) > (5 if before == NEW else 15)
    for stage, code in enumerate(codes):
        folder = tmp_path / str(stage)
        left = dict(snapshots(folder))
        old, new = (position.step in left and passes(left[position.step], position) for position in (before, NEW))
        if how == "killed":
            assert code == -signal.SIGKILL
            assert old or new or before == STALE, stage  # which serves nobody
        else:
            assert new if code == 0 else old or before == STALE, stage
        write(folder)  # as the resumed run does
        assert [path.name for path in folder.glob("step-*")] == ["step-00000014"]
        assert passes(folder / "step-00000014", NEW)
        assert not list(folder.glob(".*")), stage


def test_an_exception_of_the_writer_of_weights_leaves_the_old_snapshot(tmp_path: Path) -> None:
    write(tmp_path, OLD)

    def interrupted(path: Path) -> None:
        path.write_bytes(b"half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_snapshot(tmp_path, NEW, interrupted, STATE)
    with pytest.raises(TypeError, match="tensor 'object': dtype object cannot be stored"):
        write(tmp_path, state={"object": np.array([None])})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    assert passes(tmp_path / "step-00000007", OLD)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes on Windows")
def test_a_full_disk_leaves_the_old_snapshot(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from test_snapshot import NEW, OLD, STATE, write
folder = Path({os.fspath(tmp_path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write(folder, OLD)
for size in 5, 200:  # within the weights, and within the state
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        write(folder, NEW)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error.strerror, [path.name for path in folder.iterdir()])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == 2 * ["File too large ['step-00000007']"]
    assert passes(tmp_path / "step-00000007", OLD)
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000014"]
