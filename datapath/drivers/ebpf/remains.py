"""Everything of VMs that a switch holds in kernel and file system: how a purge is shown to be whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Records, Table
from datapath.drivers.ebpf.records import address_text, mac_text

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running


def remains(parts: Running) -> Mapping[str, Sequence[str]]:
    """Sort -> sorted names; sorts of which there is nothing are left out."""
    sorts = {
        "ports": _ports(parts),
        "tables": _inner(parts, "conntracks"),
        "dirty sets": _inner(parts, "dirty"),
        "flows": (*_inner(parts, "flow_ends"), *_inner(parts, "flow_reports")),
        "addresses": _addresses(parts),
        "trunks": (f"slot {k['slot']} vlan {k['vid']}" for k in _keys(parts.kernel.trunks)),
        "entries": _entries(parts, C.L2_PORT),
        "places": _places(parts),
        "flood members": _members(parts),
        "channels": (f"channel {key}" for key in parts.kernel.channels.keys().tolist()),
        "policies": (f"generation {key}" for key in parts.kernel.acl_rows.keys().tolist()),
        "hits": (f"slot {k['slot']} rule {k['rule']}" for k in _keys(parts.kernel.rule_hits)),
        "mirrors": (f"slot {key // 8} mirror {key % 8}" for key in parts.kernel.mirrors.keys().tolist()),
        "names for mirrors": (f"name {key}" for key in parts.kernel.mirror_ports.keys().tolist()),
        "buckets": (f"slot {n // 2} way {n % 2}" for n in np.flatnonzero(parts.kernel.qos.view["flags"]).tolist()),
        "sub-agents": (f"slot {slot}" for slot in np.flatnonzero(parts.kernel.samplings.view["began"]).tolist()),
        "devices": _devices(parts),
        "attachments": _attachments(parts),
        "files": (path.name for path in (parts.options.state / "ports").iterdir()),
    }
    found = {sort: sorted(names) for sort, names in sorts.items()}
    return {sort: names for sort, names in found.items() if names}


def _ports(parts: Running) -> Iterator[str]:
    view = parts.kernel.ports.view
    for slot in np.flatnonzero(view["word"]).tolist():
        yield f"slot {slot} {mac_text(bytes(view['mac'][slot]))} epoch {int(view['word'][slot]) >> 32}"


def _inner(parts: Running, name: str) -> Iterator[str]:
    keys = getattr(parts.kernel, name).keys()
    return (f"slot {slot}" for slot in keys.tolist())


def _keys(table: Table) -> Records:
    return table.keys()


def _addresses(parts: Running) -> Iterator[str]:
    for key in _keys(parts.kernel.addresses):
        yield f"slot {key['slot']} {address_text(key['addr'].tobytes())}"


def _entries(parts: Running, kind: int) -> Iterator[str]:
    keys, entries = parts.kernel.l2.read()
    for key in keys[entries["kind"] == kind]:
        yield f"network {key['network']} {mac_text(bytes(key['mac']))}"


def _places(parts: Running) -> Iterator[str]:
    keys, entries = parts.kernel.l2.read()
    told = (entries["flags"] & C.L2_F_LOCATION != 0) & (entries["kind"] != C.L2_PORT)
    for key in keys[told]:
        yield f"network {key['network']} {mac_text(bytes(key['mac']))}"


def _members(parts: Running) -> Iterator[str]:
    for index in parts.networks.known():
        for kind, vlan, target in parts.floods.members(index):
            if kind == C.L2_PORT:
                yield f"network {index} slot {target} vlan {vlan}"


def _devices(parts: Running) -> Iterator[str]:
    mine = re.compile(re.escape(parts.options.tap_prefix) + r"(\d+[tf]|c)")
    return (name for name in devices.links() if mine.fullmatch(name))


def _attachments(parts: Running) -> Iterator[str]:
    roles = {int(k): int(v["role"]) for k, v in zip(*parts.kernel.devices.read(), strict=True)}
    own = (C.DEVICE_UPLINK, C.DEVICE_TUNNEL, C.DEVICE_JUDGED)
    for attached in parts.attachments.attached():
        if roles.get(attached.ifindex) not in own:
            yield f"device {attached.ifindex} {attached.direction}"
