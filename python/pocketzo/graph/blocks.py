"""Matrices in blocks, as onnxruntime's MatMulNBits reads them, and how floats are quantised to blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

SIZES: Final = (16, 32, 64, 128, 256)
"""The sizes of blocks that onnxruntime's operators read."""
_TEXT: Final = re.compile(r"int([48])(?::block=(\d+))?")


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks: ``size`` numbers of one row are ``scale * (q - 2 ** (bits - 1)) + offset``.

    Attributes
    ----------
    bits : int
        4 or 8.
    packed : ndarray of uint8
        ``[rows, blocks, size * bits / 8]``; with 4 bits the lower half of a byte is the number before.
    scales : ndarray of float32
        ``[rows, blocks]``.
    offsets : ndarray of float32, optional
        ``[rows, blocks]``.
    """

    bits: int
    packed: Bytes
    scales: Floats
    offsets: Floats | None = None

    @property
    def size(self) -> int:
        """Numbers in a block."""
        return int(self.packed.shape[-1]) * 8 // self.bits

    def planes(self) -> dict[str, Bytes]:
        """Return numbers of 4 bits as MatMulNBits reads them; of 8 bits their upper halves and their lower ones."""
        if self.bits == 4:
            return {"packed": self.packed}
        return {"upper": pack(self.packed >> np.uint8(4)), "lower": pack(self.packed & np.uint8(15))}

    def array(self) -> Floats:
        """Return the matrix, ``[rows, columns]``."""
        q = self.packed
        if self.bits == 4:
            q = np.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:2], -1)
        numbers = self.scales[..., None] * (q.astype(np.float32) - np.float32(1 << self.bits - 1))
        if self.offsets is not None:
            numbers += self.offsets[..., None]
        return numbers.reshape(len(q), -1)


def pack(q: Bytes) -> Bytes:
    """Return numbers of 4 bits, two in a byte."""
    return np.ascontiguousarray(q[..., 0::2] | q[..., 1::2] << 4)


@dataclass(frozen=True)
class Scheme:
    """How floats are quantised.

    Attributes
    ----------
    bits : {4, 8}
    size : int
        Numbers in a block.
    symmetric : bool
        Whether a block has no offset. In blocks of 32 these are gguf's Q4_0 and Q8_0, bit for bit.
    """

    bits: Literal[4, 8]
    size: int = 32
    symmetric: bool = True

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``int4`` or ``int8``, perhaps with ``:block=N``.

        Raises
        ------
        ValueError
            It is something else.
        """
        match = _TEXT.fullmatch(text)
        size = int(match[2] or 32) if match else 0
        if match is None or size not in SIZES:
            sizes = ", ".join(map(str, SIZES))
            raise ValueError(
                f"expected int4 or int8, or as int4:block=N with N one of {sizes}, got {text!r}: of 4 or 8 bits, in "
                "blocks of N numbers, by default 32"
            )
        return cls(4 if match[1] == "4" else 8, size)

    @property
    def name(self) -> str:
        """What it is called."""
        if self.size == 32 and self.symmetric:
            return f"Q{self.bits}_0"
        return f"int{self.bits} in blocks of {self.size}{'' if self.symmetric else ' with offsets'}"

    def blocks(self, rows: Floats) -> Blocks:
        """Quantise a matrix; its rows are padded to whole blocks by zeros.

        Raises
        ------
        ValueError
            With offsets, the rows are no whole blocks: graphs sum the activations of each block.
        """
        if not self.symmetric and rows.shape[1] % self.size:
            raise ValueError(f"{self.name}: expected rows of whole blocks, got {rows.shape[1]} numbers")
        padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % self.size))).astype(np.float32, copy=False)
        numbers = padded.reshape(len(padded), -1, self.size)
        if not self.symmetric:
            return self._with_offsets(numbers)
        largest = np.take_along_axis(numbers, np.abs(numbers).argmax(axis=-1, keepdims=True), axis=-1)
        if self.bits == 4:
            scales: Floats = largest / np.float32(-8)
            q = np.trunc(numbers * _inverse(scales) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
            return Blocks(4, pack(q), _halved(scales))
        scales = np.abs(largest / np.float32(127))
        scaled = numbers * _inverse(scales)
        rounded = np.trunc(np.abs(scaled) + np.float32(0.5)) * np.sign(scaled)  # halves away from 0
        return Blocks(8, (rounded.astype(np.int16) + 128).astype(np.uint8), _halved(scales))

    def _with_offsets(self, numbers: Floats) -> Blocks:
        least = numbers.min(axis=-1, keepdims=True)
        scales = (numbers.max(axis=-1, keepdims=True) - least) / np.float32((1 << self.bits) - 1)
        q = np.rint((numbers - least) * _inverse(scales)).astype(np.uint8)
        offsets = least + np.float32(1 << self.bits - 1) * scales
        return Blocks(self.bits, pack(q) if self.bits == 4 else q, scales[..., 0], offsets[..., 0])


def _inverse(scales: Floats) -> Floats:
    """Return the inverse of each scale; 0 of those that are too small, whose numbers are 0 as well."""
    found = np.zeros_like(scales)
    np.divide(1, scales, out=found, where=np.abs(scales) >= np.finfo(np.float32).tiny)
    return found


def _halved(scales: Floats) -> Floats:
    """Return scales as gguf stores them, in 16 bits."""
    return scales[..., 0].astype(np.float16).astype(np.float32)
