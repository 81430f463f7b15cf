"""A snapshot: weights and optimizer state after a step. A resumed run replays only the journal entries after it.

A snapshot is a folder ``step-00000100`` with

=======================  ============================================================================================
``weights.safetensors``  the weights, in the layout of the bundle's file
``state.safetensors``    the optimizer's state; missing for methods without state
``snapshot.json``        the position in the journal, and the SHA-256 of the other files
=======================  ============================================================================================

It is written under a temporary name and renamed: a killed process leaves the previous snapshot or the complete new one.
``docs/formats.md`` specifies this for readers in other languages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import BundleError, JournalError
from pocketzo.formats import strict_json
from pocketzo.formats.files import make_folder, write_file
from pocketzo.formats.journal import Position
from pocketzo.formats.safetensors import DTYPES, file_sha256, read_header, write
from pocketzo.formats.staging import remove_folder, staged_folder, sweep

FORMAT: Final = "pocketzo-snapshot"
VERSION: Final = 1

_WEIGHTS: Final = "weights.safetensors"
_STATE: Final = "state.safetensors"
_DESCRIPTION: Final = "snapshot.json"
_FILES: Final = (_DESCRIPTION, _WEIGHTS, _STATE)


def write_snapshot(
    folder: Path, position: Position, write_weights: Callable[[Path], None], state: Mapping[str, NDArray[Any]]
) -> Path:
    """Write a snapshot into a run's snapshot folder, and remove all others.

    A complete snapshot exists at every moment, the old one or the new one, on storage too. The journal must be on
    storage up to the position.

    Parameters
    ----------
    folder : Path
        The snapshot folder; created if it is missing.
    position : Position
        The position of the weights in the run's journal.
    write_weights : callable
        Called with the path of the weights file to write.
    state : mapping of str to ndarray
        The optimizer's state; may be empty.

    Returns
    -------
    Path
        The snapshot's folder.
    """
    final = folder / f"step-{position.step:08d}"
    if not _is_whole(final, position):  # else it is missing, damaged, or of entries that the journal has lost
        make_folder(folder)
        with staged_folder(final, _FILES, replace=True) as beside:
            write_weights(beside / _WEIGHTS)
            if state:
                write(beside / _STATE, state.items())
            files = {path.name: file_sha256(path) for path in sorted(beside.iterdir())}
            write_file(beside / _DESCRIPTION, strict_json.dump(_description(position) | {"files": files}))
    _keep_only(final)
    return final


def prune_snapshots(folder: Path, position: Callable[[int], Position], steps: int) -> None:
    """Remove what a writer that was killed has left: unfinished snapshots, and all but the last finished one.

    Parameters
    ----------
    folder : Path
        The snapshot folder; it need not exist.
    position : callable
        Called with a number of steps, up to ``steps``; returns the position in the journal.
    steps : int
        Number of steps in the journal.
    """
    sweep(folder, _FILES)
    for step, path in snapshots(folder):
        with suppress(JournalError):
            if step <= steps and _read_description(path / _DESCRIPTION, position(step)):
                _keep_only(path)
                return


def _keep_only(kept: Path) -> None:
    sweep(kept.parent, _FILES)
    for _, path in list(snapshots(kept.parent)):
        if path != kept:
            remove_folder(path, _FILES)


def _is_whole(path: Path, position: Position) -> bool:
    """Return whether a complete snapshot exists: a run that lost the end of its journal reaches a position again."""
    try:
        check_snapshot(path, position)
    except JournalError:
        return False
    return True


def snapshots(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the snapshots in a folder by number of steps, the latest first."""
    found = ((re.fullmatch(r"step-([0-9]{8,})", path.name), path) for path in folder.glob("step-*"))
    yield from sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def check_snapshot(path: Path, position: Position) -> tuple[Path, dict[str, NDArray[Any]]]:
    """Check every byte of a snapshot; return the path of its weights, and its state.

    Raises
    ------
    JournalError
        The snapshot is incomplete, damaged, or of another position. The message names the file and the reason.
    """
    files = _read_description(path / _DESCRIPTION, position)
    for name, sha256 in files.items():
        try:
            got = file_sha256(path / name)
        except OSError as error:
            raise JournalError(f"{path / name}: cannot be read: {error.strerror}") from None
        if got != sha256:
            raise JournalError(f"{path / name}: damaged: SHA-256 is {got}, expected {sha256}")
    return path / _WEIGHTS, _read_state(path / _STATE) if _STATE in files else {}


def _description(position: Position) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **position._asdict()}


def _read_description(path: Path, position: Position) -> dict[str, Any]:
    """Return the SHA-256 of a snapshot's files by name."""
    try:
        described = strict_json.parse(path.read_bytes())
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise JournalError(f"{path}: damaged: {error}") from None
    for key, value in _description(position).items():
        got = described.get(key)
        if got != value or type(got) is not type(value):
            raise JournalError(f"{path}: {key} is {got!r}, expected {value!r}")
    files = described.get("files")
    if not isinstance(files, dict) or not {_WEIGHTS} <= set(files) <= {_WEIGHTS, _STATE}:
        raise JournalError(f"{path}: files is {files!r}, expected {_WEIGHTS}, perhaps {_STATE}, and no others")
    return files


def _read_state(path: Path) -> dict[str, NDArray[Any]]:
    try:
        entries, data = read_header(path), path.read_bytes()
    except BundleError as error:
        raise JournalError(str(error)) from None
    return {
        name: np.frombuffer(data[entry.start : entry.stop], DTYPES[entry.dtype]).reshape(entry.shape).copy()
        for name, entry in entries.items()
    }
