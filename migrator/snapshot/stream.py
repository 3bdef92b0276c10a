"""Whole snapshots: header, sections, trailer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgpack

from datapath.registry import KINDS
from datapath.state.kind import Kind, Table
from migrator.errors import Corrupt, SnapshotError
from migrator.snapshot.format import FORMAT_VERSION, MAGIC, OBJECT_BYTES, Fields, refuse_newer, seal, unseal
from migrator.snapshot.section import Section, Tally, decode_section, encode_table, known_kind

_U32 = (1 << 32) - 1
_U63 = (1 << 63) - 1
_CHUNK = 1 << 18


@dataclass(frozen=True)
class KindInfo:
    """What a header says of one kind. `optional`: who does not know it may skip it."""

    version: int
    optional: bool = False


@dataclass(frozen=True)
class Header:
    """What a snapshot is of. `ports` are MACs; `rules_max` and `connections` are what they may need (provider.Need)."""

    vm: str
    source: str
    driver: str
    kinds: Mapping[str, KindInfo]
    ports: Sequence[str] = ()
    rules_max: int = 0
    connections: int = 0


@dataclass
class Summary:
    """What was read so far: records by port and kind (of tables to load), kinds skipped, and the tally of all."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)


def snapshot(header: Header, tables: Iterable[tuple[str, Table]], *, codec: str = "zstd") -> Iterator[bytes]:
    """A whole snapshot of `tables`, each with the MAC of its port, object by object: what a file is made of.

    Raises SnapshotError for a table that is not what its kind says; what came until then has no trailer and so is
    no snapshot.
    """
    yield seal(
        {
            "magic": MAGIC,
            "format": FORMAT_VERSION,
            "object": "header",
            "vm": header.vm,
            "source": header.source,
            "driver": header.driver,
            "kinds": {name: _kind_fields(kind) for name, kind in header.kinds.items()},
            "ports": list(header.ports),
            "rules_max": header.rules_max,
            "connections": header.connections,
        }
    )
    tally, counts = Tally(), dict.fromkeys(header.kinds, 0)
    for port, table in tables:
        if table.kind not in header.kinds or port not in header.ports:
            raise SnapshotError(f"the header does not announce kind {table.kind} of port {port}")
        counts[table.kind] += len(table)
        tally.records += len(table)
        for sealed in encode_table(table, port, codec=codec):
            tally.add(sealed)
            yield sealed
    yield seal(
        {
            "object": "trailer",
            "counts": counts,
            "sections": tally.sections,
            "records": tally.records,
            "bytes": tally.bytes,
            "sections_digest": tally.digest,
        }
    )


def _kind_fields(kind: KindInfo) -> dict[str, object]:
    return {"version": kind.version, **({"optional": True} if kind.optional else {})}


class SnapshotReader:
    """Reads a snapshot from `stream`, one object in memory at a time.

    Making it reads the header. Raises Corrupt, Incompatible (newer format, unknown required kind).
    """

    def __init__(self, stream: BinaryIO, *, kinds: Mapping[str, Kind] = KINDS) -> None:
        self._kinds = kinds
        self._objects = _objects(stream)
        self.summary = Summary()
        offset, sealed = next(self._objects)
        with _at(None, offset):
            if MAGIC.encode() not in sealed[:64]:
                raise Corrupt("this is no snapshot", hint="`migrator checkpoint` writes one")
            refuse_newer(sealed)
            self.header = _header(Fields(unseal(sealed)))
            for name, info in self.header.kinds.items():
                if known_kind(name, info.version, optional=info.optional, kinds=kinds) is None:
                    self.summary.skipped[name] = 0

    def __iter__(self) -> Iterator[Section]:
        """Sections in order, those of unknown optional kinds left out and counted in `summary.skipped`.

        Checks the trailer and that nothing follows it before it ends.
        """
        summary = self.summary
        for offset, sealed in self._objects:
            number = summary.tally.sections
            if _is_trailer(sealed):
                with _at(number, offset):
                    self._finish(Fields(unseal(sealed)))
                return
            section = decode_section(sealed, number=number, offset=offset, kinds=self._kinds)
            with _at(number, offset):
                self._check(section)
            summary.tally.add_section(section)
            summary.counts[section.port, section.kind] = (
                summary.counts.get((section.port, section.kind), 0) + section.count
            )
            if section.table is None:
                summary.skipped[section.kind] = summary.skipped.get(section.kind, 0) + section.count
            else:
                yield section
        raise Corrupt("the snapshot is cut off: it has no trailer", section=summary.tally.sections)

    def _check(self, section: Section) -> None:
        info = self.header.kinds.get(section.kind)
        if info is None or info.version < section.version:
            raise Corrupt("the header does not announce this kind in this version", field="kind")
        if section.port not in self.header.ports:
            raise Corrupt(f"the header does not announce port {section.port}", field="port")

    def _finish(self, trailer: Fields) -> None:
        tally = self.summary.tally
        counts = dict.fromkeys(self.header.kinds, 0)
        for (_, kind), count in self.summary.counts.items():
            counts[kind] += count
        found = {"sections": tally.sections, "records": tally.records, "bytes": tally.bytes}
        for name, value in {**found, "sections_digest": tally.digest}.items():
            if trailer.integer(name, 0, (1 << 64) - 1) != value:
                raise Corrupt(f"the trailer says otherwise than {value}", field=name)
        if trailer.take("counts", dict) != counts:
            raise Corrupt("the trailer's counts are not those of the sections", field="counts")
        extra = next(self._objects, None)
        if extra is not None:
            raise Corrupt("bytes behind the trailer", offset=extra[0])


def _is_trailer(sealed: bytes) -> bool:
    # Which decoder to use only: the object is then checked as what it says it is.
    return sealed[1:16] == b"\xa6object\xa7trailer"


def _header(fields: Fields) -> Header:
    if fields.text("magic") != MAGIC or fields.text("object") != "header":
        raise Corrupt("this is no snapshot's header", field="magic")
    if fields.integer("format", 1, _U32) != FORMAT_VERSION:
        raise Corrupt("no such format version", field="format")
    ports = fields.take("ports", list)
    if not all(isinstance(port, str) and len(port) == 17 for port in ports) or len(set(ports)) != len(ports):
        raise Corrupt("has to list each port's MAC once", field="ports")
    return Header(
        vm=fields.text("vm"),
        source=fields.text("source"),
        driver=fields.text("driver"),
        kinds={name: _kind_info(name, value) for name, value in fields.take("kinds", dict).items()},
        ports=tuple(ports),
        rules_max=fields.integer("rules_max", 0, _U63, 0),
        connections=fields.integer("connections", 0, _U63, 0),
    )


def _kind_info(name: str, value: Any) -> KindInfo:
    if len(name) > 255 or not isinstance(value, dict):
        raise Corrupt("has to be a map of short names to maps", field="kinds")
    fields = Fields(value, f"kinds.{name}.")
    return KindInfo(fields.integer("version", 1, _U32), fields.take("optional", bool, False))


def _objects(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each msgpack object of `stream` with the offset of its first byte; holds at most OBJECT_BYTES and one chunk."""
    unpacker = msgpack.Unpacker(max_buffer_size=OBJECT_BYTES + _CHUNK, max_ext_len=0)
    pending, start = bytearray(), 0
    while True:
        try:
            unpacker.skip()
        except msgpack.OutOfData:
            chunk = stream.read(_CHUNK) if len(pending) <= OBJECT_BYTES else b""
            if not chunk:
                break
            unpacker.feed(chunk)
            pending += chunk
            continue
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise Corrupt(f"no msgpack object: {error or type(error).__name__}", offset=start) from error
        length = unpacker.tell() - start
        yield start, bytes(memoryview(pending)[:length])
        del pending[:length]
        start += length
    if pending or start == 0:
        raise _cut_off(bytes(pending), start)


def _cut_off(rest: bytes, start: int) -> SnapshotError:
    if not rest:
        return Corrupt("the file is empty", offset=0)
    if len(rest) > OBJECT_BYTES:
        return Corrupt(f"an object of more than {OBJECT_BYTES} bytes", offset=start)
    return Corrupt(f"the snapshot is cut off: {len(rest)} bytes of an object", offset=start)


@contextmanager
def _at(section: int | None, offset: int) -> Iterator[None]:
    """Says where in the stream an error of the block was."""
    try:
        yield
    except SnapshotError as error:
        error.section = section if error.section is None else error.section
        error.offset = offset if error.offset is None else error.offset
        raise
