"""Write answers.txt, which every instruction set must match bit for bit, with reference.py.

Run it in tests/ as ``python -m vectors.generate -o vectors/answers.txt``; it takes about ten seconds. Each line is a
request, `` = `` and the answer, which :func:`answer` computes from the request.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from vectors import reference as ref

CRC_BLOCK = 1 << 16
APPLY_VALUES = 64

HEADER = f"""\
# Answers of the noise specification, version {ref.SPEC_VERSION}: requests and what every instruction set must answer.
# Written by: cd tests && python -m vectors.generate -o vectors/answers.txt   (numpy {np.__version__}; do not edit)
# Integers are decimal or 0x; words, fp32 bit patterns and CRCs are 8 hex digits.
# CRC: CRC-32 as in zlib, of little-endian fp32, one for each {CRC_BLOCK} elements (the last may have fewer).
#   philox ROUNDS COUNTER*4 KEY*2 = WORD*4                  (Random123 1.14.0, tests/kat_vectors, copied)
#   subkey SEED TENSOR DRAW WINDOW = WORD*4
#   words SEED TENSOR DRAW BLOCK = WORD*64                  (x[j] of lane l is word 16 j + l)
#   normal SEED TENSOR DRAW OFFSET COUNT = FP32*COUNT
#   rademacher SEED TENSOR DRAW OFFSET COUNT = SIGNS        (a string of + and -)
#   normal_crc SEED TENSOR DRAW OFFSET BLOCKS = CRC*BLOCKS  (rademacher_crc likewise)
#   shrink DECAY COUNT = FP32*{APPLY_VALUES} CRC...                  (the first results, then CRCs of all)
#   apply TENSOR OFFSET COUNT TERMS (KIND SEED DRAW DECAY SCALES SCALE*SCALES)*TERMS = FP32*{APPLY_VALUES} CRC...
#   apply16 STORAGE TENSOR OFFSET COUNT TERMS (KIND SEED DRAW DECAY SCALES SCALE*SCALES ROUNDING)*TERMS =
#     U16*{APPLY_VALUES} CRC...
#   momentum STORAGE TENSOR OFFSET COUNT TERMS (ROLE KIND SEED DRAW DECAY SCALES SCALE*SCALES ROUNDING)*TERMS =
#     the momentum as FP32*{APPLY_VALUES} CRC..., then the weights as apply or apply16 gives them
#   products TENSOR OFFSET COUNT VECTORS (TERMS (KIND SEED DRAW DECAY SCALES SCALE*SCALES)*TERMS)*VECTORS =
#     FP64*2*VECTORS                                        (16 hex digits: the products with the first and with itself)
#   low_rank STORAGE TENSOR ROWS COLUMNS TERMS (KIND SEED DRAW DECAY SCALES SCALE*SCALES ROUNDING RANK BASIS)*TERMS =
#     the matrix, row by row, as apply or apply16 gives it
# DECAY and SCALE are fp32 bit patterns. The weights before, for i = 0 .. COUNT-1, with h = i * 2654435761 mod 2^32:
#   i mod 61 = 7: bit pattern h & 807fffff (subnormal); 13: +0; 14: -0; else fp32(h - 2^31) * 2^-33
# For apply16 they are those times 2^(17 - 2 (i mod 18)), rounded to nearest; words have 4 digits there, and CRCs are of
# little-endian 16-bit words. The momentum before is the fp32 weights in reverse order.
"""


# ---- computing an answer ---------------------------------------------------------------------------------------------


def weights(n: int) -> ref.F32:
    """Return the weight pattern that HEADER describes."""
    i = np.arange(n, dtype=np.uint64)
    h = (i * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    w = (h.astype(np.int64) - 2**31).astype(np.float32) * np.float32(2.0**-33)
    kind = i % np.uint64(61)
    w = np.where(kind == 7, ref.from_bits(h & np.uint64(0x807FFFFF)), w)
    w = np.where(kind == 13, np.float32(0.0), w)
    return np.where(kind == 14, np.float32(-0.0), w)


def _hex(values: ref.U32) -> str:
    return " ".join(f"{value:08x}" for value in values.reshape(-1).tolist())


def _crc(values: ref.F32) -> str:
    return f"{zlib.crc32(values.astype('<f4').tobytes()):08x}"


def _fp32(value: float) -> str:
    return _hex(ref.bits(np.array(value, np.float32)))


def _values_and_crcs(w: ref.F32) -> str:
    crcs = (_crc(w[start : start + CRC_BLOCK]) for start in range(0, len(w), CRC_BLOCK))
    return " ".join([_hex(ref.bits(w[:APPLY_VALUES])), *crcs])


def _float(pattern: str) -> float:
    return float(ref.from_bits(np.array(int(pattern, 16))))


def _distribution(name: str) -> ref.Distribution:
    if name == "normal":
        return "gaussian"
    if name == "rademacher":
        return "rademacher"
    raise ValueError(f"unknown distribution {name!r}")


def _terms(fields: list[str], *, rounded: bool = False, roles: bool = False) -> list[ref.Term]:
    terms = []
    while fields:
        role, fields = (_role(fields[0]), fields[1:]) if roles else ("shift", fields)
        kind, seed, draw, decay, count, *fields = fields
        scales = tuple(_float(scale) for scale in fields[: int(count)])
        rounding, fields = fields[int(count)] if rounded else "nearest", fields[int(count) + rounded :]
        terms.append(
            ref.Term(int(seed, 0), int(draw, 0), scales, _float(decay), _distribution(kind), _rounding(rounding), role)
        )
    return terms


def _rounding(name: str) -> ref.Rounding:
    if name in get_args(ref.Rounding):
        return cast(ref.Rounding, name)
    raise ValueError(f"unknown rounding {name!r}")


def _role(name: str) -> ref.Role:
    if name in get_args(ref.Role):
        return cast(ref.Role, name)
    raise ValueError(f"unknown role {name!r}")


def _storage(name: str) -> ref.Storage:
    if name in get_args(ref.Storage):
        return cast(ref.Storage, name)
    raise ValueError(f"unknown storage {name!r}")


def weights16(n: int, storage: ref.Storage) -> ref.F32:
    """Return the pattern's values for 16-bit weights."""
    power = np.ldexp(np.float32(1), 17 - 2 * (np.arange(n) % 18))
    return ref.nearest(weights(n) * power, storage)


def _apply16(request: list[str]) -> str:
    storage = _storage(request[0])
    tensor, offset, n, _ = (int(field, 0) for field in request[1:5])
    return _words16(
        ref.apply16(
            weights16(n, storage), _terms(request[5:], rounded=True), storage=storage, tensor=tensor, offset=offset
        )
    )


def _words16(w: NDArray[np.uint16]) -> str:
    crcs = (
        f"{zlib.crc32(w[start : start + CRC_BLOCK].astype('<u2').tobytes()):08x}"
        for start in range(0, len(w), CRC_BLOCK)
    )
    return " ".join([*(f"{word:04x}" for word in w[:APPLY_VALUES].tolist()), *crcs])


def _momentum(request: list[str]) -> str:
    tensor, offset, n, _ = (int(field, 0) for field in request[1:5])
    terms, m = _terms(request[5:], rounded=True, roles=True), weights(n)[::-1].copy()
    if request[0] == "float32":
        after = _values_and_crcs(ref.apply(weights(n), terms, tensor=tensor, offset=offset, m=m))
    else:
        storage = _storage(request[0])
        w = weights16(n, storage)
        after = _words16(ref.apply16(w, terms, storage=storage, tensor=tensor, offset=offset, m=m))
    return f"{_values_and_crcs(m)} {after}"


def _products(request: list[str]) -> str:
    tensor, offset, n, count = (int(field, 0) for field in request[:4])
    vectors, fields = [], request[4:]
    for _ in range(count):
        terms, fields = int(fields[0]), fields[1:]
        end = 0
        for _ in range(terms):
            end += 5 + int(fields[end + 4])
        vectors.append(_terms(fields[:end]))
        fields = fields[end:]
    found = ref.products(vectors, tensor=tensor, offset=offset, n=n)
    return " ".join(f"{word:016x}" for word in found.view(np.uint64).ravel().tolist())


def _low_rank(request: list[str]) -> str:
    tensor, rows, columns, count = (int(field, 0) for field in request[1:5])
    terms, fields = [], request[5:]
    for _ in range(count):
        end = 6 + int(fields[4])
        (term,) = _terms(fields[:end], rounded=True)
        terms.append(replace(term, rank=int(fields[end]), basis=int(fields[end + 1], 0)))
        fields = fields[end + 2 :]
    if request[0] == "float32":
        return _values_and_crcs(ref.apply(weights(rows * columns), terms, tensor=tensor, columns=columns))
    storage = _storage(request[0])
    w = weights16(rows * columns, storage)
    return _words16(ref.apply16(w, terms, storage=storage, tensor=tensor, columns=columns))


def answer(request: str) -> str:
    """Return the answer to a request."""
    kind, *fields = request.split()
    if kind == "philox":
        numbers = [int(field, 16) for field in fields[1:]]
        return _hex(np.stack(ref.philox4x32(int(fields[0]), numbers[:4], numbers[4:])))
    if kind == "shrink":
        w = weights(int(fields[1]))
        return _values_and_crcs(ref.fma32(np.float32(-_float(fields[0])), w, w))
    if kind == "apply":
        tensor, offset, n, count = (int(field, 0) for field in fields[:4])
        terms = _terms(fields[4:])
        if len(terms) != count:
            raise ValueError(f"{count} terms announced, {len(terms)} given: {request}")
        return _values_and_crcs(ref.apply(weights(n), terms, tensor=tensor, offset=offset))
    if kind == "apply16":
        return _apply16(fields)
    if kind == "momentum":
        return _momentum(fields)
    if kind == "products":
        return _products(fields)
    if kind == "low_rank":
        return _low_rank(fields)
    seed, tensor, draw, offset, *rest = (int(field, 0) for field in fields)
    if kind == "subkey":
        return _hex(np.stack(ref.subkey(seed, tensor, draw, offset)))
    if kind == "words":
        return _hex(ref.words(seed, tensor, draw, offset, 1))
    (count,) = rest
    if kind == "normal":
        return _hex(ref.bits(ref.normal(seed, tensor, draw, offset, count)))
    if kind == "rademacher":
        return "".join("+" if u > 0 else "-" for u in ref.rademacher(seed, tensor, draw, offset, count))
    if kind in ("normal_crc", "rademacher_crc"):
        of = _distribution(kind.removesuffix("_crc"))
        starts = (offset + block * CRC_BLOCK for block in range(count))
        return " ".join(_crc(ref.noise(of, seed, tensor, draw, start, CRC_BLOCK)) for start in starts)
    raise ValueError(f"unknown request: {request}")


# ---- the requests ----------------------------------------------------------------------------------------------------

PHILOX = """\
philox 7 00000000 00000000 00000000 00000000 00000000 00000000 = 5f6fb709 0d893f64 4f121f81 4f730a48
philox 7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff = 5207ddc2 45165e59 4d8ee751 8c52f662
philox 7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 = 4dfccaba 190a87f0 c47362ba b6b5242a
philox 10 00000000 00000000 00000000 00000000 00000000 00000000 = 6627e8d5 e169c58d bc57ac4c 9b00dbd8
philox 10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff = 408f276d 41c83b0e a20bc7c6 6d5451fd
philox 10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 = d16cfe09 94fdcceb 5001e420 24126ea1"""

# SEED TENSOR DRAW
STREAMS = [
    "0 0 0",
    "1 0 0",
    "0 1 0",
    "0 0 1",
    "0xffffffffffffffff 0xffffffff 0xffffffffffffffff",
    "0x0123456789abcdef 0xdeadbeef 0x100000000",
]
MAIN = "20250101 0x5eed 41"
# Around lanes, slots, blocks, Rademacher groups, and counters that carry: q at 2^34 (normal) and 2^39 (Rademacher).
OFFSETS = [*range(9), 15, 16, 17, 63, 64, 65, 2047, 2048, 2049]
FAR = [2**32 - 9, 2**34 - 8, 2**38 - 8, 2**39 - 5, 2**40 + 3, 2**58 + 2**34 - 3, 2**63 - 7, 2**64 - 18]

# Rare words of SEED TENSOR DRAW = 7 11 13, found by a search of 2^33 elements. Each request covers the cosine (first
# element) and the sine (last).
EDGES = {
    64983693: "x0 = 7fffffd7: v = 2^31, r = 0",
    164094020: "x0 = 8000003b: v = 2^31, r = 0, signed",
    25870433: "x2 = 7fffffde: v = 2^31, r = 0",
    657992430: "x2 = 80000031: v = 2^31, r = 0, signed",
    2324579048: "x2 = 00000000: v = 1, the largest r",
    1102492039: "x0 = ffffffff: v = 1, the largest r, signed",
    38631491: "x0 = 5a82795a: least mantissa of an interval",
    181874563: "x0 = d2bec35d: least mantissa, signed",
    61220037: "x0 = 16a09e3d: greatest mantissa of an interval",
    118461223: "x2 = e95f61cf: greatest mantissa, signed",
}


def _term(kind: str, seed: int, draw: int, decay: float, *scales: float) -> str:
    return " ".join([kind, str(seed), str(draw), _fp32(decay), str(len(scales)), *map(_fp32, scales)])


def _apply(tensor: int, offset: int, n: int, *terms: str) -> str:
    return " ".join(["apply", str(tensor), str(offset), str(n), str(len(terms)), *terms])


def lines() -> Iterator[str]:
    """Yield answers.txt, line by line."""

    def ask(request: str) -> str:
        return f"{request} = {answer(request)}"

    yield from HEADER.splitlines()
    yield "\n# Philox"
    yield from PHILOX.splitlines()
    for stream in STREAMS:
        for window in ("0", "1", "0x80000000", "0xffffffff"):
            yield ask(f"subkey {stream} {window}")
    yield ask("subkey 0x299f31d0a4093822 0x13198a2e 0x85a308d3243f6a88 0x03707344")  # the digits of pi again
    for stream, block in [(MAIN, 0), (MAIN, 2**28 - 1), (MAIN, 2**28), (MAIN, 2**57 + 12345), (STREAMS[4], 77)]:
        yield ask(f"words {stream} {block}")

    yield "\n# Normals"
    for stream in STREAMS:
        yield ask(f"normal {stream} 0 64")
    for offset in [*OFFSETS, *FAR]:
        yield ask(f"normal {MAIN} {offset} 17")
    for offset, what in EDGES.items():
        yield f"# {what}"
        yield ask(f"normal 7 11 13 {offset} 17")
    yield ask(f"normal_crc {MAIN} 0 256")
    yield ask(f"normal_crc {STREAMS[5]} {2**34 - 2**19 - 21} 16")

    yield "\n# Rademacher"
    for stream in STREAMS:
        yield ask(f"rademacher {stream} 0 2100")
    for offset in [*OFFSETS, *FAR]:
        yield ask(f"rademacher {MAIN} {offset} 17")
    yield ask(f"rademacher_crc {MAIN} 0 64")
    yield ask(f"rademacher_crc {STREAMS[5]} {2**39 - 2**17 - 21} 4")

    yield "\n# What is done with them"
    yield ask(f"shrink {_fp32(1e-3)} 70001")
    n = 150_001
    yield ask(_apply(3, 0, n, _term("normal", 42, 7, 0, 1e-3)))
    yield ask(_apply(3, 5, n, _term("normal", 42, 7, 1e-5, -2.5e-4), _term("normal", 42, 8, 0, 1e-3)))
    yield ask(_apply(4, 100_003, n, _term("normal", 42, 9, 1e-4, 1e-3, -2e-3, 1.1e-3)))
    yield ask(_apply(4, 33, n, _term("rademacher", 42, 9, 1e-4, 1e-3, -2e-3, 1.1e-3)))
    yield ask(_apply(5, 0, n, _term("rademacher", 2**40 + 1, 2**33 + 5, 0, 0.125)))
    yield ask(_apply(6, 77, n, _term("normal", 0, 0, 0.25)))
    yield ask(
        _apply(6, 1, n, _term("normal", 5, 1, 2.0**-20, 2.0**-133, -(2.0**-149)), _term("normal", 5, 2, 0, 3e-40))
    )
    yield ask(_apply(7, 2**34 - 70_001, n, _term("normal", 9, 3, 0, 0.5, -0.5), _term("normal", 10, 3, 0, 1e-2)))
    far = [_term("rademacher", 9, 4, 0, 1e-3, 1e-3), _term("normal", 9, 5, 1e-3, 1e-3), _term("rademacher", 9, 6, 0, 7)]
    yield ask(_apply(0xFFFFFFFF, 2**39 - 70_001, n, *far))
    yield ask(_apply(8, 2**63 - 70_001, n, *far))

    yield "\n# 16-bit weights"
    mezo = [
        _term("normal", 3, 1, 1e-3, 1e-3, -2e-3, 1.03e-3) + " stochastic",
        _term("normal", 3, 2, 0, 1e-3) + " nearest",
    ]
    fzoo = [
        _term("rademacher", 4, 1, 0, 1e-3, -1e-3) + " nearest",
        _term("rademacher", 4, 1, 0, 3e-6) + " later",
        _term("rademacher", 4, 2, 2.0**-10, -2e-5) + " stochastic",
    ]
    large = [_term("normal", 5, 1, 0, 30000.0) + " stochastic", _term("rademacher", 5, 2, -1.0, 5e-7) + " nearest"]
    small = [_term("normal", 6, number, 0, 2.0 ** -(24 + number)) + " stochastic" for number in range(4)]
    for storage in "float16", "bfloat16":
        for offset, terms in (
            (0, mezo),
            (2**34 - 70_001, mezo),
            (5, fzoo),
            (2**39 - 70_001, fzoo),
            (1, large),
            (0, small),
        ):
            yield ask(f"apply16 {storage} 9 {offset} {n} {len(terms)} {' '.join(terms)}")

    yield "\n# Momentum"
    step = [
        "gather " + _term("normal", 3, 0, 0.1) + " nearest",
        "shift " + _term("normal", 3, 1, 0, 1e-3) + " nearest",
        "gather " + _term("normal", 3, 1, 0, -0.03, 2e-4) + " nearest",
        "gather " + _term("rademacher", 3, 2, 0.5, 0.0625) + " nearest",
        "follow " + _term("normal", 3, 2, 1e-3, -1e-2) + " stochastic",
        "shift " + _term("normal", 3, 3, 0, 1e-3) + " nearest",
    ]
    parts = [
        "follow " + _term("normal", 4, 1, 0, 0.5, -0.25, 1e-3) + " later",
        "shift " + _term("rademacher", 4, 2, 0, 1e-3, -1e-3) + " later",
        "gather " + _term("rademacher", 4, 2, 0, 2.0**-140) + " stochastic",
    ]
    for storage in "float32", "float16", "bfloat16":
        for offset, terms in (0, step), (37, step), (2**34 - 70_001, step), (5, parts), (2**39 - 70_001, parts):
            yield ask(f"momentum {storage} 10 {offset} {n} {len(terms)} {' '.join(terms)}")

    yield "\n# Products"
    vectors = [
        [_term("normal", 3, 5, 0, 1e-3), _term("normal", 3, 6, 0, -0.25), _term("rademacher", 3, 7, 0, 0.5)],
        [_term("normal", 3, 5, 0, 1)],
        [_term("rademacher", 3, 7, 0, 1)],
        [_term("normal", 3, 6, 0.125, 1, 2.0**-130), _term("normal", 4, 6, 0, 2e20)],
    ]
    for offset, n in (0, 1), (15, 3), (0, 2049), (63, 150_001), (2**34 - 70_001, 150_001), (2**39 - 70_001, 90_000):
        made = [f"{len(terms)} {' '.join(terms)}" for terms in vectors]
        yield ask(f"products 11 {offset} {n} {len(made)} {' '.join(made)}")

    yield "\n# Low rank"
    # Shapes around lanes, blocks and rectangles; the ranks that kernels unroll, and others.
    shapes = [(1, 64), (64, 1), (9, 17), (300, 130), (65, 640), (2, 5000), (3000, 10)]
    for rank, (rows, columns) in zip((1, 2, 3, 4, 5, 16, 2), shapes, strict=True):
        step = [
            f"{_term('normal', 3, 2**40 + 7, 1e-3, 1e-3, -2e-3, 1.03e-3)} stochastic {rank} 2",
            f"{_term('normal', 3, 2**40 + 8, 0, 1e-3)} nearest {rank} 2",
        ]
        other = [
            f"{_term('rademacher', 4, 1, 0, 2.0**-130, 1e-3)} later {rank} {2**64 - 1}",
            f"{_term('normal', 4, 1, 0)} nearest {rank} 5",
            f"{_term('normal', 4, 1, 0.25, -1e-3)} stochastic {rank} 5",
        ]
        for storage in "float32", "float16", "bfloat16":
            for terms in step, other:
                yield ask(f"low_rank {storage} 12 {rows} {columns} {len(terms)} {' '.join(terms)}")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m vectors.generate", description="Write the answer file.")
    parser.add_argument("-o", "--output", type=Path, help="the file to write; standard output if not given")
    output: Path | None = parser.parse_args().output
    text = "\n".join(lines()) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        beside = output.with_name(output.name + ".new")
        beside.write_text(text, encoding="ascii")
        beside.replace(output)


if __name__ == "__main__":
    main()
