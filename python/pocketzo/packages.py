"""The packages that PocketZO needs, and whether they can be imported.

This module imports no other package, so that it works where they are broken.
"""

from __future__ import annotations

import importlib
import json
import platform
from importlib import metadata
from typing import Any, Final

from pocketzo.errors import BrokenPackageError, Error, MissingExtraError

CORE: Final = ("numpy", "onnxruntime")
EXTRAS: Final = {
    "cli": ("click", "rich"),
    "text": ("tokenizers", "jinja2"),
    "prepare": ("onnx", "onnx-ir"),
    "plot": ("matplotlib",),
    "demo": ("scikit-learn",),
    "export": ("torch", "transformers", "accelerate", "gguf", "mobius-onnx", "onnxscript"),
    "federated": ("flwr", "dp-accounting"),
    "pipeline": ("ray",),
}
"""The packages of each extra."""
_MODULES: Final = {
    "dp-accounting": "dp_accounting",
    "onnx-ir": "onnx_ir",
    "mobius-onnx": "mobius",
    "scikit-learn": "sklearn",
    "pocketzo": "pocketzo._core",
}
_broken: dict[str, BrokenPackageError] = {}
_LONGEST: Final = 300  # characters of a reason


def version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def problem(package: str) -> Error | None:
    """Import a package, and return the error to raise if that fails."""
    if package in _broken:  # the import of half a package fails for another reason the second time
        return _broken[package]
    module = _MODULES.get(package, package)
    try:
        importlib.import_module(module)
    except Exception as error:  # a damaged package may raise anything: OSError, AttributeError, SystemError
        if isinstance(error, ModuleNotFoundError) and error.name == module and package != "pocketzo":
            extra = next((extra for extra, names in EXTRAS.items() if package in names), None)
            return BrokenPackageError(package, None, None) if extra is None else MissingExtraError(package, extra)
        _broken[package] = BrokenPackageError(package, version(package), _reason(error))
        _broken[package].__cause__ = error
        return _broken[package]
    return None


def require(*packages: str) -> None:
    """Import packages.

    Raises
    ------
    MissingExtraError
        One is not installed.
    BrokenPackageError
        One is installed and cannot be imported.
    """
    for package in packages:
        if (error := problem(package)) is not None:
            raise error


def core_problem() -> Error | None:
    """Return the error that keeps the whole package from working, or None."""
    return next((error for error in map(problem, (*CORE, "pocketzo")) if error is not None), None)


def broken() -> dict[str, str]:
    """Return why each package that is installed cannot be imported; numpy alone if that fails: most others need it."""
    if isinstance(error := problem("numpy"), BrokenPackageError):
        return {"numpy": error.reason}
    names = (*CORE, "pocketzo", *(name for extra in EXTRAS.values() for name in extra))
    found = {name: problem(name) for name in names}
    return {name: error.reason for name, error in found.items() if isinstance(error, BrokenPackageError)}


def report(as_json: bool) -> str:
    """Return the state of all packages as text or JSON: ``pocketzo doctor`` where a required one is broken."""
    reasons = broken()
    versions = {name: version(name) for name in (*CORE, *(name for names in EXTRAS.values() for name in names))}
    facts: dict[str, Any] = {
        "ok": False,
        "pocketzo": version("pocketzo"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "broken": reasons,
    }
    if as_json:
        return json.dumps(facts)
    lines = [f"{name}: {facts[name]}" for name in ("pocketzo", "python", "platform")]
    for name, number in versions.items():
        lines.append(f"{name}: {number or 'not installed'}" + (f", BROKEN: {reasons[name]}" if name in reasons else ""))
    return "\n".join([*lines, "The kernels were not tested."])


def _reason(error: BaseException) -> str:
    """Return the first cause of a failed import in one line: numpy hides it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
