"""BTF, the type information of the BPF object and of pinned maps, as NumPy dtypes and constants.

Read here and not by libbpf so that one reader serves an object that is not loaded and maps that an older object made.
Source: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datapath.errors import FeatureMissing

OBJECT = Path(__file__).resolve().parents[2] / "bpf" / "switch.bpf.o"

_MAGIC = 0xEB9F
_INT, _POINTER, _ARRAY, _STRUCT, _UNION, _ENUM, _VAR, _DATASEC, _ENUM64 = 1, 2, 3, 4, 5, 6, 14, 15, 19
_ALIASES = (8, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type tag
_TAIL = {_INT: 4, _ARRAY: 12, _VAR: 4, 17: 4}  # bytes behind the header of a type
_EACH = {_STRUCT: 12, _UNION: 12, _ENUM: 8, 13: 8, _DATASEC: 12, _ENUM64: 12}  # and a member
_SIGNED = 1
_BIG_ENDIAN = "__be"  # typedefs __be16, __be32, __be64


@dataclass(frozen=True)
class _Type:
    kind: int
    name: str
    size: int  # or the type that it refers to
    tail: bytes


@dataclass(frozen=True)
class InnerMap:
    """What a map of maps says of the tables in it: enum bpf_map_type, flags, and the types of keys and values."""

    type: int
    entries: int
    flags: int
    key: int
    value: int


@dataclass(frozen=True)
class Btf:
    """All types of one object. `types[i]` has id i; 0 is void."""

    types: list[_Type] = field(repr=False)
    strings: bytes = field(repr=False)

    @cached_property
    def structures(self) -> Mapping[str, np.dtype[Any]]:
        """Layout of each named structure that holds no pointer."""
        found = {}
        for number, item in enumerate(self.types):
            if item.kind == _STRUCT and item.name:
                dtype = self.dtype(number)
                if dtype is not None:
                    found[item.name] = dtype
        return found

    @cached_property
    def constants(self) -> Mapping[str, int]:
        """Value of each enumerator."""
        return {name: value for item in self.types for name, value in self._enumerators(item)}

    def dtype(self, number: int) -> np.dtype[Any] | None:
        """NumPy dtype of a type; None if it has no fixed layout (pointers, functions, bit fields)."""
        item = self.types[number]
        if item.kind in _ALIASES:
            inner = self.dtype(item.size)
            return inner.newbyteorder(">") if inner is not None and item.name.startswith(_BIG_ENDIAN) else inner
        if item.kind in (_INT, _ENUM, _ENUM64):
            signed = item.kind == _INT and struct.unpack("=I", item.tail)[0] >> 24 & _SIGNED
            return np.dtype(f"{'<i' if signed else '<u'}{item.size}")
        if item.kind == _ARRAY:
            element, _, length = struct.unpack("=3I", item.tail)
            inner = self.dtype(element)
            return None if inner is None else np.dtype((inner, (length,)))
        return self._compound(item) if item.kind in (_STRUCT, _UNION) else None

    def inner_map(self, name: str) -> InnerMap | None:
        """Declaration of the tables in a map of maps (libbpf's __array(values, …)); None where there is none."""
        outer = next((item.size for item in self.types if item.kind == _VAR and item.name == name), 0)
        values = self._members(outer).get("values")
        if values is None:
            return None
        element = struct.unpack("=3I", self.types[values].tail)[0]
        inner = self._members(self.types[element].size)
        number = {name: self._number(inner[name]) for name in ("type", "max_entries", "map_flags") if name in inner}
        key, value = self.types[inner["key"]].size, self.types[inner["value"]].size
        return InnerMap(number["type"], number["max_entries"], number.get("map_flags", 0), key, value)

    def _members(self, number: int) -> dict[str, int]:
        """Member -> its type, of a structure."""
        item = self.types[number]
        found = struct.iter_unpack("=3I", item.tail) if item.kind == _STRUCT else ()
        return {self._string(name): type_ for name, type_, _ in found}

    def _number(self, pointer: int) -> int:
        """libbpf's __uint(name, N) is a pointer to an array of N."""
        return int(struct.unpack("=3I", self.types[self.types[pointer].size].tail)[2])

    def _compound(self, item: _Type) -> np.dtype[Any] | None:
        names, formats, offsets = [], [], []
        for name, number, offset in struct.iter_unpack("=3I", item.tail):
            inner = self.dtype(number)
            if inner is None or offset % 8 or offset >> 24:
                return None
            names.append(self._string(name))
            formats.append(inner)
            offsets.append(offset // 8)
        if not names or "" in names:
            return None
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": item.size})

    def _enumerators(self, item: _Type) -> Iterator[tuple[str, int]]:
        if item.kind == _ENUM:
            for name, value in struct.iter_unpack("=Ii", item.tail):
                yield self._string(name), value
        elif item.kind == _ENUM64:
            for name, low, high in struct.iter_unpack("=3I", item.tail):
                yield self._string(name), high << 32 | low

    def _string(self, offset: int) -> str:
        return self.strings[offset : self.strings.index(b"\0", offset)].decode()


def parse(raw: bytes) -> Btf:
    """Read a .BTF section. Raises ValueError when it is none."""
    if len(raw) < 24 or struct.unpack_from("=H", raw)[0] != _MAGIC:
        raise ValueError("no BTF of this machine's byte order")
    length, at, size, strings_at, strings_size = struct.unpack_from("=5I", raw, 4)
    strings = raw[length + strings_at : length + strings_at + strings_size]
    types = [_Type(0, "", 0, b"")]
    at, end = length + at, length + at + size
    while at < end:
        name, info, reference = struct.unpack_from("=3I", raw, at)
        kind, members = info >> 24 & 0x1F, info & 0xFFFF
        tail = _TAIL.get(kind, 0) + _EACH.get(kind, 0) * members
        text = strings[name : strings.index(b"\0", name)].decode()
        types.append(_Type(kind, text, reference, raw[at + 12 : at + 12 + tail]))
        at += 12 + tail
    return Btf(types, strings)


def read_object(path: Path = OBJECT) -> Btf:
    """BTF of a compiled BPF object. Raises FeatureMissing when it is not there or was compiled without `-g`."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FeatureMissing(f"{path} is not there", hint="build the BPF programs: make bpf") from None
    section = _section(raw, b".BTF")
    if section is None:
        raise FeatureMissing(f"{path} has no BTF", hint="compile it with clang -g")
    return parse(section)


def _section(elf: bytes, wanted: bytes) -> bytes | None:
    """Contents of a section of a 64-bit ELF file."""
    if elf[:5] != b"\x7fELF\x02":
        return None
    table, entry_size, entries, names_at = *struct.unpack_from("=Q", elf, 40), *struct.unpack_from("=3H", elf, 58)
    headers = [struct.unpack_from("=2I4Q", elf, table + index * entry_size) for index in range(entries)]
    names = headers[names_at][4]
    for name, _, _, _, offset, size in headers:
        start = names + name
        if elf[start : elf.index(b"\0", start)] == wanted:
            return elf[offset : offset + size]
    return None
