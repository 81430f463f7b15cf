"""Train, prepare, replay and snapshots, killed, cut from power or with a full disk at random; see ``kills/``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kills.lives import Lives
from kills.scenarios import Bench, disturb
from kills.storage import File, Storage
from sizes import SIZE

for package in ("click", "rich", "onnx", "matplotlib"):
    pytest.importorskip(package, reason="the commands need it")

COMPILES = shutil.which(os.environ.get("CC", "cc")) is not None and SIZE == "full"
needs_compiler = pytest.mark.skipif(not COMPILES, reason="needs a C compiler and no emulator")
COUNT = 20  # `python -m kills` does more


@pytest.fixture(scope="module")
def bench(tiny_onnx: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("kills")
    with Lives(folder / "lives") as lives:
        (folder / "bench").mkdir()
        yield Bench(lives, folder / "bench", tiny_onnx, tiny_data)


@needs_compiler
@pytest.mark.parametrize("kind", ["kill", "cut", "fill"])
def test_nothing_is_lost_changed_or_left_behind(bench: Bench, kind: str) -> None:
    seed = int(os.environ.get("POCKETZO_KILL_SEED") or np.random.SeedSequence().generate_state(1)[0])
    print(f"POCKETZO_KILL_SEED={seed}")
    for name, what in disturb(bench, kind, COUNT, seed):
        print(f"{name}: {what}")


def trees(root: Path, record: str, before: dict[str, bytes | None] | None = None) -> set[str]:
    """All that a power cut after the last request may leave."""
    (root.parent / "record").write_text(record)
    storage = Storage(root, before or {}, root.parent / "record")
    rng = np.random.default_rng(1)
    return {str(sorted(storage.tree(storage.requests, rng).items())) for _ in range(5000)}


CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def test_a_power_cut_drops_what_was_not_flushed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    written = f"open\t3\t{CREATE}\t{root}/a\nwrite\t3\t0\t6162\n"
    flushed = f"{written}sync\t3\n"
    folder_flushed = f"open\t4\t0\t{root}\nsync\t4\n"
    data = [b"", b"\0\0", b"a", b"a\0", b"ab"]
    assert trees(root, written) == {"[]", *(str([("a", content)]) for content in data)}
    assert trees(root, flushed) == {"[]", str([("a", b"ab")])}
    assert trees(root, written + folder_flushed) == {str([("a", content)]) for content in data}
    assert trees(root, flushed + folder_flushed) == {str([("a", b"ab")])}

    renamed = f"{flushed}rename\t{root}/a\t{root}/b\n"
    assert trees(root, renamed, {"b": b"old"}) == {
        str([("b", b"old")]),
        str([("a", b"ab"), ("b", b"old")]),
        str([("b", b"ab")]),
    }
    assert trees(root, renamed + folder_flushed, {"b": b"old"}) == {str([("b", b"ab")])}


def test_a_power_cut_may_take_either_of_two_folders(tmp_path: Path) -> None:
    root = tmp_path / "root"
    before: dict[str, bytes | None] = {"new": None, "new/a": b"1", "out": None, "out/a": b"0"}
    swapped = f"swap\t{root}/new\t{root}/out\nunlink\t{root}/new/a\nrmdir\t{root}/new\n"
    old, new = [("out", None), ("out/a", b"0")], [("out", None), ("out/a", b"1")]
    assert trees(root, swapped, before) == {
        str(sorted(before.items())),
        str([("new", None), ("new/a", b"0"), *new]),
        str([("new", None), *new]),
        str(new),
    }
    assert str(old) not in trees(root, swapped, before)


def test_cuts_of_a_file_are_in_the_order_of_its_writes() -> None:
    file = File(b"old", [(0, 0, None), (1, 0, b"abcd"), (2, 1, None), (3, 1, b"x")])
    assert [file.after(n, None) for n in range(5)] == [b"old", b"", b"abcd", b"a", b"ax"]
