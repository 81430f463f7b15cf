"""The tests that CI may skip. ``pytest --allow-skips LEG`` fails every skip that is not listed here for the leg.

The legs are the places where `noxfile.py` runs the tests: ``host``, ``qemu`` (64-bit Arm, emulated) and ``termux``
(Termux's versions of numpy and onnxruntime, where nothing may be skipped).
"""

from __future__ import annotations

from collections.abc import Generator
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

import pytest


class Allowed(NamedTuple):
    """Tests that may be skipped."""

    tests: str  # a pattern of ids
    legs: tuple[str, ...]
    reason: str


ALLOWED = (
    Allowed("tests/test_core_alone.py::*", ("host", "qemu"), "the termux leg has the second installation"),
    Allowed("tests/test_symbols.py::test_the_extension_*", ("host", "qemu"), "the termux leg has the cross-compiler"),
    Allowed("tests/test_symbols.py::test_what_bionic_*", ("host", "qemu"), "the termux leg has the cross-compiler"),
    Allowed("tests/test_packaging.py::test_where_the_system_*", ("host", "qemu"), "the termux leg has the build tools"),
    Allowed("tests/test_packaging.py::test_on_android_*", ("host", "qemu"), "the termux leg has the build tools"),
    Allowed("tests/test_kills.py::test_nothing_is_lost_*", ("qemu",), "the test bed has no compiler"),
    # One of these two is skipped everywhere.
    Allowed("tests/test_fp16.py::test_a_weight_that_is_not_seen_*", ("host", "qemu"), "for CPUs without fp16 math"),
    Allowed("tests/test_fp16.py::test_the_session_computes_*", ("host", "qemu"), "for CPUs with fp16 math"),
)

AnyReport = TypeVar("AnyReport", pytest.TestReport, pytest.CollectReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allow-skips",
        choices=("host", "qemu", "termux"),
        metavar="LEG",
        help="fail every skip that tests/skips.py does not list for LEG: host, qemu or termux",
    )


def _checked(report: AnyReport, config: pytest.Config) -> AnyReport:
    leg = config.getoption("allow_skips")
    if leg is None or not report.skipped or hasattr(report, "wasxfail"):
        return report
    if not any(leg in allowed.legs and fnmatchcase(report.nodeid, allowed.tests) for allowed in ALLOWED):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: tests/skips.py does not list this for {leg}: {reason}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _checked((yield), item.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _checked((yield), collector.config)
