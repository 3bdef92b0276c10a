# SPDX-License-Identifier: GPL-2.0-only
"""Linux's own TCP through a switch with kind `window`, on a good path and a rough one: nothing of it is outside."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
from collections.abc import Iterator

import pytest

from datapath.provider import PortRef
from migrator.lab import netns
from tests.contract.hosts import Host, ebpf_switch, inside
from tests.contract.test_window import check, outside, rules
from tests.netns.private import wait_until
from tests.netns.rough_path import Relay, single

GUEST, PEER = ("02:00:00:00:00:01", "10.0.0.5"), ("02:00:00:00:00:02", "10.0.0.6")
PORT = "9410"


@pytest.fixture
def host() -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces and bpf(2)")
    with ebpf_switch() as made, inside(made):
        yield made


@contextlib.contextmanager
def machine(host: Host, who: tuple[str, str], relay: str = "") -> Iterator[tuple[PortRef, str]]:
    """A port and the namespace behind it; with `relay` its device ends in a namespace of that name before."""
    mac, address = who
    port = host.stage(mac=mac, antispoof=False, trunk={})
    host.driver.load(port, rules())
    host.driver.commit(port)
    host.driver.open(port)
    device, name = f"ct1x{mac[-2:]}p", f"mgw-{os.getpid()}-{mac[-2:]}"
    with contextlib.ExitStack() as stack:
        for one in (name, relay) if relay else (name,):
            netns.make(one)
            stack.callback(netns.remove, one)
        subprocess.run(["ip", "link", "set", device, "netns", relay or name], check=True, timeout=10)
        if relay:
            netns.ip("link", "set", device, "up", namespace=relay)
            wire = ["link", "add", "path0", "type", "veth", "peer", "name", "far0", "netns", name]
            netns.ip(*wire, namespace=relay)
            netns.ip("link", "set", "path0", "up", namespace=relay)
            device = "far0"
            single(name, device)
        netns.ip("link", "set", device, "address", mac, "up", namespace=name)
        netns.ip("addr", "add", f"{address}/24", "dev", device, namespace=name)
        yield port, name


def transfer(server: str, client: str) -> dict[str, dict[str, float]]:
    """iperf3 in both directions at once. Its summary."""
    listens = netns.inside(server, ["ss", "-Hltn", f"sport = :{PORT}"])
    with subprocess.Popen(
        netns.inside(server, ["iperf3", "-p", PORT, "-s", "-1"]), stdout=subprocess.DEVNULL
    ) as served:
        try:
            wait_until(lambda: bool(subprocess.run(listens, capture_output=True, check=True).stdout), "iperf3 listens")
            command = ["iperf3", "-p", PORT, "-c", GUEST[1], "-t", "3", "-P", "2", "--bidir", "-J"]
            done = subprocess.run(netns.inside(client, command), capture_output=True, timeout=60, check=False)
            assert done.returncode == 0, done.stdout
        finally:
            served.kill()
    end: dict[str, dict[str, float]] = json.loads(done.stdout)["end"]
    return end


def known(host: Host, port: PortRef) -> int:
    """Connections that are checked."""
    tables = [table.columns or {} for table in host.driver.dump(port, "conntrack")]
    return sum(int((table["window_flags"] & 7 == 3).sum()) for table in tables if "window_flags" in table)


def test_large_frames_of_offloads(host: Host) -> None:
    with machine(host, GUEST) as (port, guest), machine(host, PEER) as (_, peer):
        check(host, port)
        end = transfer(guest, peer)
        assert known(host, port) == 5
        assert min(end["sum_received"]["bytes"], end["sum_received_bidir_reverse"]["bytes"]) > 1 << 20
        assert outside(host, port) == [0, 0]
        assert "window" not in host.driver.port(port).drops


def test_a_path_that_loses_doubles_and_reorders(host: Host) -> None:
    seed, relay = random.randrange(1 << 32), f"mgw-{os.getpid()}-path"
    with machine(host, GUEST) as (port, guest), machine(host, PEER, relay) as (_, peer):
        single(guest, "ct1x01p")
        check(host, port)
        with Relay(netns.path(relay), ("ct1x02p", "path0"), seed) as path:
            end = transfer(guest, peer)
        where = f"seed {seed}: {path.lost} lost, {path.doubled} doubled, {path.late} late"
        assert min(path.lost, path.doubled, path.late) > 5, where
        assert end["sum_sent"]["retransmits"] > 0, where
        assert outside(host, port) == [0, 0], where
