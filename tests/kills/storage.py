"""What a power cut leaves of the requests that a process made of the file system; see ``faults.c`` for the record.

The rules are those on which a program may rely, and no more:

- A file's data is there up to the last ``fsync`` of the file. Of the writes after it, any number may be there, in their
  order, and of the next one a part; behind that part the file may be as long as it was to be, with zeros.
- A name that was made, changed or removed is as it was at the last ``fsync`` of its folder. Of the changes after it, in
  the whole file system, any number may be there, in their order.

``rename`` is one change, in one folder or two; it is there if either folder was flushed.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Tree = dict[str, bytes | None]
"""Contents of files, and None for folders, by path below a root."""


def read_tree(root: Path) -> Tree:
    return {
        os.fspath(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def write_tree(tree: Tree, root: Path) -> None:
    for name, content in sorted(tree.items()):
        path = root / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@dataclass(eq=False)
class File:
    """A file: what was there before, and the requests since, each with its number."""

    content: bytes = b""
    changes: list[tuple[int, int, bytes | None]] = field(default_factory=list)  # offset and data, or size and None
    syncs: list[tuple[int, int]] = field(default_factory=list)  # number of the request, changes before it

    def after(self, requests: int, rng: np.random.Generator | None) -> bytes:
        """Return what is there after a power cut; without one, where no generator is given."""
        made = [change for change in self.changes if change[0] < requests]
        if rng is None:
            return _apply(self.content, made)
        safe = max((changes for number, changes in self.syncs if number < requests), default=0)
        kept = safe if rng.integers(2) else int(rng.integers(safe, len(made) + 1))
        data = _apply(self.content, made[:kept])
        if kept < len(made) and rng.integers(2):
            _, offset, next_data = made[kept]
            if next_data is not None:
                part = int(rng.integers(len(next_data) + 1))
                data = _apply(data, [(0, offset, next_data[:part])])
                if rng.integers(2):
                    data += bytes(max(0, offset + len(next_data) - len(data)))
        return data


def _apply(data: bytes, changes: list[tuple[int, int, bytes | None]]) -> bytes:
    content = bytearray(data)
    for _, at, written in changes:
        if written is None:
            content = content[:at] + bytes(max(0, at - len(content)))
        else:
            content += bytes(max(0, at - len(content)))
            content[at : at + len(written)] = written
    return bytes(content)


@dataclass(eq=False)
class Folder:
    """A folder: what was in it before, and when it was flushed since."""

    before: dict[str, Node] = field(default_factory=dict)
    now: dict[str, Node] = field(default_factory=dict)
    syncs: list[int] = field(default_factory=list)


Node = File | Folder


@dataclass(frozen=True)
class Change:
    """A change of names: of each, its folder and what it becomes, None for nothing."""

    number: int
    names: tuple[tuple[Folder, str, Node | None], ...]


class Storage:
    """The file system below a root, from a tree and the record of all requests since.

    Attributes
    ----------
    requests : int
        Their number. A power cut may come after any number of them.
    said : list of (int, bytes)
        What was written to standard output, and the number of requests before it.
    """

    def __init__(self, root: Path, before: Tree, record: Path) -> None:
        self._root = posixpath.normpath(os.fspath(root))
        self._top = Folder()
        self._changes: list[Change] = []
        self._open: dict[int, Node] = {}
        self.requests = 0
        self.said: list[tuple[int, bytes]] = []
        for name, content in sorted(before.items()):
            parent, leaf = self._parent(f"{self._root}/{name}")
            parent.before[leaf] = parent.now[leaf] = Folder() if content is None else File(content)
        for line in record.read_text().splitlines():
            what, *words = line.split("\t")
            self._take(what, words)
            self.requests += 1

    def tree(self, requests: int | None = None, rng: np.random.Generator | None = None) -> Tree:
        """Return what is there: after all requests, or after a power cut behind the first ``requests``."""
        requests = self.requests if requests is None else requests
        entries: dict[Folder, dict[str, Node]] = {}
        happened = requests if rng is None else int(rng.integers(requests + 1)) if rng.integers(2) else 0
        for change in self._changes:
            if change.number < requests and (change.number < happened or self._is_safe(change, requests)):
                for folder, name, node in change.names:
                    names = entries.setdefault(folder, dict(folder.before))
                    if node is None:
                        names.pop(name, None)
                    else:
                        names[name] = node
        found: Tree = {}
        todo: list[tuple[str, Folder]] = [("", self._top)]
        while todo:
            path, folder = todo.pop()
            for name, node in entries.get(folder, folder.before).items():
                below = f"{path}{name}"
                if isinstance(node, Folder):
                    found[below] = None
                    todo.append((f"{below}/", node))
                else:
                    found[below] = node.after(requests, rng)
        return found

    @staticmethod
    def _is_safe(change: Change, requests: int) -> bool:
        return any(change.number < sync < requests for folder, _, _ in change.names for sync in folder.syncs)

    def _parent(self, path: str) -> tuple[Folder, str]:
        names = posixpath.relpath(posixpath.normpath(path), self._root).split("/")
        folder = self._top
        for name in names[:-1]:
            below = folder.now[name]
            assert isinstance(below, Folder)
            folder = below
        return folder, names[-1]

    def _find(self, path: str) -> Node | None:
        if posixpath.normpath(path) == self._root:
            return self._top
        folder, name = self._parent(path)
        return folder.now.get(name)

    def _change(self, *names: tuple[str, Node | None]) -> None:
        change = Change(self.requests, tuple((*self._parent(path), node) for path, node in names))
        for folder, name, node in change.names:
            if node is None:
                folder.now.pop(name, None)
            else:
                folder.now[name] = node
        self._changes.append(change)

    def _take(self, what: str, words: list[str]) -> None:
        node: Node | None
        match what, words:
            case "open", [descriptor, flags, path]:
                node = self._find(path)
                if node is None:
                    node = File()
                    self._change((path, node))
                if isinstance(node, File) and int(flags) & os.O_TRUNC:
                    node.changes.append((self.requests, 0, None))
                self._open[int(descriptor)] = node
            case "write", [descriptor, offset, data]:
                self._file(descriptor).changes.append((self.requests, int(offset), bytes.fromhex(data)))
            case "cut", [descriptor, size]:
                self._file(descriptor).changes.append((self.requests, int(size), None))
            case "sync", [descriptor]:
                node = self._open[int(descriptor)]
                if isinstance(node, File):
                    node.syncs.append((self.requests, len(node.changes)))
                else:
                    node.syncs.append(self.requests)
            case "rename", [source, target]:
                node = self._find(source)
                self._change((source, None), (target, node))
            case "swap", [a, b]:
                self._change((a, self._find(b)), (b, self._find(a)))
            case "mkdir", [path]:
                self._change((path, Folder()))
            case (("unlink" | "rmdir"), [path]):
                self._change((path, None))
            case "said", [data]:
                self.said.append((self.requests, bytes.fromhex(data)))
            case _:
                raise ValueError(f"no request: {what} {words}")

    def _file(self, descriptor: str) -> File:
        node = self._open[int(descriptor)]
        assert isinstance(node, File)
        return node
