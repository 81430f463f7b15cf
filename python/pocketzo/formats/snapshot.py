"""A snapshot: the weights and the optimizer's state after a step, so that a resumed run replays only what follows.

A snapshot is a folder ``step-00000100`` with

=======================  ============================================================================================
``weights.safetensors``  the weights, in the layout of the bundle's file
``state.safetensors``    the method's state from step to step; missing for methods that have none
``snapshot.json``        the step, the run (SHA-256 of the journal's header) and the SHA-256 of the other files
=======================  ============================================================================================

It is written beside and renamed, so that a killed process leaves a whole snapshot or none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import BundleError, JournalError
from pocketzo.formats.files import atomic_file
from pocketzo.formats.safetensors import DTYPES, file_sha256, read_header, write

FORMAT: Final = "pocketzo-snapshot"
VERSION: Final = 1

_WEIGHTS: Final = "weights.safetensors"
_STATE: Final = "state.safetensors"
_DESCRIPTION: Final = "snapshot.json"


def write_snapshot(
    folder: Path, step: int, run: str, write_weights: Callable[[Path], None], state: Mapping[str, NDArray[Any]]
) -> Path:
    """Write the snapshot of a step into the folder of a run's snapshots, and remove those that were there.

    Parameters
    ----------
    folder : Path
        Made if it is missing.
    step : int
        Steps taken.
    run : str
        SHA-256 of the journal's header.
    write_weights : callable
        Gets the path to write the weights to.
    state : mapping of str to ndarray
        The method's own; may be empty.
    """
    final = folder / f"step-{step:08d}"
    beside = folder / f".{final.name}.{os.getpid()}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write_weights(beside / _WEIGHTS)
        if state:
            write(beside / _STATE, state.items())
        files = {path.name: file_sha256(path) for path in sorted(beside.iterdir())}
        described = {"format": FORMAT, "version": VERSION, "step": step, "run": run, "files": files}
        with atomic_file(beside / _DESCRIPTION) as file:
            file.write(json.dumps(described).encode())
        old = [path for path in folder.glob("step-*") if path != final]
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return final


def snapshots(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the snapshots in a folder by number of steps, the latest first."""
    found = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in folder.glob("step-*"))
    yield from sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def check_snapshot(path: Path, step: int, run: str) -> tuple[Path, dict[str, NDArray[Any]]]:
    """Check every byte of a snapshot; return the path of its weights, and its state.

    Raises
    ------
    JournalError
        The snapshot is incomplete, damaged, or of another run; names the file and the reason.
    """
    try:
        described = json.loads((path / _DESCRIPTION).read_bytes())
        expected = {"format": FORMAT, "version": VERSION, "step": step, "run": run}
        for key, value in expected.items():
            if described[key] != value:
                raise JournalError(f"{path / _DESCRIPTION}: {key} is {described[key]!r}, expected {value!r}")
        files = described["files"]
        if not {_WEIGHTS} <= set(files) <= {_WEIGHTS, _STATE}:
            raise JournalError(f"{path / _DESCRIPTION}: names the files {', '.join(files)}")
        for name, sha256 in files.items():
            got = file_sha256(path / name)
            if got != sha256:
                raise JournalError(f"{path / name}: damaged: SHA-256 is {got}, expected {sha256}")
        return path / _WEIGHTS, _read_state(path / _STATE) if _STATE in files else {}
    except (OSError, ValueError, KeyError, TypeError, BundleError) as error:
        raise JournalError(f"{path}: incomplete or damaged: {error}") from None


def _read_state(path: Path) -> dict[str, NDArray[Any]]:
    data = path.read_bytes()
    return {
        name: np.frombuffer(data[entry.start : entry.stop], DTYPES[entry.dtype]).reshape(entry.shape).copy()
        for name, entry in read_header(path).items()
    }
