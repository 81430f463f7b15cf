"""The errors that PocketZO raises beside ``ValueError`` and ``TypeError``."""

from __future__ import annotations


class Error(Exception):
    """Base class of PocketZO's own errors."""


class BundleError(Error):
    """A bundle is incomplete, damaged or not what it says, or a model cannot be made into one."""


class DeadWeightError(Error):
    """A trainable weight is not live: the session does not see what is written to it."""


class DataError(Error):
    """A file of examples cannot be used."""


class JournalError(Error):
    """A run's record is damaged or does not belong to what it is used with."""


class TrainingError(Error):
    """Training cannot go on."""


class MemoryLimitError(Error):
    """What was to be done would have taken more memory than it may."""


class MissingExtraError(Error, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}, which is not installed: pip install 'pocketzo[{extra}]'")


class NotPrepackableError(Exception):
    """Why weights cannot be packed and live here."""
