"""CI fails on a skip that is not on its list (skips.py)."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from skips import ALLOWED

TESTS = Path(__file__).parent
FILES = {
    "test_core_alone": "def test_it(): pytest.skip('why')",  # on the list, but for termux
    "test_mark": "@pytest.mark.skipif(True, reason='why')\ndef test_it(): pass",
    "test_call": "def test_it(): pytest.skip('why')",
    "test_fixture": "@pytest.fixture\ndef it(): pytest.skip('why')\ndef test_it(it): pass",
    "test_parameters": "@pytest.mark.parametrize('it', [])\ndef test_it(it): pass",
    "test_module": "pytest.importorskip('nonesuch', reason='why')\ndef test_it(): pass",
    "test_expected": "@pytest.mark.xfail(reason='why')\ndef test_it(): assert False",
    "test_passes": "def test_it(): pass",
}
NEW = {"test_mark", "test_call", "test_fixture", "test_parameters", "test_module"}


def unlisted(folder: Path, *options: str) -> set[str]:
    """Run FILES and return those that failed, each as not listed; the others pass."""
    (folder / "pytest.ini").touch()
    (folder / "tests").mkdir()
    for name, code in FILES.items():
        (folder / "tests" / f"{name}.py").write_text(f"import pytest\n{code}\n")
    command = [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "-rfEs", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    failed = set(re.findall(r"^(?:FAILED|ERROR) tests/(\w+)\.py", done.stdout, re.MULTILINE))
    assert done.returncode == bool(failed), done.stdout
    for name in failed:
        assert f"tests/{name}.py" in "".join(
            re.findall(r"^tests/.*: tests/skips.py does not list this.*$", done.stdout, re.MULTILINE)
        )
    return failed


@pytest.mark.parametrize(("leg", "more"), [("host", set()), ("qemu", set()), ("termux", {"test_core_alone"})])
def test_a_skip_that_is_not_listed_fails(tmp_path: Path, leg: str, more: set[str]) -> None:
    assert unlisted(tmp_path, "--continue-on-collection-errors", f"--allow-skips={leg}") == NEW | more


def test_it_fails_in_workers_too(tmp_path: Path) -> None:
    options = ("-p", "xdist.plugin", "-n", "1", "--allow-skips=host", "--continue-on-collection-errors")
    assert unlisted(tmp_path, *options) == NEW


def test_without_the_option_anything_may_be_skipped(tmp_path: Path) -> None:
    assert unlisted(tmp_path) == set()


@pytest.mark.parametrize("pattern", [allowed.tests for allowed in ALLOWED])
def test_what_is_listed_exists(pattern: str) -> None:
    file = pattern.partition("::")[0]
    tests = [
        node.name for node in ast.parse((TESTS.parent / file).read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert any(fnmatchcase(f"{file}::{name}", pattern) for name in tests)
