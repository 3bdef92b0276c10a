# SPDX-License-Identifier: GPL-2.0-only
"""A VM whose port checks TCP windows moves: what its peers send passes, what somebody forges does not."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from migrator.lab import netns, oracle
from migrator.lab.machines import Machine
from migrator.lab.processes import Worker, wait_until
from migrator.lab.workers import frames

from .rough_path import rough_path, single
from .world import World

PORT = 9410
ACK, PSH, RST = 16, 8, 4
MARK = b"forged mid-stream"
FAR = 1 << 30  # sequence numbers away from any window here


def declare(world: World, machine: Machine, document: dict[str, Any] | None) -> None:
    """By the operator's command."""
    command = ["set", _key(machine), "window", json.dumps(document)] if document else ["unset", _key(machine), "window"]
    ran = world.cluster.cli("port", *command)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    wait_until("the agent has it", lambda: bool(shown(world, machine)) == bool(document))


def shown(world: World, machine: Machine) -> dict[str, Any]:
    """The record as the operator sees it, {} without one."""
    ran = world.cluster.cli("--json", "port", "show", _key(machine), host=machine.place())
    assert ran.returncode == 0, ran.stderr
    (found,) = json.loads(ran.stdout)
    records: list[dict[str, Any]] = (found["status"] or {}).get("kinds", {}).get("window", [])
    return records[0] if records else {}


def outside(world: World, machine: Machine) -> list[int]:
    record = shown(world, machine)
    return [record["outside_from"], record["outside_to"]]


def _key(machine: Machine) -> str:
    return f"{machine.uuid}/{machine.ports[0].mac}"


@contextlib.contextmanager
def iperf(namespace: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = netns.inside(namespace, ["iperf3", "-p", str(PORT), *arguments])
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        if "-s" in arguments:
            wait_until("iperf3 listens", lambda: _listens(namespace))
        yield process
    finally:
        process.kill()
        process.communicate()


def _listens(namespace: str) -> bool:
    command = netns.inside(namespace, ["ss", "-Hltn", f"sport = :{PORT}"])
    return subprocess.run(command, capture_output=True, check=True).stdout != b""


def checked(world: World, machine: Machine) -> int:
    """Connections whose windows are known in both directions."""
    columns = oracle.columns(world.cluster, machine.place(), machine)
    known = columns.get("window_flags")
    return 0 if known is None else int((known & 7 == 3).sum())


def run_across(world: World, vm: Machine, server: str, client: str, address: str) -> dict[str, Any]:
    """iperf3 in both directions at once, there and back meanwhile. Returns its summary."""
    with iperf(server, "-s", "-1"), iperf(client, "-c", address, "-t", "8", "-P", "2", "--bidir", "-J") as running:
        wait_until("connections are checked", lambda: checked(world, vm) >= 4)
        for host in ("h2", "h1"):
            world.move(vm, host)
            assert checked(world, vm) >= 4, "the destination knows the windows"
        output, _ = running.communicate(timeout=60)
    end: dict[str, Any] = json.loads(output)["end"]
    return end


def _name(machine: Machine) -> str:
    return str(machine.lab.name(machine.name))


class Link:
    """A connection of a peer to a VM, both ends in this process, and a forger beside the peer."""

    def __init__(self, world: World, vm: Machine, peer: Machine) -> None:
        self.world, self.vm, self.peer = world, vm, peer
        with netns.entered(netns.path(_name(vm))):
            self._listener = socket.create_server(("0.0.0.0", PORT))
        with netns.entered(netns.path(_name(peer))):
            self._near = socket.create_connection((vm.address, PORT), timeout=20)
            self.forger = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self.forger.bind(("eth0", 0))
        self._far = self._listener.accept()[0]
        self._far.settimeout(20)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.forged = 0
        self.exchange()
        row = self._row()
        self._frames = [self._forge(*numbers, row) for numbers in ((RST, b""), (RST | ACK, b""), (ACK | PSH, MARK))]

    def close(self) -> None:
        for one in (self._listener, self._near, self._far, self.forger):
            one.close()

    def exchange(self) -> None:
        """It lives, in both directions, and brings what was sent."""
        for one, other in ((self._near, self._far), (self._far, self._near)):
            one.sendall(b"x" * 5000)
            got = b""
            while len(got) < 5000:
                got += other.recv(5000 - len(got))
            assert got == b"x" * 5000

    def _row(self) -> dict[str, int]:
        """What the switch knows of the connection."""
        columns = oracle.columns(self.world.cluster, self.vm.place(), self.vm)
        (at,) = [n for n, port in enumerate(columns["lport"].tolist()) if port == PORT]
        return {name: int(columns[name][at]) for name in ("window_end_from", "window_end_to") if name in columns}

    def _forge(self, flags: int, data: bytes, row: dict[str, int]) -> bytes:
        ports = (self._near.getsockname()[1], PORT)
        seq, ack = row.get("window_end_to", 0) + FAR, row.get("window_end_from", 0)
        body = frames.tcp(self.peer.address, self.vm.address, *ports, flags, seq, ack, data)
        packet = frames.ip(self.peer.address, self.vm.address, frames.TCP, body)
        return frames.ethernet(self.peer.ports[0].mac, self.vm.ports[0].mac, packet)

    def forge(self) -> None:
        """One of each: a reset, one that acknowledges, data."""
        for frame in self._frames:
            self.forger.send(frame)
            self.forged += 1

    @contextlib.contextmanager
    def forging(self) -> Iterator[None]:
        """All the time, from a thread."""
        thread = threading.Thread(target=self._run)
        self._stop.clear()
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.forge()


def seen(capture: Worker) -> int:
    """Forged data that has come to the guest's device."""
    return len(capture.call("captured", contains=MARK.hex())["frames"])


def test_what_is_forged_does_not_reach_the_guest(world: World) -> None:
    """Before, during and after a move: each is dropped and counted, once."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    declare(world, vm, {"check": "strict"})
    capture = vm.worker("raw")
    capture.call("capture")
    with contextlib.closing(Link(world, vm, peer)) as link:
        link.forge()
        wait_until("they are counted", lambda: outside(world, vm) == [0, link.forged])
        before = link.forged
        with link.forging():
            wait_until("the forger runs", lambda: link.forged > before + 30)
            world.move(vm, "h2")
            link.exchange()
            moved = link.forged
            wait_until("it goes on", lambda: link.forged > moved + 30)
            world.move(vm, "h1")
        link.exchange()
        world.cluster.settled(vm)
        wait_until(
            "each is counted once, whichever host dropped it",
            lambda: outside(world, vm) == [0, link.forged],
            interval_s=0.1,
            explain=lambda: f"{link.forged} forged, {outside(world, vm)} counted",
        )
        assert seen(capture) == 0
        link.exchange()


def test_without_the_option_it_does(world: World) -> None:
    """What the other tests drop would pass, and counting alone drops nothing."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    declare(world, vm, {"check": "count"})
    capture = vm.worker("raw")
    capture.call("capture")
    with contextlib.closing(Link(world, vm, peer)) as link:
        link.forge()
        wait_until("it comes to the guest", lambda: seen(capture) == 1)
        assert outside(world, vm) == [0, 3]
        declare(world, vm, None)
        link.forge()
        wait_until("it comes to the guest", lambda: seen(capture) == 2)
        link.exchange()


def test_no_segment_of_a_real_connection_is_outside(world: World) -> None:
    """Large frames of offloads, scaled windows, SACK: both ends are Linux's own TCP, in the largest frames it makes."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    declare(world, vm, {"check": "strict"})
    end = run_across(world, vm, _name(vm), _name(peer), vm.address)
    assert min(end["sum_received"]["bytes"], end["sum_received_bidir_reverse"]["bytes"]) > 1 << 20
    world.cluster.settled(vm)
    assert outside(world, vm) == [0, 0]


def test_a_path_that_loses_doubles_and_reorders(world: World) -> None:
    """The same where a hundredth is lost, a hundredth comes twice and a fifth late, before and behind the switch."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    declare(world, vm, {"check": "strict"})
    single(_name(vm))
    seed = random.randrange(1 << 32)
    with rough_path(peer, seed) as (path, namespace):
        end = run_across(world, vm, _name(vm), namespace, vm.address)
    where = f"seed {seed}: {path.lost} lost, {path.doubled} doubled, {path.late} late"
    assert min(path.lost, path.doubled, path.late) > 10, where
    assert end["sum_sent"]["retransmits"] > 0, where
    world.cluster.settled(vm)
    assert outside(world, vm) == [0, 0], where
