"""A SuperLink and SuperNodes as processes on loopback, with TLS and authentication of nodes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUICK = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    "FLWR_UPDATE_CHECK": "0",
    "OMP_NUM_THREADS": "1",
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{what} took more than {seconds:g} s")


class Counter(threading.Thread):
    """Forwards TCP connections to a port of this machine, and counts the bytes in each direction."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.up = self.down = 0
        self.start()

    def run(self) -> None:
        with self._listener:
            while True:
                try:
                    here, _ = self._listener.accept()
                except OSError:  # closed
                    return
                threading.Thread(target=self._forward, args=(here,), daemon=True).start()

    def _forward(self, here: socket.socket) -> None:
        with here, socket.create_connection(("127.0.0.1", self._to)) as there:
            back = threading.Thread(target=self._pump, args=(there, here, "down"), daemon=True)
            back.start()
            self._pump(here, there, "up")
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.join()


class Network:
    """The processes, which write their output to files of their names.

    With ``secure``, the folder has the certificates and keys that the commands of docs/federated.md make.
    """

    def __init__(self, folder: Path, *, secure: bool = True) -> None:
        self.folder = folder
        self.secure = secure
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._counters: list[Counter] = []
        folder.mkdir(parents=True, exist_ok=True)
        home = folder / "flwr"
        home.mkdir()
        self.env = {**os.environ, **QUICK, "FLWR_HOME": str(home)}
        connection = "insecure = true" if not secure else f'root-certificates = "{folder / "ca.crt"}"'
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{connection}\n'
        )

    def start(self, name: str, *command: Any) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, env=self.env, start_new_session=True
            )
        return self.processes[name]

    def run(self, *command: Any) -> str:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=self.env, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def shell(self, commands: str) -> None:
        """Run commands of a document."""
        done = subprocess.run(
            ["bash", "-euc", commands], cwd=self.folder, capture_output=True, text=True, env=self.env, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def superlink(self) -> None:
        secured = ["--insecure"]
        if self.secure:
            secured = [f"--ssl-ca-certfile={self.folder / 'ca.crt'}", f"--ssl-certfile={self.folder / 'server.crt'}"]
            secured += [f"--ssl-keyfile={self.folder / 'server.key'}", "--enable-supernode-auth"]
        self.start(
            "superlink", "flower-superlink", *secured, "--port", self.port, "--disable-runtime-dependency-installation"
        )
        wait_for(self._is_listening, 60, "starting the SuperLink")

    def _is_listening(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def register(self, name: str) -> None:
        self.run("flwr", "supernode", "register", self.folder / f"{name}.pub", "here")

    def supernode(self, name: str, mailbox: Path) -> Counter:
        """Start a node, and return what counts its bytes."""
        counter = Counter(self.port)
        self._counters.append(counter)
        secured = ["--insecure"]
        if self.secure:
            secured = [f"--root-certificates={self.folder / 'ca.crt'}"]
            secured += [f"--auth-supernode-private-key={self.folder / name}"]
        port = free_port()
        config = f"mailbox={json.dumps(str(mailbox))}"
        self.start(
            f"node-{name}",
            *("flower-supernode", *secured, "--superlink", f"127.0.0.1:{counter.port}"),
            *("--port", port, "--node-config", config),
        )
        return counter

    def client(self, name: str, *arguments: Any) -> None:
        self.start(f"client-{name}", sys.executable, "-m", "pocketzo", "federate", "client", *arguments)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        os.killpg(process.pid, 9)
        process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for name in list(self.processes):
            if self.processes[name].poll() is None:
                self.kill(name)
        for pid in self._left():  # Flower starts apps in sessions of their own, which outlive the SuperLink
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        for counter in self._counters:
            counter.close()

    def _left(self) -> list[int]:
        """Return the processes with this network's FLWR_HOME."""
        mark = f"FLWR_HOME={self.env['FLWR_HOME']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found
