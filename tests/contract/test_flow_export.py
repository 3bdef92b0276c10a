# SPDX-License-Identifier: GPL-2.0-only
"""Flows of the ebpf driver, told exactly: whatever counts, ends, moves and is reported, in whatever order, collectors
add up what was counted. Connections begin and count in the table itself, as programs do it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.drivers.ebpf.flow_export import FlowExport
from datapath.state.flow_export import FlowExportDocument
from datapath.state.kind import Op, Table
from tests.contract.flow_vm import Collector, Vm, loopback_up, pause, wait
from tests.contract.hosts import Host, ebpf_host
from tests.killed_exporter import AFTER, BEFORE, killed
from tests.netns.flow_collectors import Collectors

pytestmark = pytest.mark.root


@pytest.mark.parametrize("version", ["netflow", "ipfix"])
def test_any_order_is_told_exactly(ebpf: Host, version: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    random.seed(seed)
    loopback_up()
    made = Collector()
    try:
        vm = Vm(ebpf, collectors=[made.endpoint], version=version)
        steps: list[Callable[[], None]] = [
            lambda: vm.begin(random.randrange(1, 60)),
            lambda: vm.count(0.5),
            lambda: vm.end(0.3),
            lambda: vm.expire(0.3),
            lambda: pause(random.random() * 0.3),
        ]
        for number in range(24):
            random.choice(steps)()
            if number == 8:
                ebpf.restart()
                vm.sweep_by_hand()
            if number % 6 == 5:
                vm.move(lambda: _several(steps))
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)
        _assert_continuous(made, version)
    finally:
        made.close()


@pytest.mark.parametrize("version", ["netflow", "ipfix"])
def test_an_agent_that_is_killed_in_a_datagram_tells_nothing_twice(ebpf: Host, version: str) -> None:
    """What it has noted and not sent is missing, and the sequence says so; nothing else is."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    random.seed(seed)
    loopback_up()
    made = Collector()
    try:
        vm = Vm(ebpf, collectors=[made.endpoint], version=version)
        lost = 0
        for when in (AFTER, BEFORE, AFTER, BEFORE):
            _tell_no_more(vm)
            vm.begin(40)
            vm.end(0.3)
            vm.driver.stop()
            for datagram in killed(ebpf.options, when, random.randrange(1, 5)):
                made.read()
                made.take(datagram)
                lost += 1
            ebpf.take_over()
            vm.sweep_by_hand()
            vm.stir()
        vm.driver.purge(vm.ref)
        assert (made.sums(), lost) == ((vm.packets, vm.bytes), 2), "what was sent and what was lost, once each"
        _assert_continuous(made, version)
    finally:
        made.close()


@pytest.mark.parametrize("version", ["netflow", "ipfix"])
def test_collectors_that_others_wrote_agree(ebpf: Host, tmp_path: Path, version: str) -> None:
    """nfcapd and nfacctd over three moves: the same sums each way, no gap in the sequence; tshark reads all."""
    loopback_up()
    collectors = Collectors(tmp_path, "127.0.0.1")
    with collectors.running():
        document = {"version": version, "collectors": collectors.endpoints, "source": "198.18.0.77", "domain": 4711}
        vm = Vm(ebpf, **document, template_refresh_s=1)
        for _ in range(3):
            vm.begin(30)
            pause(0.6)
            vm.move(vm.stir)
        vm.count(0.5)
        vm.driver.purge(vm.ref)
        collectors.finish()
    nfdump, nfacctd = collectors.nfdump("10.0.0.5"), collectors.nfacctd("10.0.0.5")
    assert (nfdump.counted(), nfacctd.counted()) == (vm.ways, vm.ways)
    assert (nfdump.complaints, nfacctd.complaints, collectors.malformed()) == ([], [], [])
    assert {row[0] for row in collectors.tshark("ip.src")} == {"198.18.0.77"}


def test_maps_of_another_size_are_taken_over() -> None:
    """What was reported before, and what had ended and was not, is known behind it."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces and bpf(2)")
    with ebpf_host() as host:
        loopback_up()
        made = Collector()
        try:
            vm = Vm(host, collectors=[made.endpoint], version="netflow")
            vm.begin(40)
            wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is reported")
            vm.count(0.5)
            vm.begin(10)
            vm.end(0.4)
            vm.expire(0.3)
            host.driver.stop()
            host.options["slots"] = 64
            host.take_over()
            vm.sweep_by_hand()
            vm.count(0.7)
            vm.end(0.5)
            vm.driver.purge(vm.ref)
            assert made.sums() == (vm.packets, vm.bytes)
            _assert_continuous(made, "netflow")
        finally:
            made.close()


def test_a_port_that_may_have_more_connections(ebpf: Host) -> None:
    """What is reported is known of all of them."""
    loopback_up()
    made = Collector()
    try:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.driver.update(vm.ref, ebpf.record(connections_max=100))
        vm.driver.load(vm.ref, Table("flow_export", Op.DELETE, records=[{"name": "flows"}]))
        vm.driver.load(vm.ref, Table("flow_export", records=FlowExportDocument(**vm.document).records()))
        vm.begin(90)
        wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is reported")
        vm.driver.update(vm.ref, ebpf.record(connections_max=1000))
        vm.begin(800)
        for _ in range(2):
            vm.count(0.5)
            wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is reported")
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)
    finally:
        made.close()


def test_a_collector_that_cannot_be_reached_is_an_obstacle(ebpf: Host) -> None:
    vm = Vm(ebpf, collectors=["127.0.0.1:9", "203.0.113.9:2055"])
    need = vm.driver.describe([vm.ref])
    assert (need.kinds["flow_export"], need.kinds["flows"]) == (1, 1)
    assert [one for one in vm.driver.probe(need) if "collector" in one] == [
        "flow_export: collector 203.0.113.9:2055 cannot be reached from this host: Network is unreachable"
    ]
    vm.driver.load(vm.ref, Table("flow_export", Op.DELETE, records=[{"name": "flows"}]))
    assert not {"flow_export", "flows"} & vm.driver.describe([vm.ref]).kinds.keys()


def test_what_no_collector_takes_is_told_later(ebpf: Host) -> None:
    """No route: nothing is marked as reported, and errors are counted."""
    loopback_up()
    made = Collector()
    try:
        vm = Vm(ebpf, collectors=["203.0.113.9:2055"])
        vm.begin(20)
        vm.end(0.5)
        wait(lambda: _record(vm)["errors"] > 0, "an error is counted")
        assert _record(vm)["records"] == 0
        later = FlowExportDocument(**{**vm.document, "collectors": [made.endpoint]}).records()
        vm.driver.load(vm.ref, Table("flow_export", records=later))
        wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is reported")
    finally:
        made.close()


def _record(vm: Vm) -> dict[str, Any]:
    (table,) = vm.driver.dump(vm.ref, "flow_export")
    assert table.records is not None
    return dict(table.records[0])


def _tell_no_more(vm: Vm) -> None:
    """This agent leaves what is due to the next one."""
    assert isinstance(vm.driver, EbpfDriver) and vm.driver._running is not None
    exporter = vm.driver._running.kinds.part("flow_export")
    assert isinstance(exporter, FlowExport) and exporter._thread is not None
    exporter._leave.set()
    exporter._thread.join()


def _several(steps: list[Callable[[], None]]) -> None:
    for step in random.choices(steps, k=3):
        step()


def _assert_continuous(made: Collector, version: str) -> None:
    if version == "netflow":
        assert [head[4] for head in made.heads] == list(range(len(made.heads)))
        uptimes = [head[2] for head in made.heads]
        assert uptimes == sorted(uptimes)
        assert len({head[5] for head in made.heads}) == 1
    else:
        assert made.heads[0][3] == 0 and [head[3] for head in made.heads] == sorted({head[3] for head in made.heads})
        assert len({head[4] for head in made.heads}) == 1
