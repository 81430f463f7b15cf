"""The command line in processes forked from one that has imported all of it.

Under emulation a new one takes 4 seconds before it looks at its arguments.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory


@functools.cache
def _parent() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(arguments: Sequence[str], cwd: Path | None, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run ``python -m pocketzo`` with these arguments, as ``subprocess.run`` with captured output does."""
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        job = [arguments, os.fspath(cwd or Path.cwd()), environment, *map(os.fspath, files)]
        print(json.dumps(job), file=parent.stdin, flush=True)
        code = int(parent.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


def _serve() -> None:
    import onnx  # noqa: F401  what commands import when they need it
    import tokenizers  # noqa: F401

    from pocketzo import __main__

    for line in sys.stdin:
        arguments, cwd, environment, *files = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for number, (path, flags) in enumerate(
            [(os.devnull, os.O_RDONLY), *((file, os.O_WRONLY | os.O_CREAT) for file in files)]
        ):
            os.dup2(os.open(path, flags), number)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = arguments
        code = 0
        try:
            __main__.main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)  # without the ends of libraries, which wait for threads that a fork does not have


if __name__ == "__main__":
    _serve()
