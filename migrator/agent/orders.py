"""Orders of the coordinator in the driver's terms: messages to records and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgpack

from datapath.provider import Need, Network, NetworkKind, Place, PortRef
from datapath.registry import KINDS
from datapath.state.kind import Op, Record, Table
from migrator._pb import migrator_pb2 as pb
from migrator.agent.guests.word import MoveOptions
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
    return Place(network=message.network, mac=message.mac, host=message.host)


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
    )


def need_of(message: pb.Need, held: Mapping[str, int]) -> Need:
    """Without kinds that are optional and not `held` here: they are skipped and reported.

    Raises Corrupt for records that are not a list of maps.
    """
    if len(message.records) > RECORDS_BYTES:
        raise Corrupt(f"records of the ports have {len(message.records)} bytes", field="need.records")
    try:
        records = msgpack.unpackb(message.records, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise Corrupt(f"records of the ports: {error}", field="need.records") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) and isinstance(r.get("mac"), str) for r in records):
        raise Corrupt("records of the ports are not a list of maps with a MAC", field="need.records")
    skipped = {name for name in message.optional if message.kinds[name] > held.get(name, 0)}
    kinds = {name: version for name, version in message.kinds.items() if name not in skipped}
    return Need(kinds, records, message.rules_max, message.connections)


def port_channel(channel: int, macs: Iterable[str], mac: str) -> int:
    """The port's own channel: a channel leads to one port, a migration has one for each, from `channel` on by MAC."""
    return (channel - 1 + sorted(macs).index(mac)) % CHANNEL_MAX + 1
