# SPDX-License-Identifier: GPL-2.0-only
"""A hostile guest on a host with the real switch, beside others that go on: floods, marks, other guests' addresses."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.running import Running
from datapath.provider import PortStatus

from .driver_lab import Guest, Host, hosts, rules, wait_until
from .test_driver_forward import talk

SO_MARK = 36
BATCH, BATCHES = 200, 40
TABLE, LEARNED_MAX = 512, 16
CLIENT = [{"direction": "from", "protocol": "any"}]
SERVER = [{"direction": "to", "protocol": "tcp", "ports": [[7000, 7999]]}]
SLOW_S = 10.0  # what others may notice at most, on a machine that does much besides


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosts(1) as made:
        yield made[0]


def status(host: Host, guest: Guest) -> PortStatus:
    return host.run(lambda: host.driver.port(guest.ref))


def running(host: Host) -> Running:
    assert host.driver._running is not None
    return host.driver._running


def macs(to: str, source: str) -> bytes:
    return bytes.fromhex((to + source).replace(":", ""))


def datagram(to: Guest, source: Guest, sport: int, dport: int, mac: str = "") -> bytes:
    """UDP in IPv4 in Ethernet, checksums left out."""
    addresses = socket.inet_aton(source.address) + socket.inet_aton(to.address)
    udp = struct.pack("!HHHH", sport, dport, 8, 0)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + ip[12:]
    return (macs(to.ref.mac, mac or source.ref.mac) + b"\x08\x00" + ip + udp).ljust(60, b"\0")


@contextlib.contextmanager
def wire(guest: Guest) -> Iterator[socket.socket]:
    """The guest's device, for frames as they come into its head."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        made.bind(("eth0", 0))
        return made

    with guest.run(make) as made:
        yield made


def judged(host: Host, guest: Guest) -> int:
    """Frames of the guest that the switch has passed or dropped, each counted once."""
    slot = next(one.slot for one in running(host).instances if one.ref == guest.ref)
    counters = running(host).kernel.counters.get(slot)
    assert counters is not None
    return int(counters["packets"][..., 0].sum() + counters["drops"].sum())


def send_all(host: Host, guest: Guest, sender: socket.socket, frames: Sequence[bytes]) -> None:
    """Batch by batch, each when the last has been judged: a veth's own queue loses what comes too fast."""
    before = judged(host, guest)
    for frame in frames:
        sender.send(frame)
    wait_until(lambda: judged(host, guest) == before + len(frames), "each frame is counted, once")


def test_a_guest_that_floods_its_connection_table_hurts_itself_alone(host: Host) -> None:
    flooder = host.guest("10.0.1.1", CLIENT, connections_max=TABLE)
    server, client = host.guest("10.0.1.2", SERVER), host.guest("10.0.1.3", CLIENT)
    ports = itertools.cycle(range(1024, 61_024))
    slowest = 0.0
    with wire(flooder) as sender:
        for port in range(7000, 7000 + BATCHES):
            flood = [datagram(server, flooder, n, n) for n in itertools.islice(ports, BATCH)]
            send_all(host, flooder, sender, flood)
            began = time.monotonic()
            talk(server, client, port)
            assert len(status(host, client).record["addresses"]) == 1
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < SLOW_S, "new connections of others, and the agent's own answers"
    tables = host.run(lambda: list(host.driver.dump(flooder.ref, "conntrack")))
    assert 0 < sum(map(len, tables)) <= TABLE
    full = [event for event in host.events if event.what == "full"]
    assert {event.ref for event in full} <= {flooder.ref}
    assert len(full) <= (BATCH * BATCHES).bit_length()
    assert set(status(host, flooder).drops) <= {"ct-full"}


def test_a_flood_of_invented_sources_takes_no_place_of_others(host: Host) -> None:
    """Anti-spoofing off, as for a VM that is a router itself."""
    flooder = host.guest("10.0.2.1", CLIENT, antispoof=False, learned_max=LEARNED_MAX)
    server, client = host.guest("10.0.2.2", SERVER), host.guest("10.0.2.3", CLIENT)
    invented = [f"02:99:00:00:{n >> 8:02x}:{n & 255:02x}" for n in range(BATCH)]
    with wire(flooder) as sender:
        send_all(host, flooder, sender, [datagram(server, flooder, 1, 1, mac) for mac in invented])
        assert status(host, flooder).drops["learn-limit"] == BATCH - LEARNED_MAX
        send_all(host, flooder, sender, [datagram(server, flooder, 1, 1, client.ref.mac)] * 10)
    talk(server, client)
    assert places(host, client) == ["port"], "nor does it take the MAC of another VM"


def places(host: Host, guest: Guest) -> list[str]:
    """Where the guest's MAC leads: to its own port or elsewhere."""
    keys, entries = running(host).kernel.l2.read()
    mac = np.frombuffer(bytes.fromhex(guest.ref.mac.replace(":", "")), np.uint8)
    own = (keys["mac"] == mac).all(axis=1)
    slot = next(one.slot for one in running(host).instances if one.ref == guest.ref)
    found = entries[own]
    return ["port" if (e["kind"], e["target"]) == (C.L2_PORT, slot) else "elsewhere" for e in found]


def test_a_guest_cannot_mark_its_packets_as_judged(host: Host) -> None:
    """A container's root may mark what it sends; the switch's own marks are not for guests."""
    guest, peer = host.guest("10.0.3.1", []), host.guest("10.0.3.2")
    with guest.socket(socket.SOCK_DGRAM) as sender:
        for count, mark in enumerate((0x6D696772, 0x6D696773), 1):
            sender.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            sender.sendto(b"x", (peer.address, 9000))
            wait_until(lambda count=count: status(host, guest).drops.get("policy", 0) == count, "it is judged")  # type: ignore[misc]


def test_a_flood_that_a_logging_rule_matches_leaves_the_agent_alone(host: Host) -> None:
    logged = rules({"direction": "from", "protocol": "any", "log": True})
    flooder, peer = host.guest("10.0.4.1", logged), host.guest("10.0.4.2", SERVER)
    frame = datagram(peer, flooder, 1, 1)
    group = macs("33:33:00:00:00:01", flooder.ref.mac) + frame[12:]  # judged one by one
    with wire(flooder) as sender:
        began = time.monotonic()
        for _ in range(10):
            send_all(host, flooder, sender, [group] * BATCH)
    took = time.monotonic() - began

    def logs() -> int:
        return sum(event.what == "log" and event.ref == flooder.ref for event in host.events)

    wait_until(lambda: logs() >= 64, "what may be told is told")
    assert logs() <= 64 + 10 * (took + 1)


def test_a_named_link_local_address_is_the_only_one(host: Host) -> None:
    """As a guest with the configuration of an operator: named, changed, free again."""
    guest, peer = host.guest("10.0.5.1", CLIENT), host.guest("10.0.5.2")
    sent = 0

    def send(source: str) -> dict[str, int]:
        nonlocal sent
        head = struct.pack("!IHBB", 6 << 28, 8, 17, 64)
        addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, "fe80::2")
        frame = macs(peer.ref.mac, guest.ref.mac) + b"\x86\xdd" + head + addresses + struct.pack("!HHHH", 1, sent, 8, 0)
        sent += 1
        with wire(guest) as sender:
            send_all(host, guest, sender, [frame])
        return dict(status(host, guest).drops)

    assert send("fe80::1") == {}
    host.run(lambda: host.driver.update(guest.ref, {**guest.record, "addresses": ["10.0.5.1", "fe80::5"]}))
    assert send("fe80::5") == {}
    assert send("fe80::1") == {"spoof-address": 1}
    host.run(lambda: host.driver.update(guest.ref, {**guest.record, "addresses": ["10.0.5.1"]}))
    assert send("fe80::1") == {"spoof-address": 1}, "free again"
