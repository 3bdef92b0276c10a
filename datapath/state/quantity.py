"""Rates and sizes as people write them: "100mbit", "64KiB", or a plain number."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_NUMBER = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z/]*)", re.ASCII)
_RATES = {"": 1, "bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATES |= {f"{unit}/s": factor for unit, factor in _RATES.items() if unit}
_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def rate_bps(value: object) -> int:
    """Bits per second of 100000000, "100mbit" or "1.5 gbit/s" (powers of 1000). Raises ValueError."""
    return _amount(value, _RATES, 'expected a rate such as "100mbit", "1.5gbit" or a number of bits per second')


def size_bytes(value: object) -> int:
    """Bytes of 65536, "64KiB" (powers of 1024) or "64KB" (powers of 1000). Raises ValueError."""
    return _amount(value, _SIZES, 'expected a size such as "64KiB", "2MB" or a number of bytes')


def _amount(value: object, units: dict[str, int], expected: str) -> int:
    if type(value) is int and value >= 0:
        return value
    found = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or found[2].lower() not in units:
        raise ValueError(expected)
    whole, _, part = found[1].partition(".")
    scale: int = 10 ** len(part)
    return int(f"{whole}{part}") * units[found[2].lower()] // scale


Rate = Annotated[int, BeforeValidator(rate_bps)]
Size = Annotated[int, BeforeValidator(size_bytes)]
