from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketzo import JournalError, kernels
from pocketzo.formats.journal import RECORD, Journal

HEADER = {"method": {"method": "mezo"}, "name": "größer"}
Record = tuple[int, float, float]
floats = st.floats(width=32, allow_nan=False)
records_lists = st.lists(st.tuples(st.integers(0, 2**64 - 1), floats, floats), max_size=20)


def write(path: Path, records: list[Record]) -> bytes:
    journal = Journal.create(path, HEADER)
    journal.append(records)
    journal.close()
    return path.read_bytes()


def read(path: Path) -> list[Record]:
    journal = Journal.open(path, write=False)
    return [(int(r["draw"]), float(r["coefficient"]), float(r["lr"])) for r in journal.records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.pzj"


SOME: list[Record] = [(7, 0.5, 1e-3), (2**64 - 1, -2.25, 0.0), (8, 1.5, 0.25)]
SOME32 = [(d, float(np.float32(c)), float(np.float32(lr))) for d, c, lr in SOME]


@given(records=records_lists)
def test_what_is_written_is_read(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.pzj"
    write(path, records)
    assert read(path) == records


def test_header_is_kept_with_versions(path: Path) -> None:
    write(path, [])
    journal = Journal.open(path)
    journal.close()
    assert journal.header == {"format": 1, "spec": kernels.SPEC_VERSION, **HEADER}


def test_a_record_takes_twenty_bytes(path: Path) -> None:
    assert RECORD.itemsize == 20
    assert len(write(path, SOME)) - len(write(path.with_name("empty"), [])) == 60


def test_appending_goes_on_where_the_file_ends(path: Path) -> None:
    write(path, SOME[:1])
    journal = Journal.open(path)
    journal.append(SOME[1:])
    journal.close()
    assert read(path) == SOME32


@pytest.mark.parametrize("cut", range(1, 20))
def test_torn_last_record_is_dropped_with_a_notice(path: Path, cut: int) -> None:
    data = write(path, SOME)
    path.write_bytes(data[:-cut])
    journal = Journal.open(path)
    assert len(journal.records) == 2
    assert journal.notice is not None
    assert f"the last {20 - cut} bytes" in journal.notice
    journal.append(SOME[2:])
    journal.close()
    assert path.read_bytes() == data


@pytest.mark.parametrize("zeros", [20, 45])
def test_zeros_at_the_end_are_dropped(path: Path, zeros: int) -> None:
    path.write_bytes(write(path, SOME) + bytes(zeros))
    assert read(path) == SOME32


def test_damaged_last_record_is_dropped(path: Path) -> None:
    data = bytearray(write(path, SOME))
    data[-10] ^= 1
    path.write_bytes(data)
    assert read(path) == SOME32[:2]


@given(data=st.data())
def test_any_flipped_bit_before_the_last_record_is_an_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.pzj"
    content = bytearray(write(path, SOME))
    bit = data.draw(st.integers(0, 8 * (len(content) - RECORD.itemsize) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"journal\.pzj"):
        read(path)


def test_damage_in_the_middle_says_where(path: Path) -> None:
    data = bytearray(write(path, SOME))
    data[-25] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(JournalError, match=rf"record 1 \(of 3, at byte {len(data) - 40}\) is damaged"):
        read(path)
    assert path.read_bytes() == data


def test_swapped_records_are_damage(path: Path) -> None:
    data = write(path, SOME)
    path.write_bytes(data[:-60] + data[-40:-20] + data[-60:-40] + data[-20:])
    with pytest.raises(JournalError, match="record 0"):
        read(path)


def test_records_of_another_run_are_damage(path: Path) -> None:
    data = write(path, SOME)
    other = Journal.create(path.with_name("other"), {"seed": 1})
    other.close()
    header = path.with_name("other").read_bytes()
    path.write_bytes(header + data[-60:])
    assert read(path) == []  # no record is good: all of it is an end to be dropped
    path.write_bytes(header + data[-60:] + b"x")
    assert read(path) == []


def test_another_spec_version_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketzo.formats.journal.SPEC_VERSION", 2)
    Journal.create(path, HEADER).close()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="version 2 of the noise specification"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"PZOJ", b"hello there, no journal", b"PZOJ" + struct.pack("<I", 99) + b"{}"])
def test_what_is_no_journal_is_an_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"not a PocketZO journal|header is incomplete"):
        read(path)


def test_missing_and_existing(path: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal here"):
        read(path)
    write(path, SOME)
    with pytest.raises(JournalError, match="is there already"):
        Journal.create(path, HEADER)
    assert read(path) == SOME32


def test_truncate(path: Path) -> None:
    write(path, SOME)
    journal = Journal.open(path)
    journal.truncate(1)
    journal.append(SOME[1:2])
    journal.close()
    assert read(path) == SOME32[:2]


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
def test_a_full_disk_leaves_whole_records(path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from pocketzo.formats.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal.create(Path({os.fspath(path)!r}), {{}})
size = Path({os.fspath(path)!r}).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
journal.append([(1, 1.0, 1.0), (2, 2.0, 1.0)])
try:
    journal.append([(3, 3.0, 1.0)])
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append([(4, 4.0, 1.0)])
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    journal = Journal.open(path, write=False)
    assert journal.notice is None
    assert journal.records["draw"].tolist() == [1, 2, 4]
