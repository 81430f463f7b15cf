"""What is installed: dependencies, extras, the light core, and the choice of an instruction set at import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pocketzo as pz

TESTS = Path(__file__).parent
ROOT = TESTS.parent
OPTIONAL = (
    "click",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "rich",
    "safetensors",
    "sklearn",
    "tokenizers",
    "torch",
    "transformers",
)


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
    assert extras == {"cli", "text", "prepare", "plot", "demo", "export", "federated", "pipeline"}
    for r in requirements:
        assert r.marker is None or "extra ==" in str(r.marker)


def test_a_build_without_isolation_has_what_the_build_requires() -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(described["build-system"]["requires"]) <= set(described["dependency-groups"]["build"])


def test_metadata_says_what_the_package_says() -> None:
    assert metadata.version("pocketzo") == pz.__version__
    described = metadata.metadata("pocketzo")
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == ">=3.11"
    assert (resources.files(pz) / "py.typed").is_file()
    (command,) = metadata.entry_points(group="console_scripts", name="pocketzo")
    assert callable(command.load())


def test_the_core_imports_without_the_optional_libraries() -> None:
    done = without_optional_modules("import pocketzo as pz; print(len(pz.kernels.noise(3, seed=0, tensor=0, draw=0)))")
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


# ---- Termux ----------------------------------------------------------------------------------------------------------

TERMUX = dict(re.findall(r"^(\w+)==(.*)$", (TESTS / "termux.txt").read_text(), re.MULTILINE))


def test_termux_has_what_is_needed() -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # pip would compile cmake, ninja and numpy on a phone: scikit-build-core takes the system's programs.
    built_by = {Requirement(text).name for text in described["build-system"]["requires"]}
    assert built_by == {"scikit-build-core", "pybind11"}
    assert SpecifierSet(described["project"]["requires-python"]).contains("3.14.6")
    needed = {r.name: r.specifier for r in map(Requirement, described["project"]["dependencies"])}
    assert {name: specifier.contains(TERMUX[name]) for name, specifier in needed.items()} == dict.fromkeys(needed, True)
    for extra in ("cli", "text", "plot"):  # what is of use on a phone
        assert "onnx" not in {Requirement(text).name for text in described["project"]["optional-dependencies"][extra]}


CONFIGURES = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
CONFIGURES += [name for name in ("pybind11", "scikit_build_core") if find_spec(name) is None]
configures = pytest.mark.skipif(bool(CONFIGURES), reason=f"not installed, and needed to configure: {CONFIGURES}")


@configures
def test_where_the_system_has_cmake_and_ninja_the_build_requires_neither() -> None:
    code = (
        "import sys; sys.modules.update(cmake=None, ninja=None)  # the system's programs, not those of PyPI's packages"
    )
    code += "\nfrom scikit_build_core import build; print(build.get_requires_for_build_wheel())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# CMake as it is in Termux: on Android and for it, with Clang. The compiler is only named, as nothing is compiled.
ANDROID = """
set(CMAKE_SYSTEM_NAME Android)
set(CMAKE_SYSTEM_VERSION 24)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_HOST_SYSTEM_NAME Android)
set(CMAKE_CXX_COMPILER_FORCED TRUE)
set(CMAKE_CXX_COMPILER_ID_RUN TRUE)
set(CMAKE_CXX_COMPILER_ID Clang)
set(CMAKE_CXX_COMPILER_VERSION 21)
set(CMAKE_CXX_STANDARD_COMPUTED_DEFAULT 17)
set(CMAKE_CXX20_COMPILE_FEATURES cxx_std_20)
set(CMAKE_CXX_COMPILE_FEATURES
    cxx_std_11 cxx_std_14 cxx_std_17 cxx_std_20 cxx_inheriting_constructors cxx_user_literals cxx_right_angle_brackets)
set(CMAKE_HAVE_LIBC_PTHREAD TRUE)
set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF)
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
"""


@configures
@pytest.mark.parametrize("android", [True, False])
def test_on_android_the_extension_links_libpython(tmp_path: Path, android: bool) -> None:
    (tmp_path / "android.cmake").write_text(ANDROID)
    options = {"POCKETZO_BUILD_PYTHON": "ON", "Python_EXECUTABLE": sys.executable, "CMAKE_MAKE_PROGRAM": "ninja"}
    options["pybind11_DIR"] = subprocess.check_output(
        [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
    ).strip()
    if android:
        options["CMAKE_TOOLCHAIN_FILE"] = str(tmp_path / "android.cmake")
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build")]
    command += [f"-D{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "build" / "build.ninja").read_text()
    (linked,) = [
        line for line in rules.splitlines() if line.strip().startswith("LINK_LIBRARIES") and "pocketzo_kernels" in line
    ]
    assert ("libpython3" in linked) == android
    assert ("neon.cpp" in rules) == (android or os.uname().machine == "aarch64")
