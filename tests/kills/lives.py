"""Processes of the command line that can be killed at any moment, whose disk may be full, and that are recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Life:
    """What came of a process; ``code`` is -9 if it was killed."""

    code: int
    seconds: float
    out: str
    err: str


class Lives:
    """A server that forks a process for each command; see ``faults.c`` for what may happen to it.

    Parameters
    ----------
    folder : Path
        For the compiled library, the output and, in ``tmp``, all temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        library = folder / "faults.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, HERE / "faults.c"],
            check=True,
        )
        environment = {
            **os.environ,
            "LD_PRELOAD": os.fspath(library),
            "TMPDIR": os.fspath(self.temporary),
            "COLUMNS": "400",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "kills.server"],
            cwd=HERE.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__(None, None, None)  # closes its input, at which it ends

    def run(
        self,
        words: Sequence[object],
        root: Path,
        *,
        kill_at: int = 0,
        part: float = 0.0,
        delay: float | None = None,
        room: int = -1,
        error: int = 0,
        swaps: bool = True,
        record: Path | None = None,
    ) -> Life:
        """Run a command.

        Parameters
        ----------
        words : sequence
            Its arguments.
        root : Path
            What it writes below this folder counts.
        kill_at : int
            Kill it at this request, counted from 1; of a write, the share ``part`` is written.
        delay : float, optional
            Kill it after so many seconds.
        room, error : int
            After so many bytes, writes fail with this error.
        swaps : bool
            Whether the file system exchanges names.
        record : Path, optional
            Append the requests to this file.
        """
        out, err = self._folder / "stdout", self._folder / "stderr"
        job: dict[str, Any] = {
            "words": [str(word) for word in words],
            "root": os.fspath(root),
            "kill_at": kill_at,
            "part": part,
            "delay": delay,
            "room": room,
            "error": error,
            "swaps": swaps,
            "record": record and os.fspath(record),
            "stdout": os.fspath(out),
            "stderr": os.fspath(err),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(job), file=self._server.stdin, flush=True)
        code, seconds = json.loads(self._server.stdout.readline())
        return Life(code, seconds, out.read_text(), err.read_text())
