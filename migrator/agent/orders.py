"""Orders of the coordinator in the driver's terms: messages to records and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgpack

from datapath.errors import LoadRejected
from datapath.provider import Need, Network, NetworkKind, Place, PortRef
from datapath.registry import KINDS
from datapath.state.acl import LABELS
from datapath.state.check import checked_records
from datapath.state.kind import Kind, Op, Record, Table
from migrator._pb import migrator_pb2 as pb
from migrator.agent.guests.word import MoveOptions
from migrator.config import kind_records
from migrator.errors import Corrupt

CHANNEL_MAX = (1 << 24) - 1
CONNECTIONS_MAX = 65536
LEARNED_MAX = 16
RECORDS_BYTES = 1 << 20


def network(message: pb.Network) -> Network:
    return Network(
        name=message.name,
        kind=NetworkKind(message.kind),
        uplink=message.uplink,
        vlan=message.vlan,
        vni=message.vni,
        mtu=message.mtu or 1500,
        ageing_s=float(message.ageing_s or 300),
    )


def place(message: pb.Place) -> Place:
    return Place(network=message.network, mac=message.mac, host=message.host, vm=message.vm)


def ref(order: pb.PortOrder) -> PortRef:
    return PortRef(order.port.vm, order.port.mac, order.epoch)


def port_record(order: pb.PortOrder, mtu: int) -> Record:
    """Record of kind `port`; `mtu` is the network's, for a port that names none."""
    port = order.port
    return {
        "mac": port.mac,
        "network": port.network,
        "addresses": list(port.addresses),
        "antispoof": not port.no_antispoof,
        "learning": port.learning,
        "trunk": {str(vlan): name for vlan, name in sorted(port.trunk.items())},
        "mtu": port.mtu or mtu or 1500,
        "connections_max": port.connections_max or CONNECTIONS_MAX,
        "learned_max": port.learned_max or LEARNED_MAX,
        "timeouts_ms": dict(sorted(port.timeouts_ms.items())),
        "policy": port.policy,
        "revision": order.revision,
    }


def rules(order: pb.PortOrder) -> Table:
    """Table of kind `acl`."""
    return Table("acl", records=[_rule(rule) for rule in order.rules])


def withdrawn(order: pb.PortOrder, present: list[Record]) -> Table | None:
    """Keys of rules that are there and that the order has no more."""
    kept = {rule.id for rule in order.rules}
    gone: list[Record] = [{"id": record["id"]} for record in present if record["id"] not in kept]
    return Table("acl", Op.DELETE, records=gone) if gone else None


def same_rules(order: pb.PortOrder, present: list[Record]) -> bool:
    counted = KINDS["acl"].accounting
    bare = [{name: value for name, value in record.items() if name not in counted} for record in present]
    return sorted(bare, key=_by_id) == sorted((_rule(rule) for rule in order.rules), key=_by_id)


def kind_changes(order: pb.PortOrder, kind: Kind, present: Iterable[Record]) -> list[Table]:
    """Tables that make what a port has of a kind (`present`) what the order says. Raises ConfigInvalid."""
    text = order.port.kinds.get(kind.name)
    wanted = {kind.key_of(record): record for record in (kind_records(kind.name, text) if text else ())}
    here = {kind.key_of(record): kind.bare(record) for record in present}
    gone: list[Record] = [
        {name: record[name] for name in kind.key} for key, record in here.items() if key not in wanted
    ]
    new = [record for key, record in wanted.items() if here.get(key) != record]
    tables = [Table(kind.name, Op.DELETE, records=gone)] if gone else []
    return [*tables, Table(kind.name, records=new)] if new else tables


def _by_id(record: Record) -> int:
    return int(record["id"])


def _rule(rule: pb.Rule) -> Record:
    protocol = int(rule.protocol) if rule.protocol.isdigit() else rule.protocol or "any"
    return {
        "id": rule.id,
        "direction": rule.direction,
        "priority": rule.priority,
        "protocol": protocol,
        "remote": list(rule.remote),
        "ports": [_range(text) for text in rule.ports],
        "icmp": [int(part) for part in rule.icmp.split("/")] if rule.icmp else [],
        "action": rule.action,
        "log": rule.log,
        **{name: text for name in LABELS if (text := getattr(rule, name))},
    }


def _range(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return [int(first), int(last or first)]


def move_options(message: pb.MoveOptions) -> MoveOptions:
    """How the hypervisor is to move the VM."""
    given = {field.name: value for field, value in message.ListFields()}
    return MoveOptions(**given)


def need_message(need: Need, refs: list[PortRef]) -> pb.Need:
    return pb.Need(
        kinds=dict(need.kinds),
        records=msgpack.packb(list(need.records)),
        rules_max=need.rules_max,
        connections=need.connections,
        epochs={ref.mac: ref.epoch for ref in refs},
        optional=sorted(name for name in need.kinds if name in KINDS and not KINDS[name].required),
        configured=msgpack.packb({name: list(records) for name, records in need.configured.items()}),
    )


def need_of(message: pb.Need, held: Mapping[str, int]) -> Need:
    """Without kinds that are optional and not `held` here: they are skipped and reported.

    Raises Corrupt for records that are not a list of maps.
    """
    records = _records(_unpacked(message.records, "records"), "records")
    if not all(isinstance(record.get("mac"), str) for record in records):
        raise Corrupt("records of the ports are not a list of maps with a MAC", field="need.records")
    configured = _unpacked(message.configured, "configured") if message.configured else {}
    if not isinstance(configured, dict) or not all(isinstance(name, str) for name in configured):
        raise Corrupt("configured records are not a map of kinds", field="need.configured")
    checked = {name: _checked(name, _records(value, "configured")) for name, value in configured.items()}
    skipped = {name for name in message.optional if message.kinds[name] > held.get(name, 0)}
    kinds = {name: version for name, version in message.kinds.items() if name not in skipped}
    return Need(kinds, records, message.rules_max, message.connections, checked)


def _unpacked(data: bytes, name: str) -> Any:
    if len(data) > RECORDS_BYTES:
        raise Corrupt(f"{name} of the ports have {len(data)} bytes", field=f"need.{name}")
    try:
        return msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise Corrupt(f"{name} of the ports: {error}", field=f"need.{name}") from error


def _records(value: Any, name: str) -> list[Record]:
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise Corrupt(f"{name} of the ports are not a list of maps", field=f"need.{name}")
    return value


def _checked(name: str, records: list[Record]) -> list[Record]:
    """As the kind has them; of a kind that is unknown here, as they came: `kinds` says that it is asked for."""
    if name not in KINDS:
        return records
    try:
        return checked_records(KINDS[name], Table(name, records=records))
    except LoadRejected as error:
        raise Corrupt(str(error), field="need.configured") from error


def port_channel(channel: int, macs: Iterable[str], mac: str) -> int:
    """The port's own channel: a channel leads to one port, a migration has one for each, from `channel` on by MAC."""
    return (channel - 1 + sorted(macs).index(mac)) % CHANNEL_MAX + 1
