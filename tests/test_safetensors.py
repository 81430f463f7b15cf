from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pocketzo import BundleError
from pocketzo.formats.safetensors import DTYPES, header_bytes, read_header, write

Array = npt.NDArray[Any]

ARRAYS = st.sampled_from(sorted(DTYPES.values())).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
)
NAMES = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda name: name != "__metadata__" and not name.startswith("pocketzo.padding.")
)


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


@given(st.dictionaries(NAMES, ARRAYS, max_size=6))
def test_the_reference_library_reads_what_is_written(tensors: dict[str, Array]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        write(path, tensors.items())
        loaded = safetensors.numpy.load_file(path)
        entries = read_header(path)
        content = path.read_bytes()
    assert {name for name in loaded if not name.startswith("pocketzo.padding.")} == set(tensors) == set(entries)
    for name, array in tensors.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        entry = entries[name]
        assert entry.start % 64 == 0
        assert content[entry.start : entry.stop] == loaded[name].tobytes() == array.tobytes()


@given(st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=4))
def test_files_of_the_reference_library_are_read(tensors: dict[str, Array]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        entries = read_header(path)
        content = path.read_bytes()
        head = header_bytes(path)
    assert content.startswith(head)
    assert len(head) == min(entry.start for entry in entries.values())
    for name, array in tensors.items():
        entry = entries[name]
        assert (DTYPES[entry.dtype], entry.shape) == (array.dtype.name, array.shape)
        assert content[entry.start : entry.stop] == array.tobytes()


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(tmp_path / "w", [("transposed", base.T), ("reversed", base[::-1]), ("big endian", base.astype(">f4"))])
    loaded = safetensors.numpy.load_file(tmp_path / "w")
    np.testing.assert_array_equal(loaded["transposed"], base.T)
    np.testing.assert_array_equal(loaded["reversed"], base[::-1])
    np.testing.assert_array_equal(loaded["big endian"], base)


def test_the_order_is_that_of_the_bytes(tmp_path: Path) -> None:
    write(tmp_path / "w", [(name, np.zeros(3, np.float32)) for name in "bca"])
    entries = read_header(tmp_path / "w")
    assert list(entries) == ["b", "c", "a"]
    assert [entry.start - entries["b"].start for entry in entries.values()] == [0, 64, 128]


@pytest.mark.parametrize("name", ["__metadata__", "pocketzo.padding.0"])
def test_reserved_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        write(tmp_path / "w", [(name, np.zeros(1, np.float32))])
    assert not list(tmp_path.iterdir())


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a'"):
        write(tmp_path / "w", [("a", np.zeros(1, np.float32)), ("a", np.ones(1, np.float32))])


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'a'.*complex64"):
        write(tmp_path / "w", [("a", np.zeros(1, np.complex64))])
    assert not list(tmp_path.iterdir())


@given(st.data())
def test_every_other_length_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w"
        write(path, [("a", np.ones(20, np.float32)), ("b", np.ones(3, np.float32))])
        whole = path.read_bytes()
        length = data.draw(st.integers(0, len(whole) + 70).filter(lambda length: length != len(whole)))
        path.write_bytes(whole[:length] + bytes(max(0, length - len(whole))))
        with pytest.raises(BundleError, match=r"cut off|too long|not a safetensors file"):
            read_header(path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "cannot hold its header"),
        (b"\xff" * 64, "cannot hold its header"),
        (file_of(b"{"), "damaged"),
        (file_of(b"\xff\xfe{}"), "damaged"),
        (file_of(b"[" * 100_000), "damaged"),
        (file_of([]), "not a JSON object"),
        (file_of(b'{"a":{},"a":{}}'), "twice"),
        (file_of({"a": 1}), "'a'"),
        (file_of({"a": tensor(0, 4, dtype="F4")}, bytes(4)), "'a'"),
        (file_of({"a": tensor(0, 4, shape=[5])}, bytes(4)), "'a'"),
        (file_of({"a": tensor(0, 4, shape=[-2, -2])}, bytes(4)), "'a'"),
        (file_of({"a": tensor(0, 4, shape=[1], dtype="F64")}, bytes(4)), "'a'"),
        (file_of({"a": tensor(-4, 0)}, bytes(4)), "'a'"),
        (file_of({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6)), "'b' overlaps"),
        (file_of({"a": tensor(0, 4), "b": tensor(6, 8)}, bytes(8)), "'b' leaves a hole"),
        (file_of({"a": tensor(4, 8)}, bytes(8)), "'a' leaves a hole"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=fault) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / "w", [("a", np.ones(1, np.float32))])
    before = (tmp_path / "w").read_bytes()
    with pytest.raises(TypeError):
        write(tmp_path / "w", [("a", np.ones(1, np.float32)), ("b", np.ones(1, object))])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
