"""Checkpoint and restore: all state of a VM's ports to a snapshot and back, through any driver.

This walks the registry of kinds and names no driver, and no kind but `port`, whose record `stage` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from datapath.errors import Error, LoadRejected
from datapath.provider import Driver, Need, PortRef
from datapath.registry import KINDS
from datapath.state.kind import Nature, Op, Record, Table
from datapath.state.port import PORT
from migrator.errors import Corrupt, Incompatible, PreflightFailed
from migrator.snapshot import Header, KindInfo, Section, SnapshotReader, Summary, snapshot


@dataclass
class Restored:
    """What a restore did. `loaded` counts records by kind; `skipped` names optional kinds that are not known here."""

    refs: list[PortRef] = field(default_factory=list)
    loaded: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Configured:
    """What is declared for a port now: its record, and tables of the other kinds of configuration."""

    record: Record
    tables: Sequence[Table] = ()


def checkpoint(driver: Driver, refs: Sequence[PortRef], source: str, *, codec: str = "zstd") -> Iterator[bytes]:
    """A snapshot of the ports `refs` of one VM, object by object, in bounded memory.

    `source` names this host. Each record is as it was when it was read: of a quiesced port all are of one instant, of
    one that passes frames each record that lives throughout is there once. Nothing changes at the driver.

    Raises PortNotFound, StaleEpoch, NotReady of the driver; Incompatible for ports of several VMs or kinds that the
    registry does not know, before the first object.
    """
    vms = {ref.vm for ref in refs}
    if len(vms) != 1:
        raise Incompatible(f"a snapshot is of one VM, these are ports of {len(vms)}")
    held = driver.kinds()
    unknown = sorted(set(held) - set(KINDS))
    if unknown:
        raise Incompatible(f"driver {driver.name} holds kind {unknown[0]}, which is not in the registry")
    need = driver.describe(refs)
    used = {name: need.kinds[name] for name in KINDS if name in held and name in need.kinds}
    kinds = {name: KindInfo(version, not KINDS[name].required) for name, version in used.items()}
    header = Header(
        vm=vms.pop(),
        source=source,
        driver=driver.name,
        kinds=kinds,
        ports=[ref.mac for ref in refs],
        rules_max=need.rules_max,
        connections=need.connections,
    )
    return snapshot(header, _tables(driver, refs, kinds), codec=codec)


def _tables(driver: Driver, refs: Sequence[PortRef], kinds: Mapping[str, KindInfo]) -> Iterator[tuple[str, Table]]:
    for ref in refs:
        for name in kinds:
            yield from ((ref.mac, table) for table in driver.dump(ref, name))
        counters = dict(driver.port(ref).counters)
        yield ref.mac, Table(PORT.name, Op.ACCOUNT, records=[{"mac": ref.mac, "counters": counters}])


def restore(
    driver: Driver,
    open_stream: Callable[[], BinaryIO],
    epoch: int,
    devices: Mapping[str, str],
    *,
    open_ports: bool = True,
    configured: Mapping[str, Configured] | None = None,
) -> Restored:
    """Make the ports of a snapshot here, with epoch `epoch`, on the device that `devices` gives for each MAC.

    `configured`, by MAC, goes before the configuration in the snapshot: what was withdrawn since does not come back.

    `open_stream` opens the snapshot from its beginning: it is read twice, first to its end to check everything of it.
    Then all ports are staged, loaded, committed and, with `open_ports`, opened; what fails on the way purges them all.

    Raises Corrupt, Incompatible, PreflightFailed (this host cannot take it, nothing was done), LoadRejected (records
    that do not fit: a restore is never partial), and what the driver raises.
    """
    with open_stream() as stream:
        header, records, summary = _validated(stream)
    refs = {mac: PortRef(header.vm, mac, epoch) for mac in header.ports}
    today = {mac: port for mac, port in (configured or {}).items() if mac in refs}
    records |= {mac: port.record for mac, port in today.items()}
    _preflight(driver, header, records, devices)
    restored = Restored(list(refs.values()), skipped=dict(summary.skipped))
    staged: list[PortRef] = []
    try:
        for mac, ref in refs.items():
            driver.stage(ref, records[mac], devices[mac])
            staged.append(ref)  # only now: what stage refused may be an instance that lives
            for table in today[mac].tables if mac in today else ():
                _load_table(driver, ref, table, restored)
        with open_stream() as stream:
            for section in SnapshotReader(stream):
                if not (section.port in today and _is_configuration(section)):
                    _load(driver, refs[section.port], section, restored)
        for ref in staged:
            driver.commit(ref)
        for ref in staged if open_ports else ():
            driver.open(ref)
    except BaseException as error:
        _purge(driver, staged, error)
        raise
    return restored


def _validated(stream: BinaryIO) -> tuple[Header, dict[str, Record], Summary]:
    """Read a whole snapshot; gives the record of each port. Raises Corrupt, Incompatible."""
    reader = SnapshotReader(stream)
    records: dict[str, Record] = {}
    for section in reader:
        if section.kind == PORT.name and section.table and section.op is Op.LOAD:
            for record in section.table.records or ():
                if record["mac"] != section.port or section.port in records:
                    raise Corrupt(f"a record of port {record['mac']} among those of {section.port}")
                records[section.port] = record
    missing = sorted(set(reader.header.ports) - set(records))
    if missing:
        raise Corrupt(f"nothing says what port {missing[0]} is", field=PORT.name)
    return reader.header, records, reader.summary


def _preflight(driver: Driver, header: Header, records: Mapping[str, Record], devices: Mapping[str, str]) -> None:
    kinds = {name: info.version for name, info in header.kinds.items() if not info.optional}
    reasons = driver.probe(Need(kinds, list(records.values()), header.rules_max, header.connections))
    reasons += [f"no device is named for port {mac}" for mac in header.ports if mac not in devices]
    if reasons:
        raise PreflightFailed(f"this host cannot take VM {header.vm}", reasons=reasons)


def _load(driver: Driver, ref: PortRef, section: Section, restored: Restored) -> None:
    if section.table is None or section.kind not in driver.kinds():
        restored.skipped[section.kind] = restored.skipped.get(section.kind, 0) + section.count
        return
    _load_table(driver, ref, section.table, restored)


def _load_table(driver: Driver, ref: PortRef, table: Table, restored: Restored) -> None:
    loaded = driver.load(ref, table)
    if loaded.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in loaded.rejected)
        raise LoadRejected(f"records of kind {table.kind} do not fit: {reasons}", hint="nothing was restored")
    if table.op is Op.LOAD:
        restored.loaded[table.kind] = restored.loaded.get(table.kind, 0) + loaded.loaded


def _is_configuration(section: Section) -> bool:
    """Not: what a kind of configuration counts."""
    kind = KINDS.get(section.kind)
    return kind is not None and Nature.CONFIGURATION in kind.nature and section.op is not Op.ACCOUNT


def _purge(driver: Driver, refs: Sequence[PortRef], cause: BaseException) -> None:
    for ref in refs:
        try:
            driver.purge(ref)
        except Error as error:
            cause.add_note(f"purging port {ref.mac} failed too: {error}")
