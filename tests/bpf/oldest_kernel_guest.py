# SPDX-License-Identifier: GPL-2.0-only
"""What test_oldest_kernel.py runs in the machine: load the switch, pass a frame between two ports, print one object.

By the driver's own loader and attachments. Nothing is cleared away: the machine ends with this program.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from datapath.drivers.ebpf import bpffs, loader
from datapath.drivers.ebpf.attach import Direction, attachments
from datapath.drivers.ebpf.layout import C
from datapath.errors import DatapathError
from tests.netns.private import ETH_P_ALL, raw_socket, veth

_NETWORK, _TO_GUEST = 1, 1
_DEADLINE_S = 20.0
MACS = {1: bytes.fromhex("020000000001"), 2: bytes.fromhex("020000000002")}
FRAME = MACS[2] + MACS[1] + bytes.fromhex("88b5") + b"oldest kernel".ljust(50, b".")


def main() -> int:
    pins = bpffs.pins("oldest", Path("/run/bpf"))
    try:
        switch = loader.load(pins)
    except DatapathError as error:
        print(json.dumps({"release": os.uname().release, "refused": str(error)}))
        return 1
    on = attachments(pins.links, "oldest")
    first, second = (_plug(switch, on, slot) for slot in MACS)
    print(
        json.dumps(
            {
                "release": os.uname().release,
                "attachments": type(on).__name__,
                "programs": sorted(switch.programs),
                "inner": {name: _inner(switch, name) for name in ("conntracks", "floods", "dirty", "acl_tries")},
                "passed": _passes(first, second),
                "counted": _counted(switch, 2),
            }
        )
    )
    return 0


def _plug(switch: loader.Switch, on: Any, slot: int) -> int:
    """An active, open port without policy. Returns the ifindex of the guest's end."""
    near, far = veth(f"near{slot}", f"far{slot}")
    mac = np.frombuffer(MACS[slot], np.uint8)
    with switch.table("devices") as devices, switch.table("l2") as l2, switch.table("ports") as ports:
        devices.set(near, (slot, C.DEVICE_PORT))
        l2.set((_NETWORK, mac, 0), _record(l2.value, kind=C.L2_PORT, target=slot, flags=C.L2_F_LOCATION))
        word = 1 << 32 | C.PORT_F_STATELESS << 8 | C.PORT_ACTIVE
        known = {"word": word, "slot": slot, "ifindex": near, "network": _NETWORK, "gate": C.GATE_LOCAL, "mac": mac}
        ports.set(slot, _record(ports.value, **known))
    with switch.table("networks") as networks:
        networks.set(_NETWORK, _record(networks.value, kind=C.NETWORK_LOCAL))
    on.attach(near, Direction.INGRESS, switch.program("from_port"))
    on.attach(near, Direction.EGRESS, switch.program("to_port"))
    return far


def _record(layout: np.dtype[Any], **fields: Any) -> Any:
    record = np.zeros((), layout)
    for name, value in fields.items():
        record[name] = value
    return record


def _inner(switch: loader.Switch, name: str) -> bool:
    """Does the kernel take a table of the driver's making into this map of maps?"""
    with switch.outer(name) as outer, outer.new() as table:
        outer.put(1, table)
        again = outer.inner(1)
        if again is None:
            return False
        with again:
            return bool(again.info.id == table.info.id)


def _passes(first: int, second: int) -> bool:
    """Does what one guest sends reach the other unchanged?"""
    with raw_socket(first) as sender, raw_socket(second, ETH_P_ALL) as receiver:
        receiver.settimeout(1)
        sender.send(FRAME)
        end = time.monotonic() + _DEADLINE_S
        while time.monotonic() < end:
            try:
                if receiver.recv(2048) == FRAME:
                    return True
            except TimeoutError:
                continue
    return False


def _counted(switch: loader.Switch, slot: int) -> int:
    """Frames that the switch says it passed to the port."""
    with switch.table("counters") as counters:
        return int(counters.get(slot)["packets"][:, _TO_GUEST].sum())  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
