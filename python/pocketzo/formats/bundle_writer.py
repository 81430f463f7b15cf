"""Write a bundle, in the place of another one if that is wanted; nothing else is ever removed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pocketzo.errors import BundleError
from pocketzo.formats import strict_json
from pocketzo.formats.bundle import ADAPTER, DESCRIPTION, FILES, FORMAT, WEIGHTS, Bundle
from pocketzo.formats.files import copy_file, link_file, make_folder
from pocketzo.formats.safetensors import file_sha256
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

    Of a bundle with an adapter, that is written; the weights file is a hard link to that of ``base``, or a copy of it,
    with a warning, where there are no links.

    Parameters
    ----------
    base : Bundle
        The bundle to copy. It is never replaced.
    out : path-like
        The new folder.
    write_weights : callable
        Called with the path of the new file that takes the place of :attr:`Bundle.trained_path`. It must write that
        file, with the header of ``base``.
    overwrite : bool
        See :func:`check_target`.

    Raises
    ------
    BundleError
        If ``out`` may not be written, or the written file does not match the bundle.
    """
    with staged_bundle(out, overwrite=overwrite, base=base) as folder:
        trained = base.trained_path.name
        for name in FILES:
            if name not in (WEIGHTS, ADAPTER) and (base.path / name).is_file():
                copy_file(base.path / name, folder / name)
        write_weights(folder / trained)
        if trained != WEIGHTS:
            link_weights(base.weights_path, folder, out)
        Bundle.read(folder)


def link_weights(weights: Path, folder: Path, out: str | os.PathLike[str]) -> None:
    """Give the weights file of another bundle a second name in a folder that becomes ``out``; warn if it is copied."""
    reason = link_file(weights, folder / WEIGHTS)
    if reason is not None:
        warnings.warn(
            f"{out}: its {WEIGHTS} is a copy of {weights}, as the system makes no hard link: {reason}", stacklevel=4
        )


def share_weights(other: Bundle, folder: Path, out: str | os.PathLike[str]) -> None:
    """Put a hard link to another bundle's weights file in the place of that in a folder that becomes ``out``.

    Raises
    ------
    BundleError
        They are other weights.
    """
    if file_sha256(other.weights_path) != file_sha256(folder / WEIGHTS):
        raise BundleError(
            f"{other.weights_path}: other weights than those of this model: prepared from another export, in another "
            "type, for another kind of task, or trained; leave out share_base, or name another bundle"
        )
    (folder / WEIGHTS).unlink()
    link_weights(other.weights_path, folder, out)
