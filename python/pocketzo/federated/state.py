"""A checksum of what training has changed, by which devices compare their weights."""

from __future__ import annotations

import hashlib

import numpy as np

from pocketzo.optim.optimizer import Optimizer


def state_sha256(optimizer: Optimizer) -> bytes:
    """Return the SHA-256 of the trained tensors and of the method's state.

    Of each trained tensor, in the order of the bundle, and then of each array of the method's state by name: the name
    in UTF-8, a byte 0, and the elements in row-major order and little-endian.
    """
    digest = hashlib.sha256()
    weights = optimizer.model.weights
    for name in optimizer.names:
        digest.update(name.encode() + b"\0")
        for block in weights.blocks(name):
            digest.update(np.ascontiguousarray(block).data)
    for name, array in sorted(optimizer.state().items()):
        digest.update(name.encode() + b"\0")
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
