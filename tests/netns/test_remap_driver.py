# SPDX-License-Identifier: GPL-2.0-only
"""Remap rules in the driver: how long many take, and what an agent that starts again, or a host, finds of them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from datapath.drivers.ebpf.remap import Elements, elements
from datapath.errors import LoadRejected
from datapath.provider import Need
from datapath.state.kind import Op, Record, Table
from datapath.state.remap import RemapDocument

from .driver_lab import Guest, Host, hosts, shelf

INSIDE, OUTSIDE, PEER, PORT = "10.0.0.5", "10.0.0.200", "10.0.0.9", 7000
MANY = 10_000


@pytest.fixture
def host() -> Iterator[Host]:
    with shelf.lend(1) as (made,):
        yield made


@pytest.fixture
def mortal() -> Iterator[Host]:
    """A host of the test's own."""
    with hosts(1) as (made,):
        yield made


def records(*rules: dict[str, Any]) -> list[Record]:
    return RemapDocument.model_validate({"rules": rules}).records()


def many() -> list[Record]:
    """Addresses and ports of both families."""
    rules: list[dict[str, Any]] = []
    for number in range(MANY // 4):
        low = f"{number >> 8}.{number & 255}"
        rules += [
            {"outside": f"203.0.{low}", "inside": f"10.1.{low}"},
            {"outside": f"2001:db8::{number:x}", "inside": f"fd00::{number:x}"},
            {"outside": f"198.18.{low}", "inside": f"10.1.{low}", "protocol": "tcp", "outside_port": 443},
            {"outside": f"198.18.{low}", "inside": f"10.1.{low}", "protocol": "udp", "outside_port": 53},
        ]
    return records(*rules)


def load(host: Host, guest: Guest, rules: list[Record], op: Op = Op.LOAD) -> None:
    host.run(lambda: host.driver.load(guest.ref, Table("remap", op, records=rules)))


def dumped(host: Host, guest: Guest) -> list[Record]:
    tables = host.run(lambda: list(host.driver.dump(guest.ref, "remap")))
    return [record for table in tables for record in table.records or ()]


def talk(guest: Guest, peer: Guest) -> None:
    """A datagram to the outside address, and the answer from there."""
    with guest.socket(socket.SOCK_DGRAM) as server, peer.socket(socket.SOCK_DGRAM) as client:
        server.bind(("0.0.0.0", PORT))
        client.connect((OUTSIDE, PORT))
        client.send(b"who is there?")
        data, source = server.recvfrom(100)
        server.sendto(data, source)
        assert client.recv(100) == data


def test_ten_thousand_rules(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """What it takes to load them and to change one (CPU: the machine may be busy), and that they go."""
    guest, rules = host.guest(INSIDE), many()
    table = host.driver._parts().kernel.remaps
    took = {"10,000 rules through the driver": clocked(lambda: load(host, guest, rules))}
    keys, values = elements(1, rules)
    assert len(table.read()[0]) == len(keys) == MANY * 2 + MANY // 4
    there = dict(zip((key.tobytes() for key in table.read()[0]), table.read()[1], strict=True))
    assert all(
        there[key.tobytes()]["addr"].tolist() == value["addr"].tolist() for key, value in zip(keys, values, strict=True)
    )
    host.run(lambda: table.delete_many(keys))
    took["their elements into the kernel"] = clocked(lambda: host.run(lambda: table.load(keys, values)))
    took["one element"] = clocked(
        lambda: host.run(lambda: [table.set(k, v) for k, v in zip(keys, values, strict=True)])
    )
    took["one element"] /= len(keys)
    changed = [{**rule, "inside": f"10.1.200.{number}"} for number, rule in enumerate(rules[0:400:4], 1)]
    took["the first of them that changes"] = clocked(lambda: load(host, guest, changed[:1]))
    took["one more, through the driver"] = clocked(lambda: [load(host, guest, [rule]) for rule in changed[1:]])
    took["one more, through the driver"] /= len(changed) - 1
    wanted = {rule["outside"]: rule["inside"] for rule in (*rules, *changed)}
    assert {rule["outside"]: rule["inside"] for rule in dumped(host, guest)} == wanted
    assert elements_of(table.read()) == elements_of(elements(guest_slot(host, guest), dumped(host, guest)))
    load(host, guest, rules, Op.DELETE)
    assert len(table.read()[0]) == 0
    with capsys.disabled():
        print("".join(f"\n  {what}: {seconds * 1e3:.3f} ms" for what, seconds in took.items()))


def guest_slot(host: Host, guest: Guest) -> int:
    return host.driver._parts().instances.find(guest.ref).slot


def elements_of(some: Elements) -> dict[bytes, tuple[Any, ...]]:
    """Key -> where it leads."""
    leads = zip(*(some[1][name].tolist() for name in ("addr", "port", "flags")), strict=True)
    return {key.tobytes(): (tuple(lead[0]), *lead[1:]) for key, lead in zip(some[0], leads, strict=True)}


def clocked(call: Any) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def test_rules_change_under_traffic(host: Host) -> None:
    """What a change leaves keeps its counters; what it takes away remaps no more."""
    guest, peer = host.guest(INSIDE), host.guest(PEER)
    first = records({"outside": OUTSIDE, "inside": INSIDE})
    load(host, guest, first)
    talk(guest, peer)
    more = records({"outside": "10.0.0.201", "inside": INSIDE, "protocol": "tcp", "outside_port": 443})
    load(host, guest, more)
    talk(guest, peer)
    counted = {rule["outside"]: rule for rule in dumped(host, guest)}
    assert (counted[OUTSIDE]["packets_from"], counted[OUTSIDE]["packets_to"]) == (2, 2)
    load(host, guest, more, Op.DELETE)
    talk(guest, peer)
    load(host, guest, first, Op.DELETE)
    assert dumped(host, guest) == []
    assert host.run(lambda: host.driver.port(guest.ref)).drops.get("remap", 0) == 0


def test_large_transfers(host: Host) -> None:
    """Megabytes in each direction at once, in frames of many segments whose checksums the devices finish."""
    guest, peer = host.guest(INSIDE), host.guest(PEER)
    load(host, guest, records({"outside": OUTSIDE, "inside": INSIDE}))
    with guest.socket(socket.SOCK_STREAM) as listener, peer.socket(socket.SOCK_STREAM) as client:
        listener.bind(("0.0.0.0", PORT))
        listener.listen()
        client.connect((OUTSIDE, PORT))
        server, source = listener.accept()
        with server:
            assert source[0] == PEER
            ends = ((server, bytes(range(251)) * 16_000), (client, bytes(range(249)) * 16_000))
            senders = [threading.Thread(target=end.sendall, args=(data,)) for end, data in ends]
            for sender in senders:
                sender.start()
            assert [received(client, len(ends[0][1])), received(server, len(ends[1][1]))] == [data for _, data in ends]
            for sender in senders:
                sender.join(10)
    assert host.run(lambda: host.driver.port(guest.ref)).drops.get("remap", 0) == 0


def received(end: socket.socket, size: int) -> bytes:
    """What comes, read while the other end is written to as well."""
    parts, left = [], size
    while left:
        part = end.recv(left)
        assert part, f"{left} of {size} bytes are missing"
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def test_rules_outlive_the_agent_and_the_host(mortal: Host) -> None:
    host = mortal
    guest, peer = host.guest(INSIDE), host.guest(PEER)
    load(host, guest, records({"outside": OUTSIDE, "inside": INSIDE}))
    talk(guest, peer)
    host.restart()
    talk(guest, peer)
    assert dumped(host, guest)[0]["packets_to"] == 2

    pins = host.driver._parts().pins

    def reboot() -> None:
        host.driver.stop()
        pins.clear()
        pins.make()

    host.run(reboot)
    host.start()
    talk(guest, peer)
    assert dumped(host, guest)[0]["packets_to"] == 1, "what was counted went with the maps"


def test_what_a_host_cannot_hold_is_named(host: Host) -> None:
    guest = host.guest(INSIDE)
    short = records({"outside": OUTSIDE, "inside": INSIDE})
    need = Need({"remap": 1}, [], 0, 0, {"remap": short * 140_000})
    (obstacle,) = host.run(lambda: host.driver.probe(need))
    assert "remap: 280000 elements are needed, and there is room for 262144" in obstacle
    with pytest.raises(LoadRejected, match="is in two rules"):
        load(host, guest, [*short, {**short[0], "outside": "10.0.0.201"}])
    assert dumped(host, guest) == []
