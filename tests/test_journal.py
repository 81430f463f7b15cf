from __future__ import annotations

import hashlib
import math
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sizes import full_or_small

from pocketzo import JournalError, kernels
from pocketzo.formats.journal import Entry, Journal

HEADER = {"method": {"method": "mezo"}, "name": "größer"}
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
draws = st.dictionaries(st.integers(0, 2**64 - 1), floats, min_size=1, max_size=9)
entries_lists = st.lists(st.builds(Entry, floats, draws), max_size=12)


def write(path: Path, entries: Sequence[Entry]) -> bytes:
    journal = Journal.create(path, HEADER)
    for entry in entries:
        journal.append(entry)
    journal.close()
    return path.read_bytes()


def read(path: Path) -> list[Entry]:
    return Journal.open(path, write=False).entries


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.pzj"


LR = float(np.float32(1e-3))
SOME = [
    Entry(LR, {7: 0.5}),
    Entry(0.0, {2**64 - 1: -2.25, 3: 1.5}),
    Entry(0.25, {8: 1.5}),
]
SIZES = [24, 36, 24]  # bytes


@given(entries=entries_lists)
def test_what_is_written_is_read(entries: list[Entry], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.pzj"
    write(path, entries)
    got = read(path)
    assert got == entries
    assert [list(entry.coefficients) for entry in got] == [list(entry.coefficients) for entry in entries]


def test_header_is_kept_with_versions(path: Path) -> None:
    write(path, [])
    journal = Journal.open(path)
    journal.close()
    assert journal.header == {"format": 2, "spec": kernels.SPEC_VERSION, **HEADER}


def test_an_entry_takes_twelve_bytes_and_twelve_a_direction(path: Path) -> None:
    empty = len(write(path.with_name("empty"), []))
    for count, (size, name) in enumerate(zip(np.cumsum(SIZES), "abc", strict=True), 1):
        assert len(write(path.with_name(name), SOME[:count])) - empty == size


def test_appending_goes_on_where_the_file_ends(path: Path) -> None:
    write(path, SOME[:1])
    journal = Journal.open(path)
    for entry in SOME[1:]:
        journal.append(entry)
    assert journal.count == 3
    journal.close()
    assert read(path) == SOME


@pytest.mark.parametrize("cut", range(1, 24))
def test_torn_last_entry_is_dropped_with_a_notice(path: Path, cut: int) -> None:
    data = write(path, SOME)
    path.write_bytes(data[:-cut])
    journal = Journal.open(path)
    assert journal.entries == SOME[:2]
    assert journal.notice is not None
    assert f"the last {24 - cut} bytes" in journal.notice
    journal.append(SOME[2])
    journal.close()
    assert path.read_bytes() == data


@pytest.mark.parametrize("zeros", [3, 24, 45, 4096])
def test_zeros_at_the_end_are_dropped(path: Path, zeros: int) -> None:
    path.write_bytes(write(path, SOME) + bytes(zeros))
    assert read(path) == SOME


def test_damaged_last_entry_is_dropped(path: Path) -> None:
    data = bytearray(write(path, SOME))
    data[-10] ^= 1
    path.write_bytes(data)
    assert read(path) == SOME[:2]


@given(data=st.data())
def test_any_flipped_bit_before_the_last_entry_is_an_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.pzj"
    content = bytearray(write(path, SOME))
    bit = data.draw(st.integers(0, 8 * (len(content) - SIZES[-1]) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"journal\.pzj"):
        read(path)


@pytest.mark.parametrize(
    "offset",
    [24, 28, 40, 59],
    ids=["its checksum", "its second coefficient", "its first draw", "its number of directions"],
)
def test_damage_in_the_middle_says_where(path: Path, offset: int) -> None:
    data = bytearray(write(path, SOME))
    data[-1 - offset] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(JournalError, match=rf"entry 1, at byte {len(data) - 60}, is damaged, and there are good ones"):
        read(path)
    assert path.read_bytes() == data


def test_swapped_entries_are_damage(path: Path) -> None:
    data = write(path, [*SOME[::2], SOME[0], SOME[2]])
    path.write_bytes(data[:-96] + data[-72:-48] + data[-96:-72] + data[-48:])
    with pytest.raises(JournalError, match="entry 0"):
        read(path)


def test_a_missing_entry_is_damage(path: Path) -> None:
    data = write(path, [*SOME, SOME[0]])
    path.write_bytes(data[:-84] + data[-48:])
    with pytest.raises(JournalError, match="entry 1"):
        read(path)


def test_entries_of_another_run_are_no_entries(path: Path) -> None:
    data = write(path, SOME[:1])
    Journal.create(path.with_name("other"), {"seed": 1}).close()
    header = path.with_name("other").read_bytes()
    path.write_bytes(header + data[-24:])
    assert read(path) == []


@pytest.mark.parametrize("gap", [-1, 1, 3, 10])
def test_bytes_too_many_or_too_few_in_the_middle_are_damage(path: Path, gap: int) -> None:
    data = write(path, [*SOME, SOME[0]])
    at = len(data) - sum(SIZES) + 5
    path.write_bytes(data[:at] + bytes(max(gap, 0)) + data[at - min(gap, 0) :])
    with pytest.raises(JournalError, match=r"entry 1, at byte \d+, is damaged, and there are good ones after it"):
        read(path)


def test_an_entry_of_which_the_checksum_alone_is_left_is_damage(path: Path) -> None:
    data = write(path, [SOME[0], SOME[1], SOME[2]])
    path.write_bytes(data[: -sum(SIZES[1:])] + data[-SIZES[2] - 4 :])
    with pytest.raises(JournalError, match=r"entry 1, at byte \d+, is damaged, and there are good ones after it"):
        read(path)


@pytest.mark.parametrize("words", [b"\1\0\0\0", b"\0\4\0\0", b"\0\0\x10\0", b"\0\1", b"\0\0\1", b"\0\0\0\1\1"])
def test_a_file_made_to_keep_the_search_busy(path: Path, words: bytes) -> None:
    path.write_bytes(write(path, SOME) + words * (10_000_000 // len(words)))
    started = time.process_time()
    with pytest.raises(JournalError, match=r"entry 3, .* there may be good ones after it: the search .* given up"):
        read(path)
    assert time.process_time() - started < full_or_small(10, 100)  # 0.4 s on a desktop


def test_a_large_entry_is_found_after_damage(path: Path) -> None:
    data = write(path, [SOME[0], SOME[1], Entry(1.0, dict.fromkeys(range(100_000), 0.5))])
    path.write_bytes(data[: len(data) - 1_200_012 - 30] + data[len(data) - 1_200_012 - 29 :])
    with pytest.raises(JournalError, match=r"entry 1, at byte \d+, is damaged, and there are good ones after it"):
        read(path)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (struct.pack("<IfQf", 1, 1.0, 1, math.nan), "a number is not finite"),
        (struct.pack("<IfQf", 1, math.inf, 1, 1.0), "a number is not finite"),
        (struct.pack("<IfQfQf", 2, 1.0, 7, 1.0, 7, 1.0), "a draw occurs twice"),
    ],
)
def test_what_no_step_can_have_done_is_an_error_though_its_checksum_is_right(
    path: Path, body: bytes, fault: str
) -> None:
    data = write(path, [])
    path.write_bytes(data + body + struct.pack("<I", zlib.crc32(body, struct.unpack("<I", data[-4:])[0])))
    with pytest.raises(JournalError, match=f"entry 0, at byte {len(data)}, cannot be of a step: .*{fault}"):
        read(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(1.0, {}), "an entry has 1 to 1048576 directions, got 0"),
        (Entry(1.0, dict.fromkeys(range(2**20 + 1), 1.0)), "an entry has 1 to 1048576 directions, got 1048577"),
        (Entry(1.0, {2**64: 1.0}), "draws of 64 bits"),
        (Entry(1.0, {-1: 1.0}), "draws of 64 bits"),
        (Entry(1.0, {0: 0.1}), "exact in float32"),
        (Entry(1.0, {0: 1e39}), "exact in float32"),
        (Entry(0.1, {0: 1.0}), r"exact in float32; got lr=0.1 and \{0: 1.0\}"),
        (Entry(1.0, {0: math.nan}), "finite"),
        (Entry(-math.inf, {0: 1.0}), "finite"),
    ],
)
def test_an_entry_that_would_not_be_read_back_is_not_written(path: Path, entry: Entry, message: str) -> None:
    journal = Journal.create(path, HEADER)
    journal.append(SOME[0])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        journal.append(entry)
    assert path.read_bytes() == before
    journal.append(SOME[1])
    journal.close()
    assert read(path) == SOME[:2]


def test_positions_differ_between_journals_and_between_entries_of_one(path: Path) -> None:
    write(path, SOME)
    journal = Journal.open(path)
    positions = [journal.position(step) for step in range(4)]
    text = path.read_bytes()[8 : -4 - sum(SIZES)]
    assert positions[0] == (hashlib.sha256(text).hexdigest(), 0, zlib.crc32(text))
    assert positions[3].crc32 == struct.unpack("<I", path.read_bytes()[-4:])[0]
    journal.truncate(1)
    journal.append(Entry(LR, {9: 0.5}))
    journal.append(SOME[2])
    again = [journal.position(step) for step in range(4)]
    journal.close()
    assert again == [journal.position(step) for step in range(4)]
    assert [a == b for a, b in zip(positions, again, strict=True)] == [True, True, False, False]


def test_another_spec_version_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketzo.formats.journal.SPEC_VERSION", 2)
    Journal.create(path, HEADER).close()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="version 2 of the noise specification"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"PZO", b"hello there, no journal"])
def test_what_is_no_journal_is_an_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(JournalError, match="not a PocketZO journal, which begins with b'PZOJ'; got"):
        read(path)


def test_a_file_that_ends_within_its_header_is_an_error(path: Path) -> None:
    data = write(path, [])
    for size in range(4, len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(JournalError, match=f"header is incomplete: the file ends after {size} bytes, expected"):
            Journal.open(path)
        assert path.read_bytes() == data[:size]


@given(head=st.binary(max_size=40), known=st.booleans())
def test_any_bytes_are_a_journal_or_an_error_that_names_the_file(
    head: bytes, known: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.pzj"
    path.write_bytes(b"PZOJ" * known + head)
    with pytest.raises(JournalError, match=r"journal\.pzj: "):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "the header is not that of a journal"),
        (b"{}", "the header is not that of a journal"),
        (b"\xff", "the header is not that of a journal"),
        (b'{"format": 1, "spec": 1}', "format version 1; this PocketZO reads version 2"),
        (b'{"format": 3}', "format version 3; this PocketZO reads version 2"),
        (b'{"format": 2.0, "spec": 1}', "'format' is 2.0, expected an integer"),
        (b'{"format": 2, "spec": true}', "'spec' is True, expected an integer"),
        (b'{"format": 2}', "'spec' is None, expected an integer"),
        (b'{"format": 2, "spec": 1, "spec": 2}', "a name occurs twice"),
        (b'{"format": 2, "spec": 1, "lr": NaN}', "NaN is not JSON"),
        ('{"format": 2, "spec": 1}'.encode("utf-16"), "the header is not that of a journal"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_headers_of_another_kind(path: Path, text: bytes, message: str) -> None:
    path.write_bytes(b"PZOJ" + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text)))
    with pytest.raises(JournalError, match=message):
        read(path)


def test_missing_and_existing(path: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal here"):
        read(path)
    write(path, SOME)
    with pytest.raises(JournalError, match="is there already"):
        Journal.create(path, HEADER)
    assert read(path) == SOME


def test_a_header_that_is_not_json_is_not_written(path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Journal.create(path, {"lr": math.nan})
    assert list(path.parent.iterdir()) == []


def test_what_cannot_be_opened(path: Path) -> None:
    path.mkdir()
    with pytest.raises(JournalError, match=r"journal\.pzj: cannot be opened: "):
        Journal.open(path)
    with pytest.raises(JournalError, match=r"journal\.pzj: cannot be opened: "):
        read(path)


def test_truncate(path: Path) -> None:
    write(path, SOME)
    journal = Journal.open(path)
    journal.truncate(1)
    journal.append(SOME[1])
    journal.close()
    assert read(path) == SOME[:2]


@pytest.mark.skipif(sys.platform == "win32", reason="no flock on Windows")
def test_a_second_writer_is_refused(path: Path) -> None:
    journal = Journal.create(path, HEADER)
    code = "from pathlib import Path; from pocketzo.formats.journal import Journal; "
    code += f"Journal.open(Path({os.fspath(path)!r}))"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is writing to this run" in second.stderr
    journal.close()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes on Windows")
def test_a_full_disk_leaves_whole_entries(path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from pocketzo.formats.journal import Entry, Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal.create(Path({os.fspath(path)!r}), {{}})
size = Path({os.fspath(path)!r}).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 60, resource.RLIM_INFINITY))
journal.append(Entry(1.0, {{1: 1.0}}))
journal.append(Entry(1.0, {{2: 1.0}}))
try:
    journal.append(Entry(1.0, {{3: 1.0}}))
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append(Entry(1.0, {{4: 1.0}}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    journal = Journal.open(path, write=False)
    assert journal.notice is None
    assert [list(entry.coefficients) for entry in journal.entries] == [[1], [2], [4]]
