"""Write a bundle, in the place of another one if that is wanted; nothing else is ever removed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pocketzo.errors import BundleError
from pocketzo.formats import strict_json
from pocketzo.formats.bundle import DESCRIPTION, FILES, FORMAT, WEIGHTS, Bundle
from pocketzo.formats.files import copy_file, make_folder
from pocketzo.formats.staging import foreign, staged_folder


def check_target(out: str | os.PathLike[str], *, overwrite: bool, base: Bundle | None = None) -> None:
    """Refuse to write a bundle where something would be lost.

    Parameters
    ----------
    out : path-like
        Where the bundle is to be written.
    overwrite : bool
        Whether a bundle there may be replaced. A folder that holds anything besides a bundle's files is never replaced.
    base : Bundle, optional
        The bundle that is to be copied. It is never replaced: runs that began with it need its weights.

    Raises
    ------
    BundleError
        If ``out`` exists and may not be replaced.
    """
    out = Path(out)
    try:
        out.lstat()
    except (FileNotFoundError, NotADirectoryError):  # other errors, such as a name that is too long, reach the caller
        return
    if base is not None and out.exists() and out.samefile(base.path):
        raise BundleError(
            f"{out}: is the base of these weights, without which no run that began there can be resumed or replayed; "
            "choose another folder"
        )
    if not _is_bundle(out):
        raise BundleError(f"{out}: already exists and is not a bundle; choose another folder")
    if not overwrite:
        raise BundleError(f"{out}: already exists; choose another folder, or replace the bundle with overwrite=True")
    if others := foreign(out, FILES):
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise BundleError(
            f"{out}: holds more than the files of a bundle: {names}; move that away or choose another folder"
        )


def _is_bundle(path: Path) -> bool:
    """Whether a folder's description says that it is a bundle, though perhaps of another version or damaged."""
    try:
        return strict_json.parse((path / DESCRIPTION).read_bytes()).get("format") == FORMAT
    except (OSError, ValueError):
        return False


@contextmanager
def staged_bundle(out: str | os.PathLike[str], *, overwrite: bool, base: Bundle | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that becomes ``out`` when the block ends without an error.

    ``out`` is the old bundle or the complete new one at every moment. See :func:`check_target` for what is refused,
    before anything is written and again at the end.
    """
    check_target(out, overwrite=overwrite, base=base)
    target = Path(out).resolve()
    make_folder(target.parent)
    with staged_folder(target, FILES, replace=overwrite) as folder:
        yield folder
        check_target(out, overwrite=overwrite, base=base)


def copy_bundle(
    base: Bundle, out: str | os.PathLike[str], write_weights: Callable[[Path], None], *, overwrite: bool = False
) -> None:
    """Write a copy of a bundle with other weights.

    Parameters
    ----------
    base : Bundle
        The bundle to copy. It is never replaced.
    out : path-like
        The new folder.
    write_weights : callable
        Called with the path of the new ``weights.safetensors``. It must write that file, with the header of ``base``.
    overwrite : bool
        See :func:`check_target`.

    Raises
    ------
    BundleError
        If ``out`` may not be written, or the written file does not match the bundle.
    """
    with staged_bundle(out, overwrite=overwrite, base=base) as folder:
        for name in FILES:
            if name != WEIGHTS and (base.path / name).is_file():
                copy_file(base.path / name, folder / name)
        write_weights(folder / WEIGHTS)
        Bundle.read(folder)
