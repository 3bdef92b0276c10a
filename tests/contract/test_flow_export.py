# SPDX-License-Identifier: GPL-2.0-only
"""Flows of the ebpf driver, told exactly: whatever counts, ends, moves and is reported, in whatever order, collectors
add up what was counted. Connections begin and count in the table itself, as programs do it."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datapath.drivers.ebpf import conntrack, layout
from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.drivers.ebpf.flow_export import FlowExport
from datapath.drivers.ebpf.instances import Instance
from datapath.provider import Driver
from datapath.state.flow_export import FlowExportDocument
from datapath.state.kind import Op, Table
from tests.contract.hosts import Host, ebpf_host, inside
from tests.killed_exporter import AFTER, BEFORE, killed
from tests.netns.flow_collectors import Collectors

CHANNEL = 4711
TEMPLATE_SETS = {0, 2}
PACKETS, BYTES = 2, 1  # information elements


class Collector:
    """A socket, and what it makes of datagrams by the templates in them."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self._socket.bind(("127.0.0.1", 0))
        self._templates: dict[int, list[tuple[int, int]]] = {}
        self.heads: list[tuple[int, ...]] = []
        self.records: list[dict[int, int]] = []

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        self._socket.close()

    def read(self) -> None:
        """All that has come."""
        while select.select([self._socket], [], [], 0)[0]:
            self.take(self._socket.recv(65535))

    def take(self, datagram: bytes) -> None:
        v9 = datagram[1] == 9
        self.heads.append(struct.unpack_from("!HHIIII" if v9 else "!HHIII", datagram))
        body = datagram[20 if v9 else 16 :]
        while body:
            number, size = struct.unpack_from("!HH", body)
            self._set(number, body[4:size])
            body = body[size:]

    def _set(self, number: int, body: bytes) -> None:
        at = 0
        while number in TEMPLATE_SETS and at < len(body):
            template, count = struct.unpack_from("!HH", body, at)
            fields = struct.unpack_from(f"!{2 * count}H", body, at + 4)
            self._templates[template] = list(zip(fields[::2], fields[1::2], strict=True))
            at += 4 + 4 * count
        while number not in TEMPLATE_SETS and len(body) - at >= sum(length for _, length in self._templates[number]):
            record = {}
            for element, length in self._templates[number]:
                record[element] = int.from_bytes(body[at : at + length], "big")
                at += length
            self.records.append(record)

    def sums(self) -> tuple[int, int]:
        self.read()
        return sum(one[PACKETS] for one in self.records), sum(one[BYTES] for one in self.records)


class Vm:
    """A port that exports flows, on its way from instance to instance, and the truth of what was counted."""

    def __init__(self, host: Host, **document: Any) -> None:
        self.host = host
        self.packets = self.bytes = 0
        self.ways = {"from": (0, 0), "to": (0, 0)}  # (packets, bytes) of each direction
        self._next = 1
        self.document = {"active_timeout_s": 1, "inactive_timeout_s": 1, **document}
        self.ref = host.stage(epoch=1)
        self.driver.load(self.ref, Table("flow_export", records=FlowExportDocument(**self.document).records()))
        self.driver.open(self.ref)

    @property
    def driver(self) -> Driver:
        """Another object after a restart."""
        return self.host.driver

    def instance(self) -> Instance:
        assert isinstance(self.driver, EbpfDriver) and self.driver._running is not None
        return self.driver._running.instances.find(self.ref)

    def clock(self) -> int:
        assert isinstance(self.driver, EbpfDriver) and self.driver._running is not None
        return self.driver._running.words.clock(self.instance().slot)

    def begin(self, count: int) -> None:
        numbers = np.arange(self._next, self._next + count, dtype="<u8")
        self._next += count
        keys = np.zeros(count, layout.CT_KEY)
        keys["laddr"][:, 2], keys["laddr"][:, 3] = 0xFFFF, 0x0A000005
        keys["raddr"][:, 2], keys["raddr"][:, 3] = 0xFFFF, 0x0B000000 + numbers
        keys["lport"], keys["rport"], keys["proto"] = 443, 50_000, 6
        entries = np.zeros(count, layout.CT_ENTRY)
        entries["id"] = numbers << np.uint64(20) | numbers
        entries["word"] = (entries["id"] & np.uint64(0xFFFFFFFF)) << np.uint64(32) | np.uint64(3)
        entries["began"] = entries["seen"] = self.clock()
        instance = self.instance()
        instance.table.load(keys, entries)
        if instance.dirty is not None:
            instance.dirty.load(keys, np.ones(count, instance.dirty.value))
        self.count(1.0)

    def count(self, part: float) -> None:
        """Some connections count packets, in one direction or both."""
        table = self.instance().table
        keys, entries = table.read()
        some = np.random.default_rng(random.getrandbits(32)).random((len(keys), 2)) < part
        entries["packets"] += some.astype("<u8")
        entries["bytes"] += some * np.uint64(100)
        entries["seen"] = np.maximum(entries["seen"], self.clock())
        self.packets, self.bytes = self.packets + int(some.sum()), self.bytes + 100 * int(some.sum())
        for side, way in enumerate(("from", "to")):
            more, (packets, amount) = int(some[:, side].sum()), self.ways[way]
            self.ways[way] = packets + more, amount + 100 * more
        table.load(keys, entries)

    def end(self, part: float) -> None:
        """Some connections end."""
        keys, _ = self.instance().table.read()
        keys = keys[np.random.default_rng(random.getrandbits(32)).random(len(keys)) < part]
        if len(keys):
            self.driver.load(self.ref, Table("conntrack", Op.DELETE, columns=conntrack.key_columns(keys)))

    def stir(self) -> None:
        """A little of everything."""
        self.count(0.5)
        self.end(0.2)
        self.begin(5)

    def move(self, between: Callable[[], None]) -> None:
        """To another instance; `between` happens before the pause, and after it before the accounting has come."""
        source, driver = self.ref, self.driver
        target = self.host.stage(epoch=source.epoch + 1)
        driver.accept_redirect(target, CHANNEL + target.epoch, "there")
        driver.track(source)
        for kind in ("flow_export", "conntrack"):
            for table in driver.dump(source, kind):
                driver.load(target, table)
        between()
        driver.quiesce(source)
        for table in driver.drain(source):
            driver.load(target, table)
        driver.commit(target)
        driver.open(target)
        self.ref = target
        between()
        for table in driver.settle(source):
            driver.load(target, table)
        between()
        driver.settled(target)
        driver.purge(source)


@pytest.fixture
def ebpf(switches: Callable[[str], Host]) -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces and bpf(2)")
    made = switches("ebpf")
    with inside(made):
        try:
            yield made
        finally:
            made.empty()
    assert {sort: names for sort, names in made.driver.remains().items() if names} == {}


pytestmark = pytest.mark.root


@pytest.mark.parametrize("version", ["netflow", "ipfix"])
def test_any_order_is_told_exactly(ebpf: Host, version: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    random.seed(seed)
    _loopback_up()
    made = Collector()
    try:
        vm = Vm(ebpf, collectors=[made.endpoint], version=version)
        steps: list[Callable[[], None]] = [
            lambda: vm.begin(random.randrange(1, 60)),
            lambda: vm.count(0.5),
            lambda: vm.end(0.3),
            lambda: _pass(random.random() * 0.3),
        ]
        for number in range(24):
            random.choice(steps)()
            if number == 8:
                ebpf.restart()
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
    _loopback_up()
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
            vm.stir()
        vm.driver.purge(vm.ref)
        assert (made.sums(), lost) == ((vm.packets, vm.bytes), 2), "what was sent and what was lost, once each"
        _assert_continuous(made, version)
    finally:
        made.close()


@pytest.mark.parametrize("version", ["netflow", "ipfix"])
def test_collectors_that_others_wrote_agree(ebpf: Host, tmp_path: Path, version: str) -> None:
    """nfcapd and nfacctd over three moves: the same sums each way, no gap in the sequence; tshark reads all."""
    _loopback_up()
    collectors = Collectors(tmp_path, "127.0.0.1")
    with collectors.running():
        document = {"version": version, "collectors": collectors.endpoints, "source": "198.18.0.77", "domain": 4711}
        vm = Vm(ebpf, **document, template_refresh_s=1)
        for _ in range(3):
            vm.begin(30)
            _pass(0.6)
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
        _loopback_up()
        made = Collector()
        try:
            vm = Vm(host, collectors=[made.endpoint], version="netflow")
            vm.begin(40)
            _wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is reported")
            vm.count(0.5)
            vm.begin(10)
            vm.end(0.4)
            host.driver.stop()
            host.options["slots"] = 64
            host.take_over()
            vm.count(0.7)
            vm.end(0.5)
            vm.driver.purge(vm.ref)
            assert made.sums() == (vm.packets, vm.bytes)
            _assert_continuous(made, "netflow")
        finally:
            made.close()


def test_a_port_that_may_have_more_connections(ebpf: Host) -> None:
    """What is reported is known of all of them."""
    _loopback_up()
    made = Collector()
    try:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.driver.update(vm.ref, ebpf.record(connections_max=100))
        vm.driver.load(vm.ref, Table("flow_export", Op.DELETE, records=[{"name": "flows"}]))
        vm.driver.load(vm.ref, Table("flow_export", records=FlowExportDocument(**vm.document).records()))
        vm.begin(90)
        _wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is reported")
        vm.driver.update(vm.ref, ebpf.record(connections_max=1000))
        vm.begin(800)
        for _ in range(2):
            vm.count(0.5)
            _wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is reported")
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
    _loopback_up()
    made = Collector()
    try:
        vm = Vm(ebpf, collectors=["203.0.113.9:2055"])
        vm.begin(20)
        vm.end(0.5)
        _wait(lambda: _record(vm)["errors"] > 0, "an error is counted")
        assert _record(vm)["records"] == 0
        later = FlowExportDocument(**{**vm.document, "collectors": [made.endpoint]}).records()
        vm.driver.load(vm.ref, Table("flow_export", records=later))
        _wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is reported")
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


def _pass(seconds: float) -> None:
    """Time, in which the exporter does what is due."""
    select.select([], [], [], seconds)


def _loopback_up() -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")


def _wait(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, what
        _pass(0.05)
