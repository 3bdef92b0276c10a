"""Mark and label of a connection, as rules and operators write them: `VALUE` or `VALUE/MASK`, decimal or 0x….

A mark has 32 bits and a label 128, as those of Linux and Open vSwitch (ct_mark, ct_label). Without a mask all bits
count.
"""

from __future__ import annotations

import re

MARK_BITS, LABEL_BITS = 32, 128

_NUMBER = r"(0[xX][0-9a-fA-F]{1,32}|[0-9]{1,39})"
_WORD = re.compile(rf"{_NUMBER}(?:/{_NUMBER})?", re.ASCII)


def parse(text: str, bits: int) -> tuple[int, int]:
    """(value, mask) of `text`. Raises ValueError that says what was expected."""
    match = _WORD.fullmatch(text)
    if match is None:
        raise ValueError("expected VALUE or VALUE/MASK, such as 7 or 0x10/0xff")
    every = (1 << bits) - 1
    value = _number(match[1])
    mask = every if match[2] is None else _number(match[2])
    if value > every or mask > every:
        raise ValueError(f"expected at most {bits} bits")
    if value & ~mask:
        raise ValueError(f"expected no bit of {value:#x} outside its mask {mask:#x}")
    return value, mask


def _number(text: str) -> int:
    return int(text, 16) if text[:2].lower() == "0x" else int(text)


def normal(text: str, bits: int) -> str:
    """One text for each meaning, "" for "". Raises ValueError."""
    if not text:
        return ""
    value, mask = parse(text, bits)
    return f"{value:#x}" if mask == (1 << bits) - 1 else f"{value:#x}/{mask:#x}"


def mark(text: str) -> str:
    """`normal` of a mark."""
    return normal(text, MARK_BITS)


def label(text: str) -> str:
    """`normal` of a label."""
    return normal(text, LABEL_BITS)
