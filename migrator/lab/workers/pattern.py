# SPDX-License-Identifier: GPL-2.0-only
"""Bytes that anyone can predict from a stream's number and an offset: what TCP workers send and compare."""

from __future__ import annotations

import hashlib

_BLOCK = b"".join(hashlib.blake2b(n.to_bytes(4, "little")).digest() for n in range(16384))  # 1 MiB
_TWICE = memoryview(_BLOCK + _BLOCK)


def expected(stream: int, offset: int, length: int) -> memoryview:
    """`length` bytes (at most 1 MiB) of a stream from `offset` on."""
    start = (stream * 7919 + offset) % len(_BLOCK)
    return _TWICE[start : start + length]
