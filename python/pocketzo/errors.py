"""Exceptions that PocketZO raises besides ``ValueError`` and ``TypeError``."""

from __future__ import annotations


class Error(Exception):
    """Base class of PocketZO's own errors."""


class BundleError(Error):
    """A bundle is incomplete or damaged, or a model cannot be prepared as one."""


class DeadWeightError(Error):
    """A trainable weight is not live: writes to it do not reach the session."""


class DataError(Error):
    """A file of examples cannot be used."""


class JournalError(Error):
    """A run's journal is damaged, or belongs to another model, other data or other settings."""


class TrainingError(Error):
    """Training cannot continue."""


class FederationError(Error):
    """A message of a federation is malformed, or contradicts what was agreed on; nothing was changed by it."""


class MemoryLimitError(Error):
    """The memory limit would be exceeded."""


class MissingExtraError(Error, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}, which is not installed: pip install 'pocketzo[{extra}]'")


class BrokenPackageError(Error, ImportError):
    """A package cannot be imported though it is installed, or a required one is not installed.

    Attributes
    ----------
    reason : str
        The error of the import in one line.
    """

    def __init__(self, package: str, version: str | None, reason: str | None) -> None:
        self.reason = reason or "not installed"
        if reason is None:
            text = f"the package {package!r} is not installed: pip install {package}"
        else:
            text = (
                f"the package {package!r} {version or ''} is installed but cannot be imported ({reason}): "
                f"pip install --force-reinstall {package}; 'pocketzo doctor' checks all packages"
            )
        super().__init__(text.replace("  ", " "))


class NotPrepackableError(Error):
    """Prepacked weights cannot be live on this system; the plain layout is used instead."""


class NotCuttableError(Error):
    """What is computed before the first trained tensor cannot be kept, or there is nothing; says why."""


class CacheError(Error):
    """A segment of an activation cache is damaged, or a value cannot be kept in one."""


class NothingToPrepackError(NotPrepackableError):
    """No weight has a layout that would make the graph faster."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def joined_lines(error: BaseException) -> str:
    """Return an exception's message, its lines joined, or its type: a message that quotes it stays one line."""
    return " ".join(str(error).split()) or type(error).__name__
