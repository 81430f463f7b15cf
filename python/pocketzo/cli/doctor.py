"""``pocketzo doctor``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import print_facts, say, size_text
from pocketzo.cli.options import json_option
from pocketzo.doctor import examine
from pocketzo.errors import Error


@click.command(cls=Command)
@json_option
def doctor(as_json: bool) -> None:
    """Describe this machine and this installation, and test the kernels and packages; exit code 1 if one fails.

    \b
    Example:
      pocketzo doctor --json
    """
    facts = examine()
    if as_json:
        say(json.dumps(facts))
    else:
        print_facts(_doctor_lines(facts))
    if facts["broken"]:
        bad = "; ".join(f"{name}: {reason}" for name, reason in facts["broken"].items())
        names = " ".join(facts["broken"])
        raise Error(f"installed but cannot be imported: {bad}; pip install --force-reinstall {names}")
    if not facts["ok"]:
        bad = ", ".join(
            f"{isa} ({'; '.join(test['failed'])})" for isa, test in facts["self_test"].items() if not test["ok"]
        )
        raise Error(f"the kernels failed their self-test: {bad}; force another set with POCKETZO_ISA, and report this")


def _doctor_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    memory, cores = facts["memory"], facts["cores"]
    fast = f"{cores['fast']} of them fast, " if cores["fast"] < cores["usable"] else ""
    total, available = (None if memory[name] is None else size_text(memory[name]) for name in ("total", "available"))
    system = facts["platform"] + (" (Termux)" if facts["termux"] else " (Android)" if facts["android"] else "")
    extras = {
        extra: ", ".join(
            f"{name} {version or 'missing'}{' BROKEN' * (name in facts['broken'])}"
            for name, version in packages.items()
        )
        + ("" if all(packages.values()) else f" (pip install 'pocketzo[{extra}]')")
        for extra, packages in facts["extras"].items()
    }
    tests = ", ".join(f"{isa} {'passed' if test['ok'] else 'FAILED'}" for isa, test in facts["self_test"].items())
    return {
        "pocketzo": f"{facts['pocketzo']}, noise specification {facts['spec']}",
        "system": system,
        "versions": f"python {facts['python']}, numpy {facts['numpy']}, onnxruntime {facts['onnxruntime']}",
        **{f"extra {extra}": text for extra, text in extras.items()},
        "cores": f"{cores['usable']} to use, {fast}{cores['present']} present; {facts['threads']} used by the kernels",
        "memory": f"{total or 'unknown'} in all, {available or 'unknown'} available",
        "weights": facts["prepacking"],
        "fp16": "fast: this CPU has fp16 arithmetic" if facts["fp16"] else "slow: this CPU has no fp16 arithmetic",
        "instruction set": f"{facts['isa']} in use; available: {', '.join(facts['available'])}",
        "self-test": tests,
        **{
            f"speed, {direction}": ", ".join(f"{ns:.2f} ns a weight ({threads})" for threads, ns in times.items())
            for direction, times in facts["speed"].items()
        },
        "speed, products": "unknown: the Python package protobuf is not installed"
        if facts["products"] is None
        else f"{facts['products']['multiply_adds_per_second'] / 1e9:.1f} G multiply-adds a second",
    }
