"""Bundles, journals and snapshots, read and replayed as docs/formats.md says; the noise as cpp/SPEC.md says."""

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from vectors.reference import Term, apply, apply16, normal

TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "u1", "BOOL": "?"}


def read_tensors(data: bytearray) -> dict[str, Any]:
    """Return arrays over the bytes of a safetensors file."""
    size = 8 + int.from_bytes(data[:8], "little")
    return {
        name: np.ndarray(item["shape"], TYPES[item["dtype"]], data, size + item["data_offsets"][0])
        for name, item in json.loads(data[8:size]).items()
        if not name.startswith("pocketzo.padding.")
    }


def read_bundle(folder: Path) -> tuple[dict[str, Any], bytearray]:
    """Return what bundle.json says, and the file that training changes."""
    bundle = json.loads((folder / "bundle.json").read_bytes())
    data = bytearray((folder / f"{'adapter' if 'adapter' in bundle else 'weights'}.safetensors").read_bytes())
    assert (bundle["format"], bundle["version"]) == ("pocketzo-bundle", 3 if "adapter" in bundle else 2), folder
    assert bundle["graph_sha256"] == sha256((folder / "model.onnx").read_bytes()).hexdigest(), folder
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert bundle.get("adapter", bundle)["header_sha256"] == sha256(header).hexdigest(), folder
    for tensor in bundle["tensors"]:  # of which no two meet
        assert tensor["id"] == int.from_bytes(sha256(tensor["name"].encode()).digest()[:4], "little"), tensor
    return bundle, data


def read_journal(path: Path) -> tuple[dict[str, Any], str, list[tuple[float, dict[int, float]]], list[int]]:
    """Return the header, its SHA-256, the entries, and the CRC-32 of the header and of each entry."""
    data = path.read_bytes()
    magic, size = struct.unpack_from("<4sI", data)
    text, end, entries, crcs = data[8 : 8 + size], 12 + size, [], [crc32(data[8 : 8 + size])]
    assert (magic, data[end - 4 : end]) == (b"PZOJ", crcs[0].to_bytes(4, "little")), f"{path}: the header is damaged"
    while end < len(data):
        start, (count, lr) = end, struct.unpack_from("<If", data, end)
        end += 12 + 12 * count
        crcs.append(crc32(data[start : end - 4], crcs[-1]))
        assert data[end - 4 : end] == crcs[-1].to_bytes(4, "little"), f"{path}: the entry at byte {start} is damaged"
        entries.append((lr, dict(struct.iter_unpack("<Qf", data[start + 8 : end - 4]))))
    return json.loads(text), sha256(text).hexdigest(), entries, crcs


def read_snapshot(folder: Path, run: str, crcs: list[int]) -> tuple[int, dict[str, bytearray]]:
    """Return the number of steps, and the other files by name."""
    about = json.loads((folder / "snapshot.json").read_bytes())
    files = {name: bytearray((folder / name).read_bytes()) for name in about["files"]}
    expected = ["pocketzo-snapshot", 1, run, crcs[about["step"]]]
    assert [about[key] for key in ("format", "version", "run", "crc32")] == expected, f"{folder} is of another journal"
    assert about["files"] == {name: sha256(data).hexdigest() for name, data in files.items()}, f"{folder} is damaged"
    return about["step"], files


def gains_of(method: dict[str, Any], state: dict[str, Any], lr: float, moves: dict[int, float]) -> dict[int, float]:
    """Return what the momentum takes of each direction."""
    slopes, total = {draw: len(moves) * move / lr for draw, move in moves.items()}, 0.0
    for slope in slopes.values():
        total += slope * slope
    state["mean_square"] = 0.99 * float(state["mean_square"]) + 0.01 * (total / len(moves))
    state["weight"] = 0.99 * float(state["weight"]) + 0.01
    root = math.sqrt(state["mean_square"] / state["weight"])
    share = 1 - method["momentum"]
    return {draw: share * (slope / root) / len(moves) if root else 0.0 for draw, slope in slopes.items()}


def terms(
    method: dict[str, Any], tensor: dict[str, Any], lr: float, moves: dict[int, float], gains: dict[int, float] | None
) -> Iterator[Term]:
    """Yield what a step does to one tensor."""
    group = next((g for g in method["groups"] if re.search(g["pattern"], tensor["name"])), {"lr": 1.0, "eps": 1.0})
    eps, is_16bit = float(np.float32(method["eps"] * group["eps"])), tensor["dtype"] != "float32"
    decay = float(np.float32(lr * group["lr"] * method["weight_decay"])) if len(tensor["shape"]) > 1 else 0.0
    seed, kind, draws, at = method["seed"], method["distribution"], list(moves), dict[int, int]()
    sides: list[dict[int, int]] = [{draw: side} for draw in draws for side in (1, -1)]
    points = [{}, *sides[::2]] if method["method"] == "fzoo" else sides
    merged = method["method"] != "momentum" and not is_16bit  # the return of the first direction and its update
    points.append({draw: side for draw, side in points[-1].items() if draw == draws[0] and merged})
    for point in [] if method.get("exact") else points:
        for draw in dict.fromkeys([*at, *point]):
            start, end = at.get(draw, 0), point.get(draw, 0)
            for leg in [-start, end] if is_16bit and start and end else [end - start] * (start != end):
                yield Term(seed, draw, (leg * eps,), 0.0, kind)
        at = point
    if gains is not None:
        yield Term(seed, 0, (), 1 - method["momentum"], kind, role="gather")
        yield from (Term(seed, draw, (gain,), 0.0, kind, role="gather") for draw, gain in gains.items())
        yield Term(seed, draws[-1], (-group["lr"] * lr,), decay, kind, "stochastic", "follow")
    for draw in draws if method["method"] != "momentum" else []:
        scale, last = -group["lr"] * moves[draw] - at.get(draw, 0) * eps, draw == draws[-1]
        yield Term(seed, draw, (scale,), decay if last else 0.0, kind, "stochastic" if last else "later")


def with_rank(method: dict[str, Any], term: Term) -> Term:
    """Give a term of lozo its rank."""
    if method["method"] != "lozo":
        return term
    return replace(term, rank=method["rank"], basis=term.draw // (method["interval"] * method["queries"]))


def replay(
    bundle: dict[str, Any],
    data: bytearray,
    header: dict[str, Any],
    entries: list[Any],
    first: int = 0,
    state: dict[str, Any] | None = None,
) -> None:
    """Do to the weights' file, and to the method's state, what some steps did, the first of which has a number."""
    method, arrays, state = header["method"], read_tensors(data), {} if state is None else state
    trained = [(tensor, list[Term]()) for tensor in bundle["tensors"] if tensor["name"] in method["trained"]]
    if method["method"] == "momentum" and not state:
        state.update(mean_square=0.0, weight=0.0)
        state.update({f"momentum.{t['name']}": np.zeros(arrays[t["name"]].size, "<f4") for t, _ in trained})
    for step, entry in enumerate(entries, first):
        gains = gains_of(method, state, *entry) if state and entry[0] else None
        order = normal(method["seed"], 0xFFFFFFFE, step, 0, len(trained)).argsort(kind="stable")
        share = method["subset"]["share"] if method["subset"] else 1.0
        for tensor, todo in [trained[i] for i in order[: max(1, round(share * len(trained)))]]:
            todo.extend(with_rank(method, term) for term in terms(method, tensor, entry[0], entry[1], gains))
    for tensor, todo in trained:
        w, m = arrays[tensor["name"]].reshape(-1), state.get(f"momentum.{tensor['name']}")
        of = {"tensor": tensor["id"], "m": m, "columns": math.prod(tensor["shape"][1:]) * (len(tensor["shape"]) > 1)}
        if tensor["dtype"] == "float32":
            w[...] = apply(w, todo, **of)
        else:
            w.view("<u2")[...] = apply16(w.astype("<f4"), todo, storage=tensor["dtype"], **of)


def read_activations(path: Path) -> tuple[dict[str, Any], dict[bytes, list[Any]]]:
    """Return what a segment of an activation cache says, and its values by key."""
    data = path.read_bytes()
    assert data[:8] == b"PZACTIVE"
    size = int.from_bytes(data[8:12], "little")
    about = json.loads(data[12 : 12 + size])
    assert (about["format"], about["version"]) == ("pocketzo-activations", 1)
    begin, found = 12 + size, {}
    end = begin + 40 * about["count"]
    assert int.from_bytes(data[end : end + 4], "little") == crc32(data[:end])
    for at in range(begin, end, 40):
        key, start, length, tokens, crc = struct.unpack("<16sQQII", data[at : at + 40])
        assert start % 64 == 0
        assert crc32(data[start : start + length]) == crc
        arrays = []
        for value in about["values"]:
            shape = [tokens if axis is None else axis for axis in value["axes"]]
            count = math.prod(shape)
            if about["dtype"] == "int8":
                scales = np.frombuffer(data, "<f4", -(-count // 64), start)
                start += scales.nbytes
                elements = np.frombuffer(data, "i1", count, start)
                array = elements * np.repeat(scales, 64)[:count]
            else:
                stored = "<f2" if "16" in (about["dtype"] + value["dtype"]) else "<f4"
                array = elements = np.frombuffer(data, stored, count, start)
            start += elements.nbytes
            arrays.append(array.reshape(shape).astype(value["dtype"]))
        found[key] = arrays
    return about, found
