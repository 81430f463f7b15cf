"""What is installed: dependencies, extras, the light core, and the choice of an instruction set at import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata, resources

import pytest
from packaging.requirements import Requirement

import pocketzo as pz

OPTIONAL = ("click", "matplotlib", "onnx", "rich", "safetensors", "tokenizers", "torch", "transformers")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "POCKETZO_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code], env=env | environment, capture_output=True, text=True, timeout=120, check=False
    )


def without_optional_modules(code: str) -> subprocess.CompletedProcess[str]:
    return run_python(f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n{code}")


def test_the_core_depends_on_numpy_and_onnxruntime_alone() -> None:
    requirements = [Requirement(text) for text in metadata.requires("pocketzo") or []]
    assert {r.name for r in requirements if r.marker is None} == {"numpy", "onnxruntime"}
    extras = set(metadata.metadata("pocketzo").get_all("Provides-Extra") or [])
    assert extras >= {"cli", "text", "prepare", "plot", "demo", "test", "bench"}
    for r in requirements:
        assert r.marker is None or "extra ==" in str(r.marker)


def test_metadata_says_what_the_package_says() -> None:
    assert metadata.version("pocketzo") == pz.__version__
    described = metadata.metadata("pocketzo")
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == ">=3.11"
    assert (resources.files(pz) / "py.typed").is_file()
    (command,) = metadata.entry_points(group="console_scripts", name="pocketzo")
    assert callable(command.load())


def test_the_core_imports_without_the_optional_libraries() -> None:
    done = without_optional_modules("import pocketzo as pz; print(len(pz.kernels.normal(3, seed=0, tensor=0, draw=0)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"


def test_importing_the_package_loads_no_optional_library() -> None:
    done = run_python(f"import sys, pocketzo; print([name for name in {OPTIONAL} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_a_missing_extra_is_named() -> None:
    done = without_optional_modules(
        "import pocketzo as pz\n"
        "try: pz.prepare('model.onnx', 'bundle')\n"
        "except pz.MissingExtraError as error: print(isinstance(error, (pz.Error, ImportError)), error)"
    )
    assert done.stdout.startswith("True "), done.stderr
    assert "pip install 'pocketzo[prepare]'" in done.stdout


@pytest.mark.parametrize("name", pz.kernels.available())
def test_pocketzo_isa_forces_a_set(name: str) -> None:
    done = run_python("import pocketzo as pz; print(pz.kernels.isa())", POCKETZO_ISA=name)
    assert done.stdout == f"{name}\n", done.stderr


def test_without_pocketzo_isa_the_best_set_is_in_use() -> None:
    for environment in ({}, {"POCKETZO_ISA": ""}):
        done = run_python("import pocketzo as pz; print(pz.kernels.isa())", **environment)
        assert done.stdout == f"{pz.kernels.available()[0]}\n", done.stderr


@pytest.mark.parametrize("name", ["mmx", "Scalar", "neon" if "neon" not in pz.kernels.available() else "avx2"])
def test_a_pocketzo_isa_that_cannot_run_here_is_an_error(name: str) -> None:
    done = run_python("import pocketzo", POCKETZO_ISA=name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: POCKETZO_ISA: instruction set '{name}' is unknown, or ")
    assert last.endswith(f"there is: {', '.join(pz.kernels.available())}")
