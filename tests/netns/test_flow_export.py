# SPDX-License-Identifier: GPL-2.0-only
"""NetFlow v9 and IPFIX of a VM that moves three times under load: collectors count what its guest counted, exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from migrator.lab.cluster import port_messages
from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until

from .flow_collectors import Collectors, Truth
from .traffic import Conversations
from .world import NUMBERS, World

EXPORTER = "198.18.0.77"
"""Address that the datagrams of the VM's exporter come from on every host."""
SHORT_MS = {"udp": 700, "udp_stream": 900, "tcp_time_wait": 800, "tcp_close": 500}
FLOWS = 12


def export(world: World, vm: Machine, **document: Any) -> None:
    """Give the VM's port flow_export, or take it away when there is nothing in the document."""
    (message,) = port_messages(vm)
    kinds = {"flow_export": json.dumps(document)} if document else {}
    world.cluster.apply(ports=[{**message, "host": vm.place() or vm.host, "kinds": kinds}])


class Bursts:
    """Datagrams of many short flows to the guest: each batch ends some and begins others."""

    def __init__(self, vm: Machine, peer: Machine) -> None:
        self._end, self._to, self._next = peer.worker("probe"), vm.address, 100
        self._guest = vm.worker("probe")
        self._guest.call("receive", address="0.0.0.0", port=NUMBERS)
        self._running: list[int] = []

    def turn(self) -> None:
        """Half of the flows fall silent, new ones begin."""
        for flow in self._running[: FLOWS // 2]:
            self._end.call("stop", flow=flow)
        self._running = self._running[FLOWS // 2 :]
        while len(self._running) < FLOWS:
            self._end.call("send", flow=self._next, address=self._to, port=NUMBERS, every_ms=20)
            self._running.append(self._next)
            self._next += 1

    def finish(self) -> None:
        for flow in self._running:
            self._end.call("stop", flow=flow)


@pytest.mark.parametrize("version", ["netflow", "ipfix"])
def test_three_moves_are_counted_exactly(world: World, tmp_path: Path, version: str) -> None:
    vm, peer = world.vm("h1", timeouts_ms=SHORT_MS), world.peer("h3")
    collectors = Collectors(tmp_path, world.cluster.underlay("control"), world.cluster.name("control"))
    truth = Truth(world.cluster, vm, peer)
    with collectors.running():
        document = {"version": version, "collectors": collectors.endpoints, "source": EXPORTER}
        export(world, vm, **document, active_timeout_s=1, inactive_timeout_s=1, template_refresh_s=2, domain=4711)
        talk = Conversations.begin(vm, peer, inbound=10, outbound=10, every_ms=50)
        bursts = Bursts(vm, peer)
        bursts.turn()
        for host in ("h2", "h1", "h2"):
            talk.flow_on(2000)
            bursts.turn()
            world.move(vm, host)
        talk.flow_on(2000)
        talk.assert_whole()
        for client in talk.clients:
            client.call("close")
        bursts.finish()
        expected = settled(truth)
        world.cluster.settled(vm)
        assert exporting(world, "h2")
        export(world, vm)
        wait_until("nothing more is exported", lambda: not exporting(world, "h2"))
        collectors.finish()
    assert truth.counted() == expected
    nfdump, nfacctd = collectors.nfdump(vm.address), collectors.nfacctd(vm.address)
    assert nfdump.counted() == expected
    assert nfacctd.counted() == expected
    assert (nfdump.complaints, nfacctd.complaints) == ([], [])
    assert collectors.malformed() == []
    assert_continuous(collectors, version)


def settled(truth: Truth) -> dict[str, tuple[int, int]]:
    """The guest's counters once they stand."""
    seen: list[dict[str, tuple[int, int]]] = []

    def stands() -> bool:
        seen.append(truth.counted())
        return len(seen) > 5 and len({json.dumps(one) for one in seen[-5:]}) == 1

    wait_until("traffic has ended", stands, 30.0, 0.2)
    return seen[-1]


def exporting(world: World, host: str) -> bool:
    return any(name.startswith("flow") for name in world.cluster.remains(host))


def assert_continuous(collectors: Collectors, version: str) -> None:
    """One source, one domain, no gap in the sequence, and an uptime that goes on."""
    names = ("ip.src", "cflow.sequence", "cflow.od_id" if version == "ipfix" else "cflow.source_id", "cflow.sysuptime")
    rows = collectors.tshark(*names, "cflow.flowset_id")
    assert len(rows) > 5  # one a second at least
    assert {(row[0], row[2]) for row in rows} == {(EXPORTER, "4711")}
    sequence = [int(row[1]) for row in rows]
    assert sequence == sorted(sequence) and len(set(sequence)) == len(sequence)
    if version == "netflow":
        assert sequence == list(range(len(sequence)))
