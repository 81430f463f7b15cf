"""GGUF's blocks as blocks of onnxruntime's MatMulNBits.

A block is ``size`` numbers of one row: ``scale * (q - 2 ** (bits - 1))``, q of 4 or 8 bits, which never rounds here.
Types with a minimum add an offset to all numbers of a block, with one rounding. So all types are kept:

=====  ====  ====  ========================================================  ===========
type   bits  size  number                                                    offset
=====  ====  ====  ========================================================  ===========
Q4_0   4     32    d (q - 8)
Q4_1   4     32    d q + m                                                   8 d + m
Q4_K   4     32    d s q - e m; s and m are 6 bits of each eighth            8 d s - e m
Q5_0   8     32    d (q - 16)
Q5_1   8     32    d q + m                                                   16 d + m
Q8_0   8     32    d q
Q6_K   8     16    d s (q - 32); s is an int8 of each sixteenth
=====  ====  ====  ========================================================  ===========

MatMulNBits can also read float zero points, ``-m / d``. The offsets are used instead because the CPU kernel of
onnxruntime 1.32 then dequantises the whole matrix at every use, and refuses it for 8 bits: one token of SmolLM2-135M
took 0.28 s in the 210 products of Q4_1 with float zero points, 0.02 s with offsets, and 0.04 s in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from pocketzo.graph.blocks import Blocks, Bytes, Floats, pack


def keeps(kind: str) -> bool:
    """Whether :func:`to_blocks` takes this type."""
    return kind in _READ


def to_blocks(kind: str, data: Bytes) -> Blocks:
    """Return the blocks of a matrix.

    Parameters
    ----------
    kind : str
        One of the types above.
    data : ndarray of uint8
        ``[rows, bytes of a row]``, as in the file.
    """
    size, read = _READ[kind]
    return read(data.reshape(len(data), -1, size))


def _halves(data: Bytes, start: int) -> Floats:
    return np.ascontiguousarray(data[..., start : start + 2]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Return the lower halves of 16 bytes or so, then the upper halves."""
    return np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=-1)


def _q4_0(data: Bytes) -> Blocks:
    return Blocks(4, pack(_nibbles(data[..., 2:])), _halves(data, 0))


def _q4_1(data: Bytes) -> Blocks:
    scales = _halves(data, 0)
    return Blocks(4, pack(_nibbles(data[..., 4:])), scales, 8 * scales + _halves(data, 2))


def _q4_k(data: Bytes) -> Blocks:
    rows, count, _ = data.shape
    low, minimum, rest = (data[..., start : start + 4] for start in (4, 8, 12))
    factors = np.concatenate([low & 63, rest & 15 | low >> 2 & 48], axis=-1)
    minima = np.concatenate([minimum & 63, rest >> 4 | minimum >> 2 & 48], axis=-1)
    scales = _halves(data, 0)[..., None] * factors  # 17 bits
    offsets = 8 * scales - _halves(data, 2)[..., None] * minima
    q = _nibbles(data[..., 16:].reshape(rows, count, 4, 32)).reshape(rows, -1, 32)
    return Blocks(4, pack(q), scales.reshape(rows, -1), offsets.reshape(rows, -1))


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    """Return numbers of 5 bits, to be read as signed ones of 8."""
    return (_nibbles(low) | np.unpackbits(high, axis=-1, bitorder="little") << np.uint8(4)) + np.uint8(128 - 16)


def _q5_0(data: Bytes) -> Blocks:
    return Blocks(8, _five_bits(data[..., 2:6], data[..., 6:]), _halves(data, 0))


def _q5_1(data: Bytes) -> Blocks:
    scales = _halves(data, 0)
    return Blocks(8, _five_bits(data[..., 4:8], data[..., 8:]), scales, 16 * scales + _halves(data, 2))


def _q8_0(data: Bytes) -> Blocks:
    return Blocks(8, data[..., 2:] ^ np.uint8(128), _halves(data, 0))


def _q6_k(data: Bytes) -> Blocks:
    rows, count, _ = data.shape
    low = _nibbles(data[..., :128].reshape(rows, count, 2, 64))  # [rows, count, 2, 128]
    bits = data[..., 128:192].reshape(rows, count, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    q = (low | ((bits & np.uint8(3)) << np.uint8(4)).reshape(low.shape)) + np.uint8(128 - 32)
    scales = _halves(data, 208)[..., None] * np.ascontiguousarray(data[..., 192:208]).view(np.int8)
    return Blocks(8, q.reshape(rows, -1, 16), scales.reshape(rows, -1))


_READ: Final[Mapping[str, tuple[int, Callable[[Any], Blocks]]]] = {  # with the bytes of a block of the file
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q4_K": (144, _q4_k),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q6_K": (210, _q6_k),
}
