# SPDX-License-Identifier: GPL-2.0-only
"""A policy says how long an idle connection is remembered, wherever the VM is."""

from __future__ import annotations

import time

from migrator.lab import oracle
from migrator.lab.processes import wait_until

from .world import BRIEF_S, ECHO, SERVICE, World


def test_idle_connections_end_by_their_policys_time_where_the_vm_has_gone(world: World) -> None:
    """One of TCP and one of UDP, whose times are 5 days and 30 s else; a port that opens grants all of it once more."""
    vm, peer = world.vm("h1", policy="brief"), world.peer("h3")

    def remembered(host: str) -> int:
        return len(oracle.columns(world.cluster, host, vm)["laddr"])

    vm.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
    vm.worker("probe").call("echo", address="0.0.0.0", port=ECHO)
    client, end = peer.worker("tcp"), peer.worker("probe")
    assert client.call("connect", address=vm.address, port=SERVICE, count=1, timeout_s=20)["failed"] == 0
    end.call("send", flow=1, address=vm.address, port=ECHO, every_ms=10)
    wait_until("it answers", lambda: end.call("report")["flows"].get("1", {}).get("received", 0) > 0)
    end.call("stop", flow=1)
    idle = time.monotonic()
    assert remembered("h1") == 2
    wait_until("part of the time passes", lambda: time.monotonic() >= idle + BRIEF_S / 3, BRIEF_S)
    moved = time.monotonic()
    world.move(vm, "h2")
    assert remembered("h2") == 2, "they came along"
    wait_until("both are forgotten", lambda: remembered("h2") == 0, 2 * BRIEF_S, 0.1)
    assert time.monotonic() >= moved + BRIEF_S
