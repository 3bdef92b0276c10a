"""Why this switch cannot take ports: sentences for `probe`, and the reasons for which `stage` refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datapath.drivers.dummy.switch import Switch
from datapath.provider import Need
from datapath.state.kind import Record

DEFAULTS = {"ports_max": 1024, "connections": 1 << 32, "rules_max": 16_384, "tracked_max": 65_536}


def limit(options: Mapping[str, Any], name: str) -> int:
    """Option `name` or its default."""
    return int(options.get(name, DEFAULTS[name]))


def network_reasons(switch: Switch, record: Record) -> list[str]:
    """What the networks of a port's record lack here."""
    missing = [
        f"network {name} is not configured here"
        for name in (record["network"], *record["trunk"].values())
        if name not in switch.networks
    ]
    network = switch.networks.get(record["network"])
    if network and record["mtu"] > network.mtu:
        missing.append(f"MTU {record['mtu']} of port {record['mac']}: network {network.name} carries {network.mtu}")
    return missing


def reasons(switch: Switch, known: Mapping[str, int], need: Need, options: Mapping[str, Any]) -> list[str]:
    """Everything for which the switch has to refuse `need`, [] when it can take it."""
    found = [
        f"kind {name} version {version}: " + (f"only {known[name]} is known" if name in known else "not held here")
        for name, version in need.kinds.items()
        if known.get(name, 0) < version
    ]
    for record in need.records:
        found += network_reasons(switch, record)
    room = limit(options, "connections") - sum(port.record["connections_max"] for port in switch.ports.values())
    if need.connections > room:
        found.append(f"{need.connections} connections: room for {room}")
    if need.rules_max > limit(options, "rules_max"):
        found.append(f"{need.rules_max} rules: at most {limit(options, 'rules_max')} in one policy")
    if len(need.records) > limit(options, "ports_max") - len(switch.ports):
        found.append(f"{len(need.records)} ports: no room for as many")
    return found
