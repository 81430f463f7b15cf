"""Packages that are installed but cannot be imported, by fakes that come first on the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the command line needs it")
pytest.importorskip("rich", reason="the command line needs it")

LIBRARY = "libfoo.so.1: cannot open shared object file: No such file or directory"
FAULTS = {
    "library": (f"raise ImportError({LIBRARY!r})", f"ImportError: {LIBRARY}"),
    "system": (f"raise OSError({LIBRARY!r})", f"OSError: {LIBRARY}"),
    "abi": ("import sys\nsys._ARRAY_API_", "AttributeError: module 'sys' has no attribute '_ARRAY_API_'"),
    "module": ("import no_such_module_", "ModuleNotFoundError: No module named 'no_such_module_'"),
    "cause": (
        "try:\n    import no_such_module_\nexcept ImportError as error:\n"
        "    raise ImportError('IMPORTANT:\\n\\nPLEASE READ THIS ' * 99) from error",
        "ModuleNotFoundError: No module named 'no_such_module_'",
    ),
    "long": ("raise RuntimeError('two\\nlines ' * 999)", "RuntimeError: two lines two lines"),
}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def spoil(folder: Path, module: str, fault: str = "library") -> str:
    """Put a broken module first on the path, and return the reason that its import gives."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(FAULTS[fault][0] + "\n")
    return FAULTS[fault][1]


@pytest.mark.parametrize(
    ("module", "fault"), [("numpy", "cause"), ("numpy", "abi"), *(("onnxruntime", fault) for fault in FAULTS)]
)
def test_a_required_package_that_is_broken(tmp_path: Path, module: str, fault: str) -> None:
    reason = spoil(tmp_path, module, fault)
    for words in (["--help"], ["train", "bundle", "--data", "a.tsv", "-o", "run"]):
        done = run(tmp_path, "-m", "pocketzo", *words)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"pocketzo: error: the package {module!r} ")
        assert reason in line
        assert f"pip install --force-reinstall {module}; 'pocketzo doctor' checks all packages" in line
        assert len(line) < 600


@pytest.mark.parametrize("module", ["numpy", "onnxruntime"])
def test_doctor_runs_without_a_required_package(tmp_path: Path, module: str) -> None:
    reason = spoil(tmp_path, module)
    done = run(tmp_path, "-m", "pocketzo", "doctor", "--json")
    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert facts["ok"] is False
    assert facts["broken"] == {module: reason}
    assert facts["packages"][module]
    done = run(tmp_path, "-m", "pocketzo", "doctor")
    assert done.returncode == 1
    assert f", BROKEN: {reason}" in done.stdout
    (line,) = done.stderr.splitlines()
    assert reason in line


@pytest.mark.parametrize("module", ["numpy", "onnxruntime"])
def test_the_package_names_what_is_broken_at_its_first_use(tmp_path: Path, module: str) -> None:
    reason = spoil(tmp_path, module)
    for use in ("import pocketzo; pocketzo.load", "from pocketzo import kernels"):
        done = run(tmp_path, "-c", use)
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"pocketzo.errors.BrokenPackageError: the package {module!r} ")
        assert reason in last
    assert run(tmp_path, "-c", "import pocketzo; assert not hasattr(pocketzo, 'nothing')").returncode == 0


@pytest.mark.parametrize("module", ["click", "rich"])
def test_a_broken_package_of_the_command_line(tmp_path: Path, module: str) -> None:
    reason = spoil(tmp_path, module)
    done = run(tmp_path, "-m", "pocketzo", "info", "bundle")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert reason in line
    assert f"BROKEN: {reason}" in run(tmp_path, "-m", "pocketzo", "doctor").stdout


@pytest.mark.parametrize(
    ("module", "package", "code"),
    [
        ("tokenizers", "tokenizers", "pz.encode_texts(['a'], bundle())"),
        ("onnx", "onnx", "pz.prepare('m.onnx', 'out')"),
        ("onnx_ir", "onnx-ir", "pz.prepare('m.onnx', 'out')"),
        ("matplotlib", "matplotlib", "plot_run('run')"),
    ],
)
def test_an_extra_that_is_broken(tmp_path: Path, module: str, package: str, code: str) -> None:
    reason = spoil(tmp_path, module, "system")
    script = f"""
import pathlib
import pocketzo as pz
from pocketzo.formats.bundle import Bundle, TaskSpec
from pocketzo.train.plot import plot_run

def bundle():
    return Bundle(pathlib.Path("."), (), (), (), (), None, None, TaskSpec("classification"), None, "tokenizer.json",
                  "", "", "")

try:
    {code}
except pz.BrokenPackageError as error:
    print(isinstance(error, ImportError), error)
"""
    done = run(tmp_path, "-c", script)
    assert done.stdout.startswith(f"True the package {package!r} "), done.stderr
    assert reason in done.stdout
    assert f"pip install --force-reinstall {package}" in done.stdout


def test_doctor_describes_an_extra_that_is_broken_beside_everything_else(tmp_path: Path) -> None:
    reason = spoil(tmp_path, "tokenizers")
    done = run(tmp_path, "-m", "pocketzo", "doctor")
    assert done.returncode == 1
    assert " BROKEN" in done.stdout
    assert " passed" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line == (
        "pocketzo: error: installed but cannot be imported: "
        f"tokenizers: {reason}; pip install --force-reinstall tokenizers"
    )
