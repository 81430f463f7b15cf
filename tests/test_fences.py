"""Which package may import which: the contracts in pyproject.toml hold, and each is seen to be broken."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import importlinter
import pytest

import pocketzo as pz

PACKAGE = Path(pz.__file__).parent
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"

BROKEN = [
    ("__init__.py", "pocketzo.cli"),
    ("cli/new.py", "transformers"),
    ("data/new.py", "flwr"),
    ("pipeline/new.py", "ray"),
    ("data/new.py", "pocketzo.optim"),
    ("data/new.py", "pocketzo.train"),
    ("demo/new.py", "pocketzo.cli"),
    ("demo/new.py", "onnx"),
    ("formats/new.py", "pocketzo.graph"),
    ("formats/new.py", "pocketzo.machine"),
    ("formats/new.py", "pocketzo.runtime"),
    ("graph/new.py", "gguf"),
    ("graph/new.py", "pocketzo.runtime"),
    ("kernels.py", "pocketzo.formats"),
    ("optim/new.py", "pocketzo.data"),
    ("pipeline/new.py", "pocketzo.federated"),
    ("train/new.py", "pocketzo.pipeline"),
    ("optim/new.py", "pocketzo.tasks"),
    ("optim/new.py", "pocketzo.train"),
    ("prepare/new.py", "torch"),
    ("runtime/new.py", "onnx"),
    ("runtime/new.py", "onnx_ir"),
    ("runtime/new.py", "pocketzo.data"),
    ("runtime/new.py", "pocketzo.graph"),
    ("runtime/new.py", "pocketzo.optim"),
    ("runtime/new.py", "pocketzo.tasks"),
    ("runtime/new.py", "pocketzo.train"),
    ("tasks/new.py", "pocketzo.optim"),
    ("tasks/new.py", "pocketzo.train"),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's source."""
    shutil.copy(PYPROJECT, tmp_path)
    return Path(shutil.copytree(PACKAGE, tmp_path / "pocketzo", ignore=shutil.ignore_patterns("__pycache__", "*.so")))


def lint(package: Path) -> tuple[int, str]:
    # Without the site module (-S) an editable installation does not take precedence over the copy.
    paths = [package.parent, Path(importlinter.__file__).parents[1]]
    done = subprocess.run(
        [sys.executable, "-S", "-c", LINT, "--no-cache", "--no-logo"],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def imports_of_the_face(package: Path) -> set[str]:
    """Return the files that import ``pocketzo`` itself, and not one of its modules by its own name."""
    modules = {path.name.partition(".")[0] for path in package.iterdir()}
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == package.name:
                face = any(name.name not in modules for name in node.names)
            else:
                face = isinstance(node, ast.Import) and any(name.name == package.name for name in node.names)
            if face:
                found.add(str(path.relative_to(package)))
    return found


def test_the_fences_stand(package: Path) -> None:
    code, output = lint(package)
    assert code == 0, output
    assert " 0 broken." in output


@pytest.mark.parametrize(("file", "imported"), BROKEN)
def test_an_import_over_a_fence_is_found(package: Path, file: str, imported: str) -> None:
    with (package / file).open("a") as source:
        source.write(f"\n\ndef late() -> None:\n    import {imported}\n")
    code, output = lint(package)
    importer = ".".join(("pocketzo", *Path(file).with_suffix("").parts)).removesuffix(".__init__")
    assert code == 1, output
    assert f"{importer} -> {imported} (l" in output


def test_a_package_without_a_place_is_found(package: Path) -> None:
    (package / "utils.py").touch()
    code, output = lint(package)
    assert code == 1
    assert "- pocketzo.utils" in output


def test_no_module_imports_the_face() -> None:
    assert imports_of_the_face(PACKAGE) == set()


@pytest.mark.parametrize(
    "line", ["import pocketzo as pz", "import os, pocketzo", "from pocketzo import Bundle, kernels"]
)
def test_an_import_of_the_face_is_found(package: Path, line: str) -> None:
    (package / "train").mkdir(exist_ok=True)
    (package / "train/new.py").write_text(f"def late() -> None:\n    {line}\n")
    before = imports_of_the_face(PACKAGE)
    assert imports_of_the_face(package) == before | {"train/new.py"}
