# SPDX-License-Identifier: GPL-2.0-only
"""A limited VM moves under load: its rate, its burst and what waits for it, at either host and across the move."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from migrator.lab import netns
from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until

from .world import World

FRAME_BYTES = 1042  # Ethernet, IPv4, UDP and the data
HEADERS = 42
PORT = 9400
QUIET_S = 0.5  # what waits comes within
OTHERS_BYTES = 120  # at most, of a frame that kernels and announcements send by themselves: these may be dropped, too
BURST = 256 << 10
TCP_SHARE = 1448 / 1514  # data in a full frame
_NUMBER = struct.Struct("!I")
_SO_TIMESTAMPNS, _TIMESPEC = 35, struct.Struct("=qq")
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


class Flood:
    """Numbered datagrams from one machine to another, twice as fast as its rate lets them pass."""

    def __init__(self, sender: Machine, receiver: Machine, rate_bps: int) -> None:
        self.rate_bps = rate_bps
        self.sent = 0
        self.arrivals: list[tuple[float, int]] = []  # kernel's time in seconds, number
        self._going, self._stop, self._end = threading.Event(), threading.Event(), threading.Event()
        self._going.set()
        with inside(receiver):
            self._in = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._in.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 32 << 20)
            self._in.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._in.bind(("0.0.0.0", PORT))
        with inside(sender):
            self._out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            # what waits in the shaper of another namespace counts as this socket's still
            self._out.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 32 << 20)
            self._out.connect((receiver.address, PORT))
        self._threads = [threading.Thread(target=run) for run in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        """What comes too late is sent as soon as it can be."""
        due, last, each = 0.0, time.monotonic(), 2 * self.rate_bps / 8 / FRAME_BYTES
        while not self._stop.wait(0.005):
            now = time.monotonic()
            due, last = due + (now - last) * each if self._going.is_set() else 0.0, now
            while due >= 1 and self._going.is_set() and not self._stop.is_set():
                self._out.send(_NUMBER.pack(self.sent).ljust(FRAME_BYTES - HEADERS, b"."))
                self.sent, due = self.sent + 1, due - 1

    def _receive(self) -> None:
        while not self._end.is_set():
            if not select.select([self._in], [], [], 0.1)[0]:
                continue
            data, ancillary, _, _ = self._in.recvmsg(2048, 256)
            seconds, ns = _TIMESPEC.unpack(ancillary[0][2])
            self.arrivals.append((seconds + ns / 1e9, _NUMBER.unpack_from(data)[0]))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is sent inside."""
        self._going.clear()
        try:
            yield
        finally:
            self._going.set()

    def run_on(self, count: int) -> None:
        goal = len(self.arrivals) + count
        wait_until(f"{count} datagrams arrive", lambda: len(self.arrivals) >= goal, 30.0)

    def finish(self) -> None:
        """No more is sent; what waits has time to arrive."""
        self._stop.set()
        self._threads[0].join()
        seen = -1
        while seen < len(self.arrivals):
            seen = len(self.arrivals)
            select.select([], [], [], QUIET_S)

    def close(self) -> None:
        self._stop.set()
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._in.close()
        self._out.close()

    @property
    def numbers(self) -> list[int]:
        return [number for _, number in self.arrivals]

    def excess_bytes(self) -> float:
        """By how much more than the rate the densest interval passed, whatever its length: at most the burst."""
        began, least, most = self.arrivals[0][0], 0.0, 0.0
        for index, (moment, _) in enumerate(self.arrivals):
            before = index * FRAME_BYTES - (moment - began) * self.rate_bps / 8
            least = min(least, before)
            most = max(most, before + FRAME_BYTES - least)
        return most

    def expected_bytes(self) -> float:
        """What the rate lets pass from the first arrival to the last."""
        return (self.arrivals[-1][0] - self.arrivals[0][0]) * self.rate_bps / 8


def inside(machine: Machine) -> contextlib.AbstractContextManager[None]:
    return netns.entered(netns.path(machine.lab.name(machine.name)))


def limit(world: World, machine: Machine, **ways: Any) -> None:
    """By the operator's command, on h1."""
    ran = world.cluster.cli("port", "set", f"{machine.uuid}/{machine.ports[0].mac}", "qos", json.dumps(ways))
    assert ran.returncode == 0, ran.stderr + ran.stdout
    wait_until("the agent has it", lambda: records(world, machine, "h1").keys() == ways.keys())


def records(world: World, machine: Machine, host: str) -> dict[str, dict[str, Any]]:
    """By direction, as `migrator port show` has them on the host."""
    ran = world.cluster.cli("port", "show", f"{machine.uuid}/{machine.ports[0].mac}", "--json", host=host)
    assert ran.returncode == 0, ran.stderr
    (shown,) = json.loads(ran.stdout)
    return {record["direction"]: record for record in shown["status"]["kinds"].get("qos", ())}


@pytest.fixture
def flood() -> Iterator[Callable[..., Flood]]:
    with contextlib.ExitStack() as stack:

        def made(*arguments: Any) -> Flood:
            flood = Flood(*arguments)
            stack.callback(flood.close)
            return flood

        yield made


RATE = 4_000_000


@pytest.mark.parametrize(("mode", "direction"), [("shape", "from"), ("shape", "to"), ("police", "from")])
def test_a_flood_passes_at_the_rate_and_what_waits_arrives_once(
    world: World, flood: Callable[..., Flood], direction: str, mode: str
) -> None:
    """Two moves with the queue full: each datagram arrives once and in order, or is counted as dropped."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    limit(world, vm, **{direction: {"mode": mode, "rate": "4mbit", "burst": BURST}})
    sender, receiver = (vm, peer) if direction == "from" else (peer, vm)
    introduce(vm, peer)
    stream = flood(sender, receiver, RATE)
    stream.run_on(2 * BURST // FRAME_BYTES)  # the burst is used up
    for host in ("h2", "h1"):
        world.move(vm, host)
        stream.run_on(200)
    stream.finish()
    passed, expected = len(stream.numbers) * FRAME_BYTES, stream.expected_bytes()
    assert 0.95 * expected <= passed <= 1.05 * expected + BURST
    assert_all_is_accounted(world, vm, direction, stream)


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """For guests and who sends for them: on the lab's wires Linux takes in a frame on the CPU that sends it, and one
    that another CPU sends later may be quicker."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # of this thread, and of all that it begins
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


LARGE_BURST = 512 << 10  # half of it may wait: 524 ms of the rate, 251 frames


@pytest.mark.usefixtures("one_cpu")
def test_full_queues_of_both_directions_move_and_are_full_again_when_the_next_move_begins(
    world: World, flood: Callable[..., Flood]
) -> None:
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    limit(world, vm, **{way: {"rate": "4mbit", "burst": LARGE_BURST} for way in ("from", "to")})
    introduce(vm, peer)
    streams = {"from": flood(vm, peer, RATE), "to": flood(peer, vm, RATE)}
    for here, there in (("h1", "h2"), ("h2", "h1")):
        full(vm, here)
        world.move(vm, there)
        if there == "h2":  # a queue is filled by a burst, which the VM has brought none of
            with streams["from"].paused(), streams["to"].paused():
                wait_until("the bursts are whole", lambda host=there: not any(debts(world, vm, host)), 20.0)
    for stream in streams.values():
        stream.run_on(100)
        stream.finish()
    for direction, stream in streams.items():
        assert_all_is_accounted(world, vm, direction, stream, LARGE_BURST)


FULL = 150  # frames: 312 ms of the rate


def full(vm: Machine, host: str) -> None:
    """Wait until both directions have a backlog."""
    wait_until(
        f"both queues are full at {host}",
        lambda: min(waiting(vm, host)) >= FULL,
        20.0,
        0.005,
        lambda: f"{waiting(vm, host)} frames",
    )


def waiting(vm: Machine, host: str) -> list[int]:
    """Frames in the shaper's queues: from the guest, to it. No other port of the host shapes."""
    place, found = vm.lab.name(host), []
    for device in (f"mh{host}-q0", vm.ports[0].devices[host]):
        shown = netns.run(["tc", "-n", place, "-s", "class", "show", "dev", device])
        found.append(sum(int(number) for number in re.findall(r"backlog \S+b (\d+)p", shown)))
    return found


def debts(world: World, vm: Machine, host: str) -> list[int]:
    return [record["debt_ns"] for record in records(world, vm, host).values()]


def introduce(vm: Machine, peer: Machine) -> None:
    """A neighbour that is asked for again would want its share."""
    for one, other in ((vm, peer), (peer, vm)):
        command = ["neigh", "replace", other.address, "lladdr", other.ports[0].mac, "dev", "eth0", "nud", "permanent"]
        netns.ip(*command, namespace=one.lab.name(one.name))


def assert_all_is_accounted(world: World, vm: Machine, direction: str, stream: Flood, burst: int = BURST) -> None:
    """The VM is at h1."""
    numbers = stream.numbers
    assert numbers == sorted(set(numbers)), "twice, or out of order"
    assert stream.excess_bytes() <= burst * 1.1, "more than the rate and the burst in some interval"
    world.cluster.settled(vm)
    known: dict[str, Any] = {}

    def accounted() -> bool:
        known.update(records(world, vm, "h1")[direction])
        dropped = stream.sent - len(numbers)
        others, others_bytes = known["dropped_packets"] - dropped, known["dropped_bytes"] - dropped * FRAME_BYTES
        return 0 <= others <= others_bytes <= others * OTHERS_BYTES

    wait_until(
        "every datagram arrived or is counted",
        accounted,
        interval_s=0.2,
        explain=lambda: f"{stream.sent} sent, {len(numbers)} arrived, {known}",
    )


def test_a_vm_that_has_used_its_burst_has_none_at_the_other_host(world: World) -> None:
    """The bucket of 256 KiB takes 32 s to fill again: what is left of the debt is what time has paid."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    limit(world, vm, **{"from": {"mode": "police", "rate": "64kbit", "burst": BURST}})
    with inside(vm), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        began = time.monotonic()
        for _ in range(2 * BURST // FRAME_BYTES):
            out.sendto(bytes(FRAME_BYTES - HEADERS), (peer.address, PORT))
        wait_until("the burst is used up", lambda: records(world, vm, "h1")["from"]["dropped_packets"] > 0)
        world.move(vm, "h2")
        world.cluster.settled(vm)
        found = records(world, vm, "h2")["from"]
        passed_s = time.monotonic() - began
        full = BURST * 8 / 64_000
        assert full - passed_s - 1 <= found["debt_ns"] / 1e9 <= full
        for _ in range(2 * BURST // FRAME_BYTES):
            out.sendto(bytes(FRAME_BYTES - HEADERS), (peer.address, PORT))
        refilled = (time.monotonic() - began) * 8000 / FRAME_BYTES  # since the burst was used up

        def dropped() -> int:
            return int(records(world, vm, "h2")["from"]["dropped_packets"]) - int(found["dropped_packets"])

        wait_until(
            "no more than time has paid passes", lambda: dropped() >= 2 * BURST // FRAME_BYTES - refilled - 1, 10.0
        )


@pytest.mark.alone
@pytest.mark.parametrize("direction", ["from", "to"])
def test_tcp_has_its_rate_across_moves(world: World, direction: str) -> None:
    """iperf3's own count, by the share of data in full frames."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    limit(world, vm, **{direction: {"rate": "20mbit", "burst": "512KiB"}})
    client, server = (vm, peer) if direction == "from" else (peer, vm)
    with iperf(server, "-s", "-1"), iperf(client, "-c", server.address, "-t", "5", "-J") as running:
        for host in ("h2", "h1"):
            world.move(vm, host)
        output, _ = running.communicate(timeout=40)
    end = json.loads(output)["end"]
    rate = end["sum_received"]["bits_per_second"]
    burst_share = (512 << 10) * 8 / end["sum_received"]["seconds"] * TCP_SHARE
    assert 20e6 * TCP_SHARE * 0.95 <= rate <= 20e6 * TCP_SHARE * 1.05 + burst_share


@pytest.mark.alone
@pytest.mark.parametrize("direction", ["from", "to"])
def test_tcp_has_its_rate_under_a_policer(world: World, direction: str) -> None:
    """Before, across and after a move, with the burst that a document without one has and Linux's usual algorithm."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    limit(world, vm, **{direction: {"mode": "police", "rate": "20mbit"}})
    client, server = (vm, peer) if direction == "from" else (peer, vm)
    burst = records(world, vm, "h1")[direction]["burst_bytes"]
    for host in ("", "h2", ""):
        with iperf(server, "-s", "-1"), iperf(client, "-c", server.address, "-t", "4", "-J", "-C", "cubic") as running:
            if host:
                world.move(vm, host)
            output, _ = running.communicate(timeout=40)
        received = json.loads(output)["end"]["sum_received"]
        rate, burst_share = received["bits_per_second"], burst * 8 / received["seconds"] * TCP_SHARE
        assert 20e6 * TCP_SHARE * 0.95 <= rate <= 20e6 * TCP_SHARE * 1.05 + burst_share, host
    dropped = records(world, vm, "h2")[direction]["dropped_packets"]
    assert dropped >= json.loads(output)["end"]["sum_sent"]["retransmits"] > 0, "it is the policer that limited it"


@contextlib.contextmanager
def iperf(machine: Machine, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Ends with the block."""
    command = netns.inside(machine.lab.name(machine.name), ["iperf3", "-p", str(PORT), *arguments])
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        if "-s" in arguments:
            wait_until("iperf3 listens", lambda: _listens(machine))
        yield process
    finally:
        process.kill()
        process.communicate()


def _listens(machine: Machine) -> bool:
    with inside(machine):
        return subprocess.run(["ss", "-Hltn", f"sport = :{PORT}"], capture_output=True, check=True).stdout != b""
