"""Runs the command line in forks of this process, which has imported all of it. Started by ``lives.py``."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from typing import Any


def _live(job: dict[str, Any], main: Any) -> int:
    for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    record = os.open(job["record"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if job["record"] else -1
    begin = ctypes.CDLL(None).faults_begin
    begin.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_long,
        ctypes.c_double,
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_int,
    ]
    begin(os.fsencode(job["root"]), record, job["kill_at"], job["part"], job["room"], job["error"], job["swaps"])
    sys.argv[1:] = job["words"]
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def serve() -> None:
    """Read jobs, a line each; answer with the exit code and the seconds of each."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import onnx_ir  # noqa: F401

    from pocketzo.__main__ import main
    from pocketzo.cli import app  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        if not (child := os.fork()):
            code = _live(job, main)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # without the ends of libraries, which wait for threads that a fork does not have
        if job["delay"] is not None:
            time.sleep(job["delay"])
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([code, time.monotonic() - started]), flush=True)


if __name__ == "__main__":
    serve()
