# SPDX-License-Identifier: GPL-2.0-only
"""A port whose connections begin, count and end in the table itself, as by programs, and a collector of its flows."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from pyroute2 import IPRoute

from datapath.drivers.ebpf import conntrack, layout
from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.layout import C
from datapath.provider import Driver
from datapath.state.conntrack import STATES, TIMEOUTS
from datapath.state.flow_export import FlowExportDocument
from datapath.state.kind import Op, Table
from tests.contract.hosts import Host

CHANNEL = 4711
POINTS = ("copied", "quiesced", "committed", "opened", "accounting", "accounted", "settled")
"""Of a move; "accounting": after each table of it."""
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
        self.sweep_by_hand()

    def sweep_by_hand(self) -> None:
        """A sweep of the driver's own would revive what `expire` has found too old."""
        assert isinstance(self.driver, EbpfDriver) and self.driver._running is not None
        self.driver._running.sweeper.stop()

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

    def begin(self, count: int, *, again: bool = False) -> None:
        """Some connections begin and count; `again`: between the same ends as the last that did."""
        self._next += 0 if again else count
        numbers = np.arange(self._next - count, self._next, dtype="<u8")
        keys = np.zeros(count, layout.CT_KEY)
        keys["laddr"][:, 2], keys["laddr"][:, 3] = 0xFFFF, 0x0A000005
        keys["raddr"][:, 2], keys["raddr"][:, 3] = 0xFFFF, 0x0B000000 + numbers
        keys["lport"], keys["rport"], keys["proto"] = 443, 50_000, 6
        entries = np.zeros(count, layout.CT_ENTRY)
        entries["id"] = numbers << np.uint64(20) | numbers | np.uint64(again) << np.uint64(50)
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
        keys, entries = keys[_live(entries)], entries[_live(entries)]
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

    def expire(self, part: float) -> None:
        """Some connections are too old, and what an earlier call found too old goes: a sweep."""
        assert isinstance(self.driver, EbpfDriver) and self.driver._running is not None
        running, instance = self.driver._running, self.instance()
        keys, entries = instance.table.read()
        some = _live(entries) & (np.random.default_rng(random.getrandbits(32)).random(len(keys)) < part)
        entries["word"][some] = entries["word"][some] & ~np.uint64(0xFF) | np.uint64(STATES["CLOSE_WAIT"])
        instance.table.load(keys[some], entries[some])
        later = self.clock() + 10**6 * (TIMEOUTS["tcp_close_wait"][1] + 1)
        running.kernel.run("ct_expire", running.kernel.context("ct_sweep", slot=instance.slot, now=later))

    def stir(self) -> None:
        """A little of everything."""
        self.count(0.5)
        self.expire(0.2)
        self.end(0.2)
        self.begin(5)

    def move(
        self,
        between: Callable[[], None],
        at: Callable[[str], None] = lambda _: None,
        *,
        drained: bool = True,
        filled: bool = False,
        epoch: int = 0,
        **changes: Any,
    ) -> None:
        """To another instance; `between` happens before the pause, and after it before the accounting has come.

        `at` is called at POINTS. Not `drained`: the port opens without the last changes; `filled`: what it lacks comes
        then. `epoch`: of the instance, else the next; `changes`: of the port's record there.
        """
        source = self.ref
        target = self.host.stage(epoch=epoch or source.epoch + 1, **changes)
        self.driver.accept_redirect(target, CHANNEL + target.epoch, "there")
        self.driver.track(source)
        for kind in ("flow_export", "conntrack"):
            for table in self.driver.dump(source, kind):
                self.driver.load(target, table)
        between()
        at("copied")
        self.driver.quiesce(source)
        at("quiesced")
        for table in self.driver.drain(source) if drained else ():
            self.driver.load(target, table)
        self.driver.commit(target)
        at("committed")
        self.driver.open(target)
        self.ref = target
        at("opened")
        between()
        for table in self.driver.dump(source, "conntrack") if filled else ():
            self.driver.load(target, replace(table, op=Op.FILL))
        for table in list(self.driver.settle(source)):
            self.driver.load(target, table)
            at("accounting")
        between()
        at("accounted")
        self.driver.settled(target)
        at("settled")
        self.driver.purge(source)


def _live(entries: Any) -> Any:
    return conntrack.flags(entries) & (C.CT_F_DYING | C.CT_F_DEAD) == 0


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """One at the loopback address of this thread's namespace."""
    loopback_up()
    made = Collector()
    try:
        yield made
    finally:
        made.close()


def loopback_up() -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")


def wait(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, what
        pause(0.05)


def pause(seconds: float) -> None:
    """Time, in which the exporter does what is due."""
    select.select([], [], [], seconds)
