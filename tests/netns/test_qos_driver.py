# SPDX-License-Identifier: GPL-2.0-only
"""Queues on devices: who else is there, agents that start again, devices that come later, and what a move leaves."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from datapath.errors import LoadRejected
from datapath.provider import Need, PortRef
from datapath.state.kind import Op, Table
from datapath.state.qos import QOS, QosDocument

from . import messages
from .driver_lab import Guest, Host, shelf, wait_until
from .private import ETH_P_ALL

PORT = 9000
BOTH = {"from": {"rate": "4mbit", "burst": "256KiB"}, "to": {"rate": "4mbit", "burst": "256KiB"}}
_SO_RCVBUFFORCE = 33
_NUMBER = struct.Struct("!I")


@pytest.fixture
def host() -> Iterator[Host]:
    with shelf.lend(1) as (made,):
        yield made


def records(**ways: Any) -> list[dict[str, Any]]:
    return QosDocument.model_validate(ways).records()


def limit(host: Host, guest: Guest, **ways: Any) -> None:
    host.run(lambda: host.driver.load(guest.ref, Table("qos", records=records(**ways))))


def shown(host: Host, guest: Guest) -> dict[str, dict[str, Any]]:
    tables = host.run(lambda: list(host.driver.dump(guest.ref, "qos")))
    return {record["direction"]: record for table in tables for record in table.records or ()}


def tc(host: Host, *arguments: str) -> str:
    return host.run(
        lambda: subprocess.run(["tc", *arguments], check=True, capture_output=True, text=True, timeout=10).stdout
    )


def shaper(host: Host) -> str:
    return f"mh{host.options['instance']}-q0"


def ip(host: Host, *arguments: str) -> None:
    host.run(lambda: subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10))


def devices(host: Host) -> str:
    return host.run(lambda: subprocess.run(["ip", "link"], check=True, capture_output=True, text=True).stdout)


def test_a_qdisc_of_somebody_else_is_refused_by_name(host: Host) -> None:
    guest = host.guest("10.0.0.1")
    tc(host, "qdisc", "add", "dev", guest.device, "root", "handle", "1:", "htb", "default", "2")
    with pytest.raises(LoadRejected, match=f"device {guest.device} .* qdisc htb"):
        limit(host, guest, **BOTH)
    assert shown(host, guest) == {}
    assert shaper(host) not in devices(host)
    limit(host, guest, to={"mode": "police", "rate": "4mbit"})


@pytest.mark.parametrize("before", [{}, {"to": {"rate": "2mbit"}}, BOTH], ids=["nothing", "to", "both"])
def test_what_cannot_be_applied_whole_is_not_applied_at_all(host: Host, before: dict[str, Any]) -> None:
    """The device gets its class first, then the shaper of the other direction fails: its name is another's, or it is
    gone."""
    guest = host.guest("10.0.0.1")
    if before:
        limit(host, guest, **before)
    if "from" in before:
        ip(host, "link", "del", shaper(host))
    else:
        ip(host, "link", "add", shaper(host), "type", "bridge")
    seen = in_force(host, guest)
    with pytest.raises(LoadRejected, match=f"port {guest.ref.mac} cannot be shaped"):
        limit(host, guest, **{"from": {"rate": "8mbit"}, "to": {"rate": "8mbit", "dscp": "ef"}})
    assert in_force(host, guest) == seen
    if "from" not in before:
        ip(host, "link", "del", shaper(host))
        limit(host, guest, to={"rate": "8mbit"})
        assert "rate 8Mbit" in tc(host, "class", "show", "dev", guest.device)


def in_force(host: Host, guest: Guest) -> list[Any]:
    """What the device, the records and the programs have."""
    slot = host.run(lambda: host.driver._parts().instances.find(guest.ref)).slot
    kernel = host.run(lambda: host.driver._parts().kernel)
    elements = [one.tobytes() for one in kernel.qos.view[slot * 2 : slot * 2 + 2]]
    queues = [tc(host, *what, guest.device) for what in (("qdisc", "show", "dev"), ("class", "show", "dev"))]
    return [*queues, shown(host, guest), elements, int(kernel.ports.view["features"][slot])]


def test_classes_are_there_while_a_port_shapes(host: Host) -> None:
    guest, other = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    limit(host, guest, **BOTH)
    limit(host, other, **{"from": {"rate": "8mbit", "priority": 5}})
    assert "rate 4Mbit ceil 4Mbit burst 128Kb" in tc(host, "class", "show", "dev", guest.device)
    assert sorted(line.split("rate ")[1].split()[0] for line in classes(host)) == ["4Mbit", "8Mbit"]
    host.run(
        lambda: host.driver.load(guest.ref, Table("qos", Op.DELETE, records=[{"direction": d} for d in ("from", "to")]))
    )
    assert "htb" not in tc(host, "qdisc", "show", "dev", guest.device)
    assert len(classes(host)) == 1
    host.run(lambda: host.driver.purge(other.ref))
    assert shaper(host) not in devices(host)


def classes(host: Host) -> list[str]:
    return tc(host, "class", "show", "dev", shaper(host)).splitlines()


def test_an_agent_that_starts_again_finds_its_classes_and_levels(host: Host) -> None:
    guest, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    limit(host, guest, **{"from": {"mode": "police", "rate": "64kbit", "burst": "64KiB"}, "to": {"rate": "4mbit"}})
    with guest.socket(socket.SOCK_DGRAM) as out:
        for _ in range(100):
            out.sendto(bytes(1000), (peer.address, PORT))
    wait_until(lambda: shown(host, guest)["from"]["dropped_packets"] > 0, "the bucket is empty")
    before = shown(host, guest)["from"]
    host.restart()
    after = shown(host, guest)["from"]
    assert before["debt_ns"] - 5e9 < after["debt_ns"] <= before["debt_ns"]
    assert after["dropped_packets"] == before["dropped_packets"]
    assert "rate 4Mbit" in tc(host, "class", "show", "dev", guest.device)
    host.run(lambda: host.driver.purge(guest.ref))
    assert "htb" not in tc(host, "qdisc", "show", "dev", guest.device)


def test_a_host_that_was_rebooted_limits_as_before(host: Host) -> None:
    """Maps, pair and qdiscs are gone, the ledger is not: classes and marks are made anew, buckets begin full."""
    guest, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    limit(host, guest, **{"from": {"rate": "4mbit", "burst": "256KiB", "priority": 5, "dscp": "ef"}, "to": BOTH["to"]})
    limit(host, peer, **{"from": {"mode": "police", "rate": "64kbit", "burst": "64KiB"}})
    with peer.socket(socket.SOCK_DGRAM) as out:
        for _ in range(100):
            out.sendto(bytes(1000), (guest.address, PORT))
    wait_until(lambda: shown(host, peer)["from"]["debt_ns"] > 0, "the bucket is used")
    before = [queues(host, guest), *(bare(host, one) for one in (guest, peer))]
    pins = host.driver._parts().pins

    def reboot() -> None:
        host.driver.stop()
        pins.clear()
        pins.make()
        for command in (["ip", "link", "del", shaper(host)], ["tc", "qdisc", "del", "dev", guest.device, "root"]):
            subprocess.run(command, check=True, timeout=10)

    host.run(reboot)
    host.start()
    assert [queues(host, guest), *(bare(host, one) for one in (guest, peer))] == before
    assert all(one["debt_ns"] == 0 == one["dropped_packets"] for one in shown(host, peer).values())
    with peer.socket(socket.SOCK_DGRAM) as out:
        for _ in range(100):
            out.sendto(bytes(1000), (guest.address, PORT))
    wait_until(lambda: shown(host, peer)["from"]["dropped_packets"] >= 30, "it polices")


def queues(host: Host, guest: Guest) -> list[str]:
    """Classes of the device and of the shaper."""
    return [*tc(host, "class", "show", "dev", guest.device).splitlines(), *classes(host)]


def bare(host: Host, guest: Guest) -> list[dict[str, Any]]:
    """Records without what is live and counted."""
    return [QOS.bare(record) for record in shown(host, guest).values()]


def test_a_device_that_comes_later_is_shaped(host: Host) -> None:
    ref = PortRef("6f1c0f6e-8a5d-4e0e-9d3e-00000000bb01", "02:00:00:00:bb:01", 1)
    record = {"mac": ref.mac, "network": "blue", "addresses": ["10.0.0.9"]}
    host.run(lambda: host.driver.stage(ref, record, "later0"))
    host.run(lambda: host.driver.load(ref, Table("qos", records=records(to={"rate": "4mbit"}))))
    host.run(lambda: subprocess.run(["ip", "link", "add", "later0", "type", "veth", "peer", "later1"], check=True))
    wait_until(lambda: "rate 4Mbit" in tc(host, "class", "show", "dev", "later0"), "the device has its class")
    host.run(lambda: host.driver.purge(ref))
    host.run(lambda: subprocess.run(["ip", "link", "del", "later0"], check=True))


def test_a_host_that_cannot_shape_says_so(host: Host) -> None:
    need = Need({}, [], 0, 0, {"qos": records(**BOTH)})
    assert host.run(lambda: host.driver.probe(need)) == []
    assert shaper(host) not in devices(host)
    host.run(lambda: subprocess.run(["ip", "link", "add", shaper(host), "type", "bridge"], check=True))
    (said,) = host.run(lambda: host.driver.probe(need))
    assert said.startswith("This host cannot shape")
    host.run(lambda: subprocess.run(["ip", "link", "del", shaper(host)], check=True))


@pytest.mark.parametrize("direction", ["from", "to"])
def test_what_waits_at_the_pause_leaves_before_it_whole_and_in_order(host: Host, direction: str) -> None:
    guest, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    limit(host, guest, **BOTH)
    sender, receiver = (guest, peer) if direction == "from" else (peer, guest)
    with sender.socket(socket.SOCK_DGRAM) as out, receiver.socket(socket.SOCK_DGRAM) as into:
        into.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
        receiver.run(lambda: into.bind(("0.0.0.0", PORT)))
        count = (256 << 10) // 1042 - 20  # what the bucket and the queue take together
        began = time.monotonic()
        for number in range(count):
            out.sendto(_NUMBER.pack(number).ljust(1000, b"."), (receiver.address, PORT))
        assert not host.run(lambda: host.driver.idle(guest.ref)), "half of it waits"
        host.run(lambda: host.driver.hold(guest.ref))
        wait_until(lambda: host.run(lambda: host.driver.idle(guest.ref)) is not False, "nothing waits any more")
        host.run(lambda: host.driver.quiesce(guest.ref))
        found: list[int] = []
        into.setblocking(False)

        def arrived() -> bool:
            try:
                while True:
                    found.append(_NUMBER.unpack_from(into.recv(2000))[0])
            except BlockingIOError:
                return len(found) >= count

        wait_until(arrived, "all of them arrive")
        assert found == list(range(count))
        debt_s = shown(host, guest)[direction]["debt_ns"] / 1e9
        cost_s = count * 1042 * 8 / 4_000_000
        assert cost_s - (time.monotonic() - began) <= debt_s <= cost_s, "what left early is paid for"
        host.run(lambda: host.driver.resume(guest.ref))
        back = classes(host)[0] if direction == "from" else tc(host, "class", "show", "dev", guest.device)
        assert "rate 4Mbit" in back


FRAMES, ROUNDS, FLOOD_BYTES = 256, 100, 200


def test_frames_that_several_cpus_let_out_of_the_shaper_stay_in_order(host: Host) -> None:
    """Two guests, each on a CPU of its own: whoever sends lets out what waits, the other's frames too."""
    senders, peer = [host.guest("10.0.0.1"), host.guest("10.0.0.2")], host.guest("10.0.0.3")
    cpus = sorted(os.sched_getaffinity(0))[:2]
    for guest in senders:
        limit(host, guest, **{"from": {"rate": "32gbit"}})
        introduce(guest, peer)
    with contextlib.ExitStack() as stack:
        into = stack.enter_context(peer.socket(socket.SOCK_DGRAM))
        into.bind(("0.0.0.0", PORT))
        seen = stack.enter_context(outgoing(host, peer.device))
        floods = [
            threading.Thread(target=flood, args=(stack.enter_context(guest.socket(socket.SOCK_DGRAM)), peer, cpu))
            for guest, cpu in zip(senders, cpus * 2, strict=False)
        ]
        for thread in floods:
            thread.start()
        for thread in floods:
            thread.join()
        found = numbers(seen, {guest.address for guest in senders})
    for guest in senders:
        assert len(found[guest.address]) > FRAMES, "they were seen"
        assert found[guest.address] == sorted(found[guest.address])


def introduce(guest: Guest, peer: Guest) -> None:
    """What waits for the answer to a question would be sent by the CPU that the answer comes on."""
    command = ["neigh", "replace", peer.address, "lladdr", peer.ref.mac, "dev", "eth0", "nud", "permanent"]
    guest.run(lambda: subprocess.run(["ip", *command], check=True, capture_output=True, timeout=10))


def outgoing(host: Host, device: str) -> socket.socket:
    """Sees frames in the order in which the switch hands them to a device."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 28)
        made.bind((device, ETH_P_ALL))
        made.setblocking(False)
        return made

    return host.run(make)


def flood(out: socket.socket, peer: Guest, cpu: int) -> None:
    """Numbered datagrams from one CPU, as fast as the kernel takes them."""
    os.sched_setaffinity(0, {cpu})  # of this thread
    out.connect((peer.address, PORT))
    out.setblocking(True)
    out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("=qq", 30, 0))
    for first in range(0, ROUNDS * FRAMES, FRAMES):
        messages.send(out, [_NUMBER.pack(number).ljust(FLOOD_BYTES, b".") for number in range(first, first + FRAMES)])


def numbers(seen: socket.socket, senders: set[str]) -> dict[str, list[int]]:
    """By sender, what was seen of their floods."""
    found: dict[str, list[int]] = {sender: [] for sender in senders}
    with contextlib.suppress(BlockingIOError):
        while True:
            frame, (_, _, kind, *_) = seen.recvfrom(2000)
            sender = socket.inet_ntoa(frame[26:30])
            if kind == socket.PACKET_OUTGOING and sender in found and len(frame) == 42 + FLOOD_BYTES:
                found[sender].append(_NUMBER.unpack_from(frame, 42)[0])
    return found


def test_a_queue_that_an_earlier_version_made_is_kept_while_a_port_shapes(host: Host) -> None:
    """There the program is at the far end of a veth pair."""
    guest, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    near, far = shaper(host), shaper(host).replace("q0", "q1")
    ip(host, "link", "add", near, "up", "txqueuelen", "65536", "type", "veth", "peer", "name", far)
    ip(host, "link", "set", far, "up")
    limit(host, guest, **BOTH)
    with guest.socket(socket.SOCK_DGRAM) as out, peer.socket(socket.SOCK_DGRAM) as into:
        into.bind(("0.0.0.0", PORT))
        out.sendto(b"by the old pair", (peer.address, PORT))
        assert into.recv(100) == b"by the old pair"
    host.run(lambda: host.driver.purge(guest.ref))
    assert near not in devices(host) and far not in devices(host)
    limit(host, peer, **BOTH)
    assert f"{near}@{far}" in devices(host), "a macvlan on the device below"
