"""Mutations of files: of any bytes, and of structured files that stay well formed."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import ModelProto

Mutator = Callable[[bytes, random.Random], bytes]

INTEGERS = (-1, 0, 1, 2, 7, 127, 255, 256, 65_535, 2**31 - 1, -(2**31), 2**32 - 1, 2**53 + 1, 2**63 - 1, -(2**63))
NUMBERS = (*INTEGERS, 2**64, 0.5, -0.0, 1e-320, 1e300)
TEXTS = (
    "",
    "a",
    "..",
    "../x",
    "/",
    "\0",
    "\n",
    "x" * 300,
    "\ud800",
    "é",
    "float32",
    "nan",
    "-1",
    "__proto__",
    "*",
    "(",
)
WORDS = tuple(struct.pack("<Q", value % 2**64) for value in INTEGERS)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert, repeat, remove or move bytes, or cut the end off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        if rng.random() < 0.5:  # the beginning of a file holds its structure
            at = min(at, rng.randrange(257))
        size = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 200)))
        match rng.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.randbytes(size)
            case 2:
                out[at:at] = rng.randbytes(size)
            case 3:
                out[at:at] = out[at : at + size] * rng.choice((1, 2, 50))
            case 4:
                del out[at : at + size]
            case 5:
                other = rng.randrange(len(out) + 1)
                out[at : at + size] = out[other : other + size]
            case 6:
                word = rng.choice(WORDS)[: rng.choice((1, 2, 4, 8))]
                out[at : at + len(word)] = word
            case _ if rng.random() < 0.3:
                del out[at:]
    return bytes(out)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove, add or exchange values of a JSON text."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                holder[key] = _other(holder[key], rng)
            case 1:
                holder[key] = rng.choice((*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [1], {"a": 1}))
            case 2:
                del holder[key]
            case 3:
                other, name = rng.choice(places)
                if other is not holder:
                    holder[key] = json.loads(json.dumps(other[name]))
            case 4 if isinstance(holder, list):
                holder.insert(key, json.loads(json.dumps(holder[key])))
            case _ if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = rng.choice(NUMBERS)
    text = json.dumps(value)
    if rng.random() < 0.05:
        text = text.replace("1", rng.choice(("1e999", "NaN", "1" * 5000, "[" * 3000)), 1)
    return text.encode()


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, *NUMBERS))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e30, *NUMBERS))
    if isinstance(value, str):
        return rng.choice((value[1:], value + "x", value * 2, value.upper(), *TEXTS))
    if isinstance(value, list):
        return rng.choice((value[1:], value * 2, value[::-1]))
    if isinstance(value, dict):
        return dict(list(value.items())[1:])
    return 0


def mutate_jsonl(data: bytes, rng: random.Random) -> bytes:
    """Mutate the JSON text of one line or two."""
    lines = data.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        lines[at] = mutate_json(lines[at], rng) + b"\n"
    return b"".join(lines)


def mutate_onnx(data: bytes, rng: random.Random) -> bytes:
    """Change fields of a model's protobuf message, which stays one."""
    model = ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        messages = list(_messages(model))
        weights = [4 if message.DESCRIPTOR.name in ("NodeProto", "AttributeProto") else 1 for message in messages]
        _mutate_message(rng.choices(messages, weights)[0], rng, model)
    out: bytes = model.SerializeToString()
    return out


def _messages(message: Message) -> Any:
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                yield from _messages(inner)


def _mutate_message(message: Message, rng: random.Random, model: ModelProto) -> None:
    fields = [field for field, _ in message.ListFields()]
    if rng.random() < 0.1 or not fields:
        fields = list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    if field.is_repeated:
        values = getattr(message, field.name)
        size = len(values)
        match rng.randrange(5):
            case 0 if size:
                del values[rng.randrange(size)]
            case 1 if size:
                again = values[rng.randrange(size)]
                values.append(again)
            case 2 if size > 1:
                order = list(values)
                rng.shuffle(order)
                del values[:]
                values.extend(order)
            case _ if field.type != FieldDescriptor.TYPE_MESSAGE:
                if size and rng.random() < 0.7:
                    at = rng.randrange(size)
                    values[at] = _scalar(field, values[at], rng, model)
                else:
                    values.append(_scalar(field, None, rng, model))
        return
    if field.type == FieldDescriptor.TYPE_MESSAGE or rng.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, getattr(message, field.name), rng, model))


def _scalar(field: FieldDescriptor, value: Any, rng: random.Random, model: ModelProto) -> Any:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            names = [name for node in model.graph.node for name in (*node.input, *node.output, node.op_type)]
            return rng.choice((*names, "", "x", "é", "ai.onnx", "com.microsoft")) if rng.random() < 0.9 else "y" * 300
        case FieldDescriptor.TYPE_BYTES:
            return mutate_bytes(value or b"", rng)
        case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
            return rng.choice((0.0, -1.0, 1e30, 1e-30, float("inf"), float("nan")))
        case FieldDescriptor.TYPE_ENUM:
            return rng.choice(field.enum_type.values).number
        case FieldDescriptor.TYPE_BOOL:
            return not value
        case FieldDescriptor.TYPE_INT32:
            return rng.choice([number for number in INTEGERS if abs(number) < 2**31] + [rng.randrange(30)])
        case FieldDescriptor.TYPE_UINT64:
            return rng.choice([number for number in INTEGERS if number >= 0])
        case _:
            return rng.choice((*INTEGERS, rng.randrange(100), (value or 0) + 1, (value or 0) - 1))


def mutate_external(data: bytes, rng: random.Random) -> bytes:
    """Change where a model's tensors are in external data."""
    model = ModelProto.FromString(data)
    places = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.choice(places)
        if rng.random() < 0.1:
            place.ClearField(rng.choice(("key", "value")))
        elif place.key == "location" or rng.random() < 0.1:
            place.value = rng.choice([text for text in TEXTS if text.isprintable() or text == "\0"])
        else:
            place.value = str(rng.choice((*INTEGERS, *(_number(place.value) + step for step in (-64, -1, 1, 64)))))
    out: bytes = model.SerializeToString()
    return out


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def mutate_npz(data: bytes, rng: random.Random) -> bytes:
    """Change, remove or add an array of an .npz file, whose checksums stay right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(files))
    match rng.randrange(5):
        case 0:
            del files[name]
        case 1:
            files[rng.choice(("x.npy", "labels.npy", "../x.npy", "a", name + ".npy"))] = files[name]
        case 2:
            files[name] = files[rng.choice(list(files))]
        case _:
            files[name] = mutate_bytes(files[name], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Change the lines and the punctuation of a text file."""
    out = data
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = out.split(b"\n")
        at = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                old, new = (
                    rng.choice((b"\t", b",", b'"', b"\n", b"{", b":", b" ")),
                    rng.choice((b"", b"\t", b'"', b"\r", b"\0")),
                )
                out = out.replace(old, new, rng.choice((1, 1, 1000)))
            case 1:
                lines[at] = rng.choice(
                    (b"", b"\xff\xfe", b'"' + lines[at], b"\xef\xbb\xbf" + lines[at], lines[at] * 50)
                )
                out = b"\n".join(lines)
            case 2:
                out = b"\n".join(lines[:at] + lines[at + 1 :])
            case 3:
                out = out.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", "\u2028".encode())))
            case 4:
                out = out.decode("utf-8", "replace").encode(rng.choice(("utf-16", "latin-1", "utf-8-sig")), "replace")
            case _:
                out = mutate_bytes(out, rng)
    return out


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Mutate a journal's header, with its checksum and those of the entries."""
    text, entries = _parts(data)
    return _journal(mutate_json(text, rng), entries)


def mutate_entries(data: bytes, rng: random.Random) -> bytes:
    """Mutate a journal's entries, with their checksums."""
    text, entries = _parts(data)
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(len(entries))
        match rng.randrange(4):
            case 0:
                entries[at] = mutate_bytes(entries[at], rng)
            case 1:
                count = rng.choice((0, 1, 2, 3, 2**20, 2**32 - 1))
                entries[at] = struct.pack("<I", count) + entries[at][4:]
            case 2:
                words = rng.choice((b"\xff" * 8, b"\0" * 8, b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f"))
                where = rng.randrange(4, len(entries[at]))
                entries[at] = (entries[at][:where] + words + entries[at][where + len(words) :])[: len(entries[at])]
            case _:
                entries.insert(at, entries[rng.randrange(len(entries))])
    return _journal(text, entries)


def _parts(data: bytes) -> tuple[bytes, list[bytes]]:
    size = int.from_bytes(data[4:8], "little")
    entries, at = [], 8 + size + 4
    while at < len(data):
        length = 8 + 12 * int.from_bytes(data[at : at + 4], "little")
        entries.append(data[at : at + length])
        at += length + 4
    return data[8 : 8 + size], entries


def _journal(text: bytes, entries: list[bytes]) -> bytes:
    crc = zlib.crc32(text)
    out = b"PZOJ" + struct.pack("<I", len(text)) + text + struct.pack("<I", crc)
    for entry in entries:
        crc = zlib.crc32(entry, crc)
        out += entry + struct.pack("<I", crc)
    return out


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header of a safetensors file, with its length; the data stays aligned."""
    size = int.from_bytes(data[:8], "little")
    text = mutate_json(data[8 : 8 + size], rng)
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]
