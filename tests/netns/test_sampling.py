# SPDX-License-Identifier: GPL-2.0-only
"""A sampled VM moves under load: collectors see one source that never begins anew, and totals that are right."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datapath.export import sflow
from datapath.state.kind import Record
from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.machines import Machine
from migrator.snapshot import decode_section
from tests.sflow import Datagram, read

from .private import wait_until
from .sflow_rig import PLAIN, SFACCTD, SFCAPD, Rig, assert_continuous, four_sigma, rig
from .traffic import Streams
from .world import NUMBERS, World

RATE, SUB_AGENT = 10, 77
AGENT = "192.0.2.77"  # of no host
FCS = 4


@pytest.fixture
def collectors(world: World, tmp_path: Path) -> Iterator[Rig]:
    """In the namespace of the coordinator, which every host reaches."""
    with rig(world.cluster.name("control"), world.cluster.underlay("control"), tmp_path) as made:
        yield made


def sample(world: World, vm: Machine, collectors: list[str], **fields: Any) -> None:
    document = {"rate": RATE, "agent": AGENT, "sub_agent": SUB_AGENT, "collectors": collectors, **fields}
    done = world.cluster.cli("port", "set", f"{vm.uuid}/{vm.ports[0].mac}", "sampling", json.dumps(document))
    assert done.returncode == 0, done.stderr


def record(world: World, vm: Machine, host: str) -> Record:
    """The port's record of the kind on a host, {} while there is none."""
    request = pb.VmRequest(vm=vm.uuid, kind="sampling")
    tables = [decode_section(chunk.data).table for chunk in world.cluster.agent_stub(host).Dump(request, timeout=30)]
    records = [one for table in tables if table is not None for one in table.records or ()]
    return records[0] if records else {}


def estimate(told: list[Datagram], begin: int, end: int) -> None:
    """Samples of the frames `begin` < number <= `end` of the pool stand for so many."""
    taken = sum(begin < flow.pool <= end for one in told for flow in one.flows)
    frames = end - begin
    four_sigma(taken * RATE, frames, RATE * frames * (1 - 1 / RATE))


def test_collectors_see_one_source_across_moves(world: World, collectors: Rig) -> None:
    vm, peer = world.vm("h1"), world.peer("h3")
    sample(world, vm, collectors.collectors, polling="1s", network_interface=9)
    wait_until(lambda: record(world, vm, "h1"), "the port is sampled")
    before = record(world, vm, "h1")
    streams = Streams(vm, peer, every_ms=1.0)
    marks = [int(before["pool"])]
    for here, there in (("h1", "h2"), ("h2", "h3"), ("h3", "h1")):
        streams.run_on(800)
        marks.append(int(record(world, vm, here)["pool"]))  # before the move, and what passes while it goes on
        world.move(vm, there)
        streams.run_on(200)
        marks.append(int(record(world, vm, there)["pool"]))
    streams.run_on(800)
    streams.assert_perfect()
    world.cluster.settled(vm)
    last, told = _agreed(world, vm, collectors)

    assert_continuous(told)
    assert {(one.agent, one.sub_agent) for one in told} == {(AGENT, SUB_AGENT)}
    flows = [flow for one in told for flow in one.flows]
    assert (last["flow_samples"], last["drops"], last["unsent"]) == (len(flows), 0, 0)

    frames = _packets(last) - _packets(before)
    assert last["pool"] - before["pool"] == frames, "what passed is what could be sampled, to the frame"
    for begin, end in zip([*marks, int(last["pool"])], [*marks[1:], int(last["pool"])], strict=False):
        estimate(told, begin, end)
    size = sum(flow.frame_length - FCS for flow in flows)
    squares = sum((flow.frame_length - FCS) ** 2 for flow in flows)
    four_sigma(size * RATE, _bytes(last) - _bytes(before), RATE * (RATE - 1) * squares)
    assert {flow.vlans for flow in flows} == {(0, 100), (100, 0)}

    assert world.cluster.cli("port", "unset", f"{vm.uuid}/{vm.ports[0].mac}", "sampling").returncode == 0
    wait_until(lambda: not record(world, vm, "h1"), "the port is sampled no more")
    collectors.stop()
    flows = [flow for one in collectors.read() for flow in one.flows]
    size = sum(flow.frame_length for flow in flows)
    assert collectors.tshark() == []
    assert collectors.complaints() == []
    assert collectors.nfdump() == (RATE * len(flows), RATE * size)
    samples, accounted, ways = collectors.pmacct()
    of_ip = [flow.frame_length for flow in flows if flow.header[12:14] in (b"\x08\x00", b"\x86\xdd")]
    assert (samples, accounted) == (len(of_ip), sum(of_ip)), "sfacctd accounts nothing else, such as ARP"
    assert {(SUB_AGENT, 9), (9, SUB_AGENT)} <= ways


def _agreed(world: World, vm: Machine, collectors: Rig) -> tuple[Record, list[Datagram]]:
    """The port's record, and the datagrams up to then, once counter samples have caught up with it."""
    found: list[tuple[Record, list[Datagram]]] = []

    def agree() -> bool:
        now, told = record(world, vm, "h1"), collectors.read()
        samples = [sample.values for one in told for sample in one.counters]
        names = {"packets_from": "in_unicast", "bytes_from": "in_octets", "packets_to": "out_unicast"}
        found.append((now, told))
        return (
            sum(len(one.flows) for one in told) == now["flow_samples"]
            and len(samples) == now["counter_samples"] > 0
            and all(now["counters"][name] == samples[-1][its] for name, its in names.items())
        )

    wait_until(agree, "collectors know what the switch has counted")
    return found[-1]


def _packets(one: Record) -> int:
    return int(one["counters"]["packets_from"] + one["counters"]["packets_to"])


def _bytes(one: Record) -> int:
    return int(one["counters"]["bytes_from"] + one["counters"]["bytes_to"])


def test_an_agent_that_is_killed_goes_on(world: World, collectors: Rig) -> None:
    vm, peer = world.vm("h1"), world.peer("h3")
    sample(world, vm, collectors.collectors, polling="1s")
    wait_until(lambda: record(world, vm, "h1"), "the port is sampled")
    world.expected.append(".*")  # the agent's death is told of
    sender = peer.worker("probe")
    before, _ = _agreed(world, vm, collectors)
    for flow in (1, 2):
        begun = record(world, vm, "h1")["pool"]
        sender.call("send", flow=flow, address=vm.address, port=NUMBERS, every_ms=1.0)
        wait_until(lambda begun=begun: record(world, vm, "h1")["pool"] >= begun + 300, "frames pass", 30)
        sender.call("stop", flow=flow)
        after, told = _agreed(world, vm, collectors)
        if flow == 1:
            world.cluster.agents["h1"].kill()
            world.cluster.restart(world.cluster.agents["h1"])
    assert_continuous(told)
    assert after["pool"] > before["pool"] and after["age_ns"] > before["age_ns"]
    estimate(told, int(before["pool"]), int(after["pool"]))


def test_a_destination_that_does_not_reach_a_collector_is_refused(world: World, collectors: Rig) -> None:
    away = "203.0.113.9"
    vm = world.vm("h1")
    world.expected.append(away)
    netns.ip("route", "add", f"{away}/32", "dev", "up0", namespace=world.cluster.name("h1"))
    try:
        sample(world, vm, [*collectors.collectors, away])
        wait_until(lambda: record(world, vm, "h1"), "the port is sampled")
        report = world.cluster.migrate(vm, "h2")
    finally:
        netns.ip("route", "del", f"{away}/32", "dev", "up0", namespace=world.cluster.name("h1"))
    assert report.outcome == "refused", report
    assert f"Collector {away}" in report.reason
    assert vm.place() == "h1"


def test_collectors_complain_of_a_source_that_begins_anew(tmp_path: Path) -> None:
    """Proof that the tests above can fail."""
    name = f"mg{os.getpid()}-sflow"
    netns.make(name)
    try:
        netns.ip("link", "set", "lo", "up", namespace=name)
        with rig(name, "127.0.0.1", tmp_path) as made:
            agent = sflow.SubAgent(AGENT, SUB_AGENT, SUB_AGENT)
            with netns.entered(netns.path(name)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for sequence in (1, 2, 3, 1, 2):
                    flow = sflow.flow_sample(
                        agent, sequence, sequence, 0, from_guest=True, length=60, header=bytes(60), vlans=(0, 0)
                    )
                    for port in (SFCAPD, SFACCTD, PLAIN):
                        sender.sendto(sflow.datagram(agent.head(), sequence, 0, [flow]), ("127.0.0.1", port))
                    sender.sendto(b"\0\0\0\5 is no datagram", ("127.0.0.1", PLAIN))
            wait_until(lambda: len(made.datagrams) == 10, "all is heard")
            told = "expecting flow '4' but received '1'"
            wait_until(lambda: any(told in line for line in made.complaints()), "sfacctd complains")
            assert len(made.tshark()) == 5
            good = [read(data) for data in made.datagrams if len(data) > 100]
            with pytest.raises(AssertionError, match="datagrams: not one after the other"):
                assert_continuous(good)
    finally:
        netns.remove(name)
