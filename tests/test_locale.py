"""Names and texts beyond ASCII, in the C locale without Python's UTF-8 mode, and file names that are not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_tiny_onnx
from described import write_tokenizer

import pocketzo as pz
from pocketzo.machine.paths import local_path, portable_path

pytest.importorskip("click", reason="the command line needs it")
pytest.importorskip("rich", reason="the command line needs it")

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LABELS = "n\u00f6,j\u00e4,\u65e5"


def pocketzo(folder: Path, *words: str, **environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pocketzo", *words],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"} | environment,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("locale") / "\u00e9t\u00e9 \u65e5"
    folder.mkdir()
    write_tiny_onnx(folder / "m\u00f6del.onnx")
    write_tokenizer(folder / "tokenizer.json")
    (folder / "dat\u00e9n.csv").write_text("t\u00e9xt;label\na film;n\u00f6\nb;j\u00e4\n", encoding="utf-8")
    return folder


@pytest.mark.skipif(os.name != "posix", reason="locales of POSIX")
def test_every_command_in_the_c_locale(folder: Path) -> None:
    there = os.fspath(folder)
    bundle, data, run = f"{there}/b\u00fcndel", f"{there}/dat\u00e9n.csv", f"{there}/l\u00e4uf"
    columns = "--text-column", "t\u00e9xt", "--delimiter", ";"
    for dtype in ("float16", "float32"):
        options = "--tokenizer", f"{there}/tokenizer.json", "--labels", LABELS, "--dtype", dtype, "--force"
        pocketzo(folder.parent, "prepare", f"{there}/m\u00f6del.onnx", "-o", bundle, *options, **C_LOCALE)
    training = "train", bundle, "--data", data, "--eval", data, "-o", run, "--steps", "2", "--batch-size", "2", *columns
    out, error = pocketzo(folder.parent, *training, **C_LOCALE)
    assert f"{run}: 2 steps" in out
    assert " \u00b7 loss " in error
    pocketzo(folder.parent, "train", "--resume", run, **C_LOCALE)
    pocketzo(folder.parent, "replay", run, "-o", f"{there}/tun\u00e9", **C_LOCALE)
    assert LABELS.replace(",", ", ") in pocketzo(folder.parent, "info", f"{there}/tun\u00e9", **C_LOCALE)[0]
    words = "eval", f"{there}/tun\u00e9", "--data", data, *columns
    assert pocketzo(folder.parent, *words, **C_LOCALE) == pocketzo(folder.parent, *words, PYTHONUTF8="1")
    assert "2 examples" in pocketzo(folder.parent, "eval", run, "--data", data, *columns, PYTHONUTF8="1")[0]


@pytest.mark.skipif(os.name != "posix", reason="locales of POSIX")
@pytest.mark.parametrize(("recorded", "read"), [(C_LOCALE, {"PYTHONUTF8": "1"}), ({"PYTHONUTF8": "1"}, C_LOCALE)])
def test_a_run_is_resumed_in_another_locale(
    folder: Path, tmp_path: Path, recorded: dict[str, str], read: dict[str, str]
) -> None:
    bundle, data, run = f"{tmp_path}/b\u00fcndel", f"{folder}/dat\u00e9n.csv", f"{tmp_path}/l\u00e4uf"
    options = "--tokenizer", f"{folder}/tokenizer.json", "--labels", LABELS
    pocketzo(tmp_path, "prepare", f"{folder}/m\u00f6del.onnx", "-o", bundle, *options, **recorded)
    columns = "--text-column", "t\u00e9xt", "--delimiter", ";"
    pocketzo(
        tmp_path, "train", bundle, "--data", data, "-o", run, "--steps", "2", "--batch-size", "2", *columns, **recorded
    )
    assert "all 2 steps are done" in pocketzo(tmp_path, "train", "--resume", run, **read)[1]
    pocketzo(tmp_path, "replay", run, "-o", f"{tmp_path}/tun\u00e9", **read)
    assert pz.Run(run).recipe.data.source.train == data


def test_paths_in_journals() -> None:
    for name in ("plain", "\u00e9 \u65e5", os.fsdecode(b"\xff\xe9")):
        assert local_path(portable_path(name)) == name
    assert portable_path("\u00e9") == "\u00e9"
    assert local_path("\ud800") == "\ud800"  # of a damaged journal


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
@pytest.mark.parametrize("environment", [C_LOCALE, {"PYTHONUTF8": "1"}], ids=["C", "UTF-8"])
def test_names_that_are_not_utf_8_are_refused_by_name(folder: Path, environment: dict[str, str]) -> None:
    name = os.fsdecode(os.fsencode(folder) + b"/b\xe4d.onnx")
    Path(name).write_bytes((folder / "m\u00f6del.onnx").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pocketzo", "prepare", name, "-o", name + "-bundle"],
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith(b"pocketzo: error: ")
    assert b"not UTF-8, which onnxruntime needs in paths: rename the folder" in line
