"""Targets: snapshot files and sections, and a restore and an arriving migration that are made of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgpack
import xxhash

from datapath.drivers.dummy import DummyDriver, fabric
from datapath.errors import Error
from datapath.provider import Network, NetworkKind, PortRef
from datapath.registry import KINDS
from datapath.state.kind import Op
from migrator._pb import migrator_pb2 as pb
from migrator.agent.loading import Arrival
from migrator.agent.report import Report
from migrator.checkpoint import restore
from migrator.errors import SnapshotError
from migrator.snapshot import Header, KindInfo, SnapshotReader, Tally, decode_section, encode_table, snapshot
from migrator.snapshot.format import seal
from tests.contract.samples import MAC, keys_of, port_record, sample
from tests.unit.strategies import joined, same

from .target import Target

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
FIXTURES = Path(__file__).parents[1] / "fixtures"
DIGEST = b"\xa6digest\xc4\x10"
MODULES = (
    "migrator.snapshot",
    "migrator.checkpoint",
    "migrator.agent.loading",
    "datapath.state",
    "datapath.drivers.dummy",
)
_HEADER = Header(
    VM, "host-a", "dummy", {name: KindInfo(kind.version) for name, kind in KINDS.items()}, (MAC,), 10, 65_536
)
_WORDS = (
    *(name.encode() for name in ("magic", "format", "object", "header", "section", "trailer", "kind", "version", "op")),
    *(name.encode() for name in ("round", "port", "port_time_ns", "count", "codec", "size", "body", "zstd", "none")),
    *(name.encode() for kind in KINDS.values() for name in (kind.name, *kind.columns, *kind.fields)),
    *(str(op).encode() for op in Op),
    DIGEST,
    b"vm-netstate-snapshot",
    b"\xcf" + b"\xff" * 8,
    b"\xdf\xff\xff\xff\xff",
)


def resealed(data: bytes) -> bytes:
    """Each object of `data` with a digest that is right, and the trailer that the sections deserve.

    Nobody finds a digest by mutation, and an attacker computes it. What is no object any more stays as it is.
    """
    unpacker, start = msgpack.Unpacker(io.BytesIO(data)), 0
    parts: list[bytes] = []
    try:
        while True:
            unpacker.skip()
            parts.append(data[start : unpacker.tell()])
            start = unpacker.tell()
    except (msgpack.UnpackException, ValueError, RecursionError):
        parts.append(data[start:])
    made = [_sealed(part) for part in parts]
    if len(made) > 2 and b"trailer" in made[-2][:40]:
        made[-2] = _trailer(made[1:-2])
    return b"".join(made)


def _sealed(part: bytes) -> bytes:
    if part[-16 - len(DIGEST) : -16] != DIGEST:
        return part
    return part[:-16] + xxhash.xxh3_128_digest(part[:-16])


def _trailer(sections: list[bytes]) -> bytes:
    tally, counts = Tally(), dict.fromkeys(_HEADER.kinds, 0)
    for sealed in sections:
        with suppress(SnapshotError):
            section = decode_section(sealed)
            tally.add_section(section)
            counts[section.kind] = counts.get(section.kind, 0) + section.count
    totals = {"sections": tally.sections, "records": tally.records, "bytes": tally.bytes}
    return seal({"object": "trailer", "counts": counts, **totals, "sections_digest": tally.digest})


# ---- whole files ----


class _Slow(io.BytesIO):
    """Gives a few bytes at a time, as a pipe may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(7, size) if size and size > 0 else 7)


def _read(stream: io.BytesIO) -> list[object]:
    """What a reader finds: header, sections, and the error at its end."""
    found: list[object] = []
    try:
        reader = SnapshotReader(stream)
        found.append(repr(reader.header))
        found += [(s.kind, s.op, s.port, s.count, s.digest) for s in reader]
        found.append(reader.summary.counts)
    except SnapshotError as error:
        found.append((type(error), str(error)))
    return found


def read_file(data: bytes) -> None:
    """Raw, and with right digests; a stream that comes in small pieces reads as the whole."""
    for given in (data, resealed(data)):
        whole = _read(io.BytesIO(given))
        if len(given) < 2048:
            assert _read(_Slow(given)) == whole, "a slow stream reads otherwise"


def files() -> Iterator[bytes]:
    for path in sorted(FIXTURES.glob("*.mgs")):
        yield path.read_bytes()
    for codec in ("none", "zstd"):
        tables = [(MAC, sample(kind, 2)) for kind in KINDS]
        yield b"".join(snapshot(_HEADER, tables, codec=codec))


# ---- one section ----


def read_section(data: bytes) -> None:
    """What a section is decoded to can be encoded, and is the same when it comes back."""
    for given in (data, _sealed(data)):
        with suppress(SnapshotError):
            section = decode_section(given)
            if section.table is not None and len(section.table):
                again = [decode_section(sealed).table for sealed in encode_table(section.table, section.port)]
                assert same(joined([table for table in again if table is not None]), section.table), (
                    "comes back otherwise"
                )


def read_body(data: bytes) -> None:
    """A body under a right envelope: its first bytes choose the kind, the operation and the count of records."""
    if len(data) < 3:
        return
    kind = sorted(KINDS)[data[0] % len(KINDS)]
    op = list(Op)[data[1] % len(Op)]
    body = data[3:]
    envelope = {"object": "section", "kind": kind, "version": KINDS[kind].version, "op": str(op), "round": 0}
    rest = {"port": MAC, "port_time_ns": 0, "count": data[2], "codec": "none", "size": len(body), "body": body}
    read_section(seal({**envelope, **rest}))


def sections() -> Iterator[bytes]:
    for kind in KINDS:
        for count in (1, 3):
            for table in (sample(kind, count), keys_of(sample(kind, count))):
                yield from encode_table(table, MAC)
        yield from encode_table(sample(kind, 40), MAC, codec="zstd")


def bodies() -> Iterator[bytes]:
    for sealed in sections():
        fields = msgpack.unpackb(sealed)
        if fields["codec"] == "none":
            op = list(Op).index(Op(fields["op"]))
            yield bytes((sorted(KINDS).index(fields["kind"]), op, fields["count"])) + fields["body"]


# ---- what is made of them ----


def _driver() -> DummyDriver:
    fabric("fuzz").switches.clear()
    driver = DummyDriver()
    driver.start({"fabric": "fuzz"}, lambda _: None)
    driver.set_network(Network("blue", NetworkKind.LOCAL))
    return driver


def restore_file(data: bytes) -> None:
    """A restore succeeds or leaves nothing."""
    given = resealed(data)
    driver = _driver()
    try:
        restore(driver, lambda: io.BytesIO(given), 3, {MAC: "tap0"})
    except Error:
        assert not list(driver.ports()), "a restore that failed left a port"


def arrive(data: bytes) -> None:
    """What a source sends, one length-delimited message after the other, into a port that is staged."""
    driver = _driver()
    ref = PortRef(VM, MAC, 3)
    driver.stage(ref, port_record(), "tap0")
    arrival = Arrival(driver, [ref], Report("m", VM, 3, "a", "b"))
    with suppress(Error):
        for message in messages(data):
            which = message.WhichOneof("message")
            if which == "section":
                arrival.load(decode_section(_sealed(message.section)))
            elif which in ("round_end", "final"):
                end = message.round_end if which == "round_end" else message.final
                arrival.check(end.round, end.records, end.digest)
            elif which == "restart":
                arrival.restart()
    assert driver.port(ref).state == "staged"


def messages(data: bytes) -> Iterator[pb.FromSource]:
    """Messages that are each preceded by their length in two bytes; what is no message is left out."""
    at = 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2])
        with suppress(Exception):
            yield pb.FromSource.FromString(data[at + 2 : at + 2 + size])
        at += 2 + size


def streams() -> Iterator[bytes]:
    tally = Tally()
    parts = [pb.FromSource(begin=pb.Begin(migration="m", vm=VM, epoch=3))]
    for sealed in sections():
        section = decode_section(sealed)
        if section.op is Op.LOAD and len(sealed) < 2000:
            tally.add_section(section)
            parts.append(pb.FromSource(section=sealed))
    end = {"records": tally.records, "digest": tally.digest}
    parts += [pb.FromSource(round_end=pb.RoundEnd(**end)), pb.FromSource(restart=pb.Empty())]
    parts += [pb.FromSource(final=pb.Final()), pb.FromSource(settle_end=pb.Empty())]
    for chosen in (parts, parts[:3], parts[-3:]):
        yield b"".join(len(raw).to_bytes(2) + raw for raw in (part.SerializeToString() for part in chosen))


TARGETS = (
    Target("snapshot-file", read_file, files, MODULES[:1], _WORDS, 16_384),
    Target("snapshot-section", read_section, sections, MODULES[:1], _WORDS, 16_384),
    Target("snapshot-body", read_body, bodies, MODULES[:1], _WORDS),
    Target("snapshot-restore", restore_file, files, MODULES, _WORDS, 16_384),
    Target("peer-stream", arrive, streams, MODULES, _WORDS, 16_384),
)
