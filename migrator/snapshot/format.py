"""Sealed objects: msgpack maps that end in the digest of all bytes before it, and the limits on what is read.

An object is one msgpack map with text keys. Its last entry is `digest`, a bin 8 of 16 bytes: XXH3-128 (seed 0,
canonical big-endian form, https://github.com/Cyan4973/xxHash) of every byte of the object before those 16. So whatever
is in an object, also fields that a reader does not know, is covered, and damage is found before anything is decoded.
The digest finds damage, not malice: each field is checked as if nobody had sealed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgpack
import xxhash

from migrator.errors import Corrupt, Incompatible, SnapshotError

MAGIC = "vm-netstate-snapshot"
FORMAT_VERSION = 1

SECTION_BYTES = 1 << 20
"""A section is at most this long, sealed."""

BODY_BYTES = SECTION_BYTES - 4096
"""A section's body is at most this long before compression."""

OBJECT_BYTES = SECTION_BYTES + 4096
"""A reader takes no object longer than this."""

ITEMS_MAX = 16_384
"""Elements of one list or map: bounds what a forged length can make the decoder set aside (it nests 1024 deep)."""

DEPTH_MAX = 8
"""Lists and maps within a record nest at most this deep."""

_DIGEST_HEAD = b"\xa6digest\xc4\x10"
_DIGEST_BYTES = 16
_TAIL = len(_DIGEST_HEAD) + _DIGEST_BYTES


def pack(value: object) -> bytes:
    """Msgpack of `value`; integers must fit 64 bits. Raises SnapshotError."""
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True)
    except (OverflowError, ValueError, TypeError) as error:
        raise SnapshotError(f"cannot be written: {error}") from error
    return packed


def seal(fields: Mapping[str, object]) -> bytes:
    """`fields` as one sealed object."""
    packer = msgpack.Packer(use_bin_type=True, autoreset=False)
    packer.pack_map_header(len(fields) + 1)
    for name, value in fields.items():
        packer.pack(name)
        packer.pack(value)
    head = b"".join((packer.getbuffer(), _DIGEST_HEAD))
    return head + xxhash.xxh3_128_digest(head)


def digest_of(sealed: bytes) -> bytes:
    """The 16 digest bytes of a sealed object."""
    return bytes(sealed[-_DIGEST_BYTES:])


def unseal(sealed: bytes) -> dict[str, Any]:
    """Fields of a sealed object, without the digest. Raises Corrupt."""
    if len(sealed) > OBJECT_BYTES:
        raise Corrupt(f"an object of {len(sealed)} bytes: at most {OBJECT_BYTES} are taken")
    view = memoryview(sealed)
    tail = bytes(view[-_TAIL:])
    if not tail.startswith(_DIGEST_HEAD) or len(tail) != _TAIL:
        raise Corrupt("the object does not end in its digest", field="digest")
    if xxhash.xxh3_128_digest(view[:-_DIGEST_BYTES]) != tail[-_DIGEST_BYTES:]:
        raise Corrupt("the digest does not match: the bytes were changed on the way", field="digest")
    fields = unpack(sealed)
    if not isinstance(fields, dict):
        raise Corrupt(f"an object has to be a map, this is {_sort(fields)}")
    fields.pop("digest", None)
    return fields


def refuse_newer(sealed: bytes) -> None:
    """Raise Incompatible when `sealed` is the header of a newer format version, however that seals its objects."""
    try:
        fields = unpack(sealed)
    except SnapshotError:
        return
    if isinstance(fields, dict) and fields.get("magic") == MAGIC:
        version = fields.get("format")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise Incompatible(
                f"snapshot format {version}; this reader knows {FORMAT_VERSION}",
                field="format",
                hint="read it with a version of the migrator at least as new as the one that wrote it",
            )


def unpack(data: bytes) -> Any:
    """One msgpack value that fills `data`; text is UTF-8, keys are text and unique. Raises Corrupt."""
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            object_pairs_hook=_unique,
            max_str_len=len(data),
            max_bin_len=len(data),
            max_array_len=ITEMS_MAX,
            max_map_len=ITEMS_MAX,
            max_ext_len=0,
        )
    except SnapshotError:
        raise
    except UnicodeDecodeError as error:
        raise Corrupt("text that is not UTF-8") from error
    except msgpack.ExtraData as error:
        raise Corrupt("bytes behind the end of the object") from error
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise Corrupt(f"not msgpack that a snapshot may hold: {error or type(error).__name__}") from error


def _unique(pairs: Iterable[tuple[object, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if not isinstance(name, str):
            raise Corrupt(f"a field name has to be text, this is {_sort(name)}")
        if name in fields:
            raise Corrupt("the field comes twice", field=name[:64])
        fields[name] = value
    return fields


_REQUIRED = object()


class Fields:
    """Typed access to the fields of an object: each wrong or missing one raises Corrupt with its name."""

    def __init__(self, fields: Mapping[str, Any], prefix: str = "") -> None:
        self._fields = fields
        self._prefix = prefix

    def take(self, name: str, kind: type, default: object = _REQUIRED) -> Any:
        """Value of field `name`, which has exactly type `kind` (a bool is no int)."""
        value = self._fields.get(name, default)
        if value is _REQUIRED:
            raise Corrupt("the field is missing", field=self._prefix + name)
        if type(value) is not kind and value is not default:
            raise Corrupt(f"has to be {kind.__name__}, is {_sort(value)}", field=self._prefix + name)
        return value

    def integer(self, name: str, low: int, high: int, default: object = _REQUIRED) -> int:
        """Integer of `low` to `high`, both included."""
        value: int = self.take(name, int, default)
        if not low <= value <= high:
            raise Corrupt(f"{value} is outside {low}..{high}", field=self._prefix + name)
        return value

    def text(self, name: str, default: object = _REQUIRED, *, length: int = 255) -> str:
        """Text of at most `length` characters."""
        value: str = self.take(name, str, default)
        if len(value) > length:
            raise Corrupt(f"text of {len(value)} characters: at most {length}", field=self._prefix + name)
        return value


def _sort(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
