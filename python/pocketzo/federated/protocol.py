"""The bytes of the messages between the server of a federation and its clients.

All numbers are little-endian; every message ends with the CRC-32 of the bytes before it. An *offer* of the server is

========  ============================================================================================================
bytes     content
========  ============================================================================================================
4         ``PZO1``
u64       id of the offer, a random number, which the answer repeats
u32       the steps before the first entry
u32       number of entries
u32       length of the plan, 0 if it is left out
u64       the first draw to evaluate
u32       number of draws to evaluate, which count up; 0 for a client that only catches up
u8        1 if an evaluation is wanted, else 0
32        SHA-256 of the plan and all entries of the run up to the last one here
32        SHA-256 of the trained state after that entry (:func:`pocketzo.federated.state.state_sha256`)
..        the plan, a JSON object
..        the entries, as in a journal, without their CRC-32
========  ============================================================================================================

and a client's *answer*

========  ============================================================================================================
4         ``PZA1``
u64       id of the offer
u32       number of examples to count with
u32       number of evaluated examples, 0 for no evaluation
f32       value of the plan's metric on them, else 0
f32       loss at the weights; NaN if it is not given
u32       number of scalars
n f32     the scalars, in the order of the draws
========  ============================================================================================================

A client that misses entries before those of the offer answers with its *position*: ``PZP1``, u64 id, u8 1 if it knows
the plan, u32 its steps, and the 32 bytes of the chain there. A client that refuses an offer answers with a *refusal*:
``PZR1``, u64 id, u8 reason (:class:`Reason`).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self, TypeAlias

from pocketzo.errors import FederationError
from pocketzo.formats.journal import Entry, pack_entry, unpack_entries

SHA256: Final = 32
_OFFER: Final = struct.Struct("<4sQIIIQIB32s32s")
_ANSWER: Final = struct.Struct("<4sQIIffI")
_POSITION: Final = struct.Struct("<4sQBI32s")
_REFUSAL: Final = struct.Struct("<4sQB")
_CRC: Final = struct.Struct("<I")
_MAGIC: Final = {"offer": b"PZO1", "answer": b"PZA1", "position": b"PZP1", "refusal": b"PZR1"}


class Reason(IntEnum):
    """Why a client refuses an offer. It says no more, as a message could hold names of files."""

    MALFORMED = 1
    """The bytes are no offer."""
    CONTRADICTION = 2
    """The offer contradicts the plan, the journal or the weights of the client, or asks for more than it grants."""
    FAILURE = 3
    """The directions could not be evaluated."""


@dataclass(frozen=True)
class Offer:
    """What a client is asked to do in a round, and the entries that it may miss.

    Attributes
    ----------
    id : int
    step : int
        The steps before the first entry.
    entries : sequence of Entry
    draws : range
        The directions to evaluate after them; empty for a client that only catches up.
    wants_evaluation : bool
    chain, state : bytes
        SHA-256 after the last entry: of plan and entries, and of the trained state.
    plan : bytes
        Empty if the client knows it.
    """

    id: int
    step: int
    entries: Sequence[Entry]
    draws: range
    wants_evaluation: bool
    chain: bytes
    state: bytes
    plan: bytes = b""

    @property
    def end(self) -> int:
        """The steps up to its last entry."""
        return self.step + len(self.entries)

    def encode(self) -> bytes:
        """Return the bytes of the message."""
        head = _OFFER.pack(
            _MAGIC["offer"],
            self.id,
            self.step,
            len(self.entries),
            len(self.plan),
            self.draws.start,
            len(self.draws),
            self.wants_evaluation,
            self.chain,
            self.state,
        )
        return _sealed(head + self.plan + b"".join(map(pack_entry, self.entries)))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse a message; raise a :class:`FederationError` that says what is wrong with it."""
        body = _opened(data, "offer", _OFFER.size)
        _, number, step, count, length, draw, draws, wanted, chain, state = _OFFER.unpack_from(body)
        rest = body[_OFFER.size :]
        if wanted > 1:
            raise _malformed("offer", f"whether an evaluation is wanted is {wanted}, expected 0 or 1")
        if length > len(rest):
            raise _malformed("offer", f"its plan ends after {len(rest)} bytes, expected {length}")
        if draw + draws > 2**64:
            raise _malformed("offer", f"{draws} draws from {draw} on are more than there are")
        try:
            entries = unpack_entries(rest[length:], count)
        except ValueError as error:
            raise _malformed("offer", str(error)) from None
        return cls(number, step, entries, range(draw, draw + draws), bool(wanted), chain, state, rest[:length])


@dataclass(frozen=True)
class Answer:
    """What a client has found.

    Attributes
    ----------
    id : int
        Of the offer.
    scalars : sequence of float
        float32 numbers, the estimate of each direction.
    examples : int
        With how many examples they count.
    evaluated : int
        Number of evaluated examples; 0 for no evaluation.
    value : float
        The plan's metric on them.
    loss : float
        At the weights; NaN if it is not given.
    """

    id: int
    scalars: Sequence[float]
    examples: int
    evaluated: int = 0
    value: float = 0.0
    loss: float = math.nan

    def encode(self) -> bytes:
        """Return the bytes of the message."""
        head = _ANSWER.pack(
            *(_MAGIC["answer"], self.id, self.examples, self.evaluated, self.value, self.loss, len(self.scalars))
        )
        return _sealed(head + struct.pack(f"<{len(self.scalars)}f", *self.scalars))

    @classmethod
    def _decode(cls, body: bytes) -> Self:
        _, number, examples, evaluated, value, loss, count = _ANSWER.unpack_from(body)
        if len(body) != _ANSWER.size + 4 * count:
            raise _malformed("answer", f"{count} scalars in {len(body) - _ANSWER.size} bytes, expected {4 * count}")
        return cls(number, struct.unpack_from(f"<{count}f", body, _ANSWER.size), examples, evaluated, value, loss)


@dataclass(frozen=True)
class Position:
    """How far a client is that cannot use an offer.

    Attributes
    ----------
    id : int
        Of the offer.
    knows_plan : bool
    step : int
    chain : bytes
        SHA-256 of the plan and the entries up to there.
    """

    id: int
    knows_plan: bool
    step: int
    chain: bytes

    def encode(self) -> bytes:
        """Return the bytes of the message."""
        return _sealed(_POSITION.pack(_MAGIC["position"], self.id, self.knows_plan, self.step, self.chain))

    @classmethod
    def _decode(cls, body: bytes) -> Self:
        _, number, knows, step, chain = _POSITION.unpack(body)
        if knows > 1:
            raise _malformed("position", f"whether the plan is known is {knows}, expected 0 or 1")
        return cls(number, bool(knows), step, chain)


@dataclass(frozen=True)
class Refusal:
    """That a client refuses an offer.

    Attributes
    ----------
    id : int
        Of the offer; 0 if that could not be read.
    reason : Reason
    """

    id: int
    reason: Reason

    def encode(self) -> bytes:
        """Return the bytes of the message."""
        return _sealed(_REFUSAL.pack(_MAGIC["refusal"], self.id, self.reason))

    @classmethod
    def _decode(cls, body: bytes) -> Self:
        _, number, reason = _REFUSAL.unpack(body)
        if reason not in list(Reason):
            raise _malformed("refusal", f"its reason is {reason}, expected {', '.join(map(str, map(int, Reason)))}")
        return cls(number, Reason(reason))


Reply: TypeAlias = Answer | Position | Refusal
_REPLIES: Final[dict[str, tuple[type[Answer] | type[Position] | type[Refusal], int, bool]]] = {
    "answer": (Answer, _ANSWER.size, False),
    "position": (Position, _POSITION.size, True),
    "refusal": (Refusal, _REFUSAL.size, True),
}


def decode_reply(data: bytes) -> Reply:
    """Parse a message of a client; raise a :class:`FederationError` that says what is wrong with it."""
    name = next((name for name in _REPLIES if data[:4] == _MAGIC[name]), None)
    if name is None:
        raise FederationError(f"no message of a client, which begins with PZA1, PZP1 or PZR1; got {data[:4]!r}")
    kind, size, is_whole = _REPLIES[name]
    body = _opened(data, name, size)
    if is_whole and len(body) != size:
        raise _malformed(name, f"{len(body)} bytes, expected {size}")
    return kind._decode(body)


def _sealed(body: bytes) -> bytes:
    return body + _CRC.pack(zlib.crc32(body))


def _opened(data: bytes, name: str, least: int) -> bytes:
    if data[:4] != _MAGIC[name]:
        raise FederationError(f"no {name}, which begins with {_MAGIC[name]!r}; got {data[:4]!r}")
    if len(data) < least + _CRC.size:
        raise _malformed(name, f"{len(data)} bytes, expected at least {least + _CRC.size}")
    body = data[: -_CRC.size]
    crc, (stored,) = zlib.crc32(body), _CRC.unpack(data[-_CRC.size :])
    if crc != stored:
        raise _malformed(name, f"its checksum is {crc:08x}, expected {stored:08x}")
    return body


def _malformed(name: str, why: str) -> FederationError:
    return FederationError(f"a malformed {name}: {why}")
