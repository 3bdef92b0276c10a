"""Sections: a table of one kind of one port, cut into sealed objects of at most SECTION_BYTES."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash
import zstandard

from datapath.registry import KINDS
from datapath.state.kind import Kind, Op, Table
from migrator.errors import Corrupt, Incompatible, SnapshotError
from migrator.snapshot.columns import decode_columns, encode_columns
from migrator.snapshot.format import BODY_BYTES, Fields, digest_of, seal, unpack, unseal
from migrator.snapshot.records import decode_records, encode_records

CODECS = ("none", "zstd")
ZSTD_LEVEL = 1

_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}\Z")
_U32 = (1 << 32) - 1
_U63 = (1 << 63) - 1


@dataclass(frozen=True)
class Section:
    """One section as it was read. `table` is None for an optional kind that is not known here: report it as skipped.

    `size` is the length of the sealed section in bytes. Columns of the table are read-only views.
    """

    kind: str
    version: int
    op: Op
    round: int
    port: str
    count: int
    size: int
    digest: bytes
    table: Table | None


class Tally:
    """Count, length and digest of sections in their order: what a round end and a trailer say about them."""

    def __init__(self) -> None:
        self.sections = 0
        self.records = 0
        self.bytes = 0
        self._digest = xxhash.xxh3_64()

    def add(self, sealed: bytes) -> None:
        """Add a section that was written. Its records are not counted: add the table's length to `records`."""
        self._add(digest_of(sealed), len(sealed))

    def add_section(self, section: Section) -> None:
        """Add a section that was read, with its records."""
        self._add(section.digest, section.size)
        self.records += section.count

    def _add(self, digest: bytes, size: int) -> None:
        self.sections += 1
        self.bytes += size
        self._digest.update(digest)

    @property
    def digest(self) -> int:
        """XXH3-64 over the digests of the sections in order, as an unsigned integer."""
        return int(self._digest.intdigest())


def encode_table(
    table: Table,
    port: str,
    round: int = 0,  # noqa: A002
    *,
    codec: str = "none",
    kinds: Mapping[str, Kind] = KINDS,
) -> Iterator[bytes]:
    """Sealed sections that hold `table` of the port with MAC `port`; none for an empty table.

    Raises SnapshotError, before the first section, for a table that is not what its kind says.
    """
    if codec not in CODECS:
        raise SnapshotError(f"no codec {codec!r}", hint=f"one of {', '.join(CODECS)}")
    kind = kinds.get(table.kind)
    if kind is None:
        raise SnapshotError(f"no kind {table.kind!r} is known", hint=f"known: {', '.join(kinds)}")
    version = kind.version if table.records is None else kind.version_of(table.records)
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True) if codec == "zstd" else None
    for count, body in _bodies(kind, table):
        packed = compressor.compress(body) if compressor else body
        use = compressor is not None and len(packed) < len(body)
        yield seal(
            {
                "object": "section",
                "kind": kind.name,
                "version": version,
                **({} if kind.required else {"optional": True}),
                "op": str(table.op),
                "round": round,
                "port": port,
                "port_time_ns": table.port_time_ns,
                "count": count,
                "codec": "zstd" if use else "none",
                "size": len(body),
                "body": packed if use else body,
            }
        )


def _bodies(kind: Kind, table: Table) -> Iterator[tuple[int, bytes]]:
    if kind.columns:
        if table.columns is None:
            raise SnapshotError(f"kind {kind.name} has columns, the table has none")
        return encode_columns(kind, table.op, table.columns)
    if table.records is None:
        raise SnapshotError(f"kind {kind.name} has records, the table has none")
    return encode_records(kind, table.op, table.records)


def decode_section(
    sealed: bytes, *, number: int | None = None, offset: int | None = None, kinds: Mapping[str, Kind] = KINDS
) -> Section:
    """The section in `sealed`, every part of it checked against its kind.

    `number` and `offset` say where it was, for errors. Raises Corrupt, or Incompatible for a required kind that is
    not known or is of a newer version.
    """
    try:
        return _section(sealed, unseal(sealed), kinds)
    except SnapshotError as error:
        error.section = number
        error.offset = offset
        raise


def _section(sealed: bytes, raw: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Section:
    fields = Fields(raw)
    if fields.text("object") != "section":
        raise Corrupt(f"a {raw['object']!r} object where a section belongs", field="object")
    name, version = fields.text("kind"), fields.integer("version", 1, _U32)
    op = fields.text("op")
    if op not in tuple(Op):
        raise Corrupt(f"no operation {op[:32]!r}", field="op")
    port = fields.text("port")
    if not _MAC.match(port):
        raise Corrupt("not a MAC in lower case", field="port")
    count = fields.integer("count", 0, _U32)
    port_time_ns = fields.integer("port_time_ns", 0, _U63)
    body = _plain(fields)
    known = known_kind(name, version, optional=fields.take("optional", bool, False), kinds=kinds)
    table = None if known is None else _table(known, Op(op), body, count, port_time_ns)
    return Section(
        kind=name,
        version=version,
        op=Op(op),
        round=fields.integer("round", 0, _U32),
        port=port,
        count=count,
        size=len(sealed),
        digest=digest_of(sealed),
        table=table,
    )


def known_kind(name: str, version: int, *, optional: bool, kinds: Mapping[str, Kind]) -> Kind | None:
    """The kind to read `name` with; None to skip an optional one. Raises Incompatible for a required one."""
    kind = kinds.get(name)
    if kind is not None and version <= kind.version:
        return kind
    if optional:
        return None
    if kind is None:
        raise Incompatible(f"kind {name!r} is not known here", field="kind", hint="upgrade the migrator on this host")
    raise Incompatible(
        f"kind {name} version {version}; this host knows {kind.version}",
        field="version",
        hint="upgrade the migrator on this host",
    )


def _table(kind: Kind, op: Op, body: bytes, count: int, port_time_ns: int) -> Table:
    content = unpack(body)
    if kind.columns:
        return Table(kind.name, op, columns=decode_columns(kind, op, content, count), port_time_ns=port_time_ns)
    return Table(kind.name, op, records=decode_records(kind, op, content, count), port_time_ns=port_time_ns)


def _plain(fields: Fields) -> bytes:
    """The body without its codec: never longer than BODY_BYTES, whatever a forged frame announces."""
    body: bytes = fields.take("body", bytes)
    codec, size = fields.text("codec"), fields.integer("size", 0, BODY_BYTES)
    if codec == "zstd":
        body = _decompressed(body, size)
    elif codec != "none":
        raise Incompatible(f"no codec {codec[:32]!r} here", field="codec", hint="upgrade the migrator on this host")
    if len(body) != size:
        raise Corrupt(f"{len(body)} bytes where {size} were announced", field="body")
    return body


def _decompressed(body: bytes, size: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(body)
        if frame.content_size != size:
            raise Corrupt("the zstd frame is not of the announced size", field="body")
        plain: bytes = zstandard.ZstdDecompressor().decompress(body, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"not a zstd frame: {error}", field="body") from error
    return plain
