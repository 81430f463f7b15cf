"""The folder that ``flwr run`` takes: Flower builds it into a bundle, which it sends to its nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pocketzo._core import __version__
from pocketzo.arguments import check_integer, check_number
from pocketzo.formats.files import make_folder
from pocketzo.formats.staging import staged_file

_PROJECT: Final = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "{description}"
license = "Apache-2.0"
dependencies = ["flwr>=1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "pocketzo"

[tool.flwr.app.components]
serverapp = "{module}:server_app"
clientapp = "{module}:client_app"

[tool.flwr.app.config]
{config}
"""
_MODULE: Final = '''\
"""Both apps are part of PocketZO, which every node has."""

from pocketzo.federated.flower import client_app, server_app

__all__ = ["client_app", "server_app"]
'''


def project_of(name: str, description: str, module: str, config: Mapping[str, str | int | float]) -> str:
    """Return the ``pyproject.toml`` of an app of Flower, of which a module has ``server_app`` and ``client_app``."""
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    return _PROJECT.format(name=name, version=__version__, description=description, module=module, config=lines)


def write_app(run: Path, *, round_seconds: float, least_clients: int, clients: int | None = None) -> Path:
    """Write the folder ``app`` into that of a server's run, and return its path.

    Parameters
    ----------
    run : Path
    round_seconds, least_clients, clients
        See :func:`pocketzo.federated.rounds.run_rounds`.
    """
    check_number("round_seconds", round_seconds, positive=True)
    check_integer("least_clients", least_clients, 1)
    if clients is not None:
        check_integer("clients", clients, 1)
    app = run / "app"
    make_folder(app)
    project = project_of(
        "pocketzo-federation",
        "Runs the rounds of a PocketZO federation.",
        "pocketzo_app",
        {
            "run": str(run.resolve()),
            "round-seconds": float(round_seconds),
            "least-clients": least_clients,
            "clients": clients or 0,  # TOML has no null
        },
    )
    for name, text in (("pyproject.toml", project), ("pocketzo_app.py", _MODULE)):
        with staged_file(app / name) as file:
            file.write(text.encode())
    return app
