"""The folders that a demo writes into one folder, and replaces the next time."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from pocketzo.errors import Error
from pocketzo.formats.staging import foreign, is_staged, remove_folder


def refuse_foreign(output: Path, folders: Mapping[str, Collection[str]]) -> None:
    """Refuse a place that holds something that an earlier demo did not write.

    Parameters
    ----------
    output : Path
    folders : mapping of str to collection of str
        The folders that the demo writes there, and the files in them.

    Raises
    ------
    Error
        With the first thing that was found.
    """
    if not os.path.lexists(output):
        return
    others = [output]
    if output.is_dir():
        others = [path for path in output.iterdir() if path.name not in folders and not is_staged(path.name)]
        for name, own in folders.items():
            if (folder := output / name).is_dir():
                others += [folder / name for name in foreign(folder, own)]
            elif os.path.lexists(folder):
                others.append(folder)
    if others:
        raise Error(
            f"{output}: holds something else than an earlier demo: {others[0]}; choose another folder with --output"
        )


def remove_earlier(output: Path, folders: Mapping[str, Collection[str]]) -> None:
    """Remove what an earlier demo has left, and make the folder."""
    output.mkdir(parents=True, exist_ok=True)
    for folder, own in folders.items():
        remove_folder(output / folder, own)
