# SPDX-License-Identifier: GPL-2.0-only
"""A connection's label is given on one host and decides on the next: what it lets live, what it lets begin."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from datapath.provider import PortRef
from datapath.state.kind import Op, Table
from migrator._pb import migrator_pb2 as pb
from migrator.agent.relabelling import Relabelling

from .driver_lab import Guest, Host, rules, shelf, wait_until
from .test_driver_move import CHANNEL, carry, copy, settle, twin

TRUSTED, OTHER, FRESH = 7001, 7002, 7003
GIVES = rules(
    {"direction": "to", "protocol": "udp", "ports": [[TRUSTED, TRUSTED]], "set_label": "0x1", "set_mark": "0x70/0xf0"},
    {"direction": "to", "protocol": "udp", "priority": 20},
)
ASKS = rules(
    {"direction": "to", "protocol": "any", "action": "reject", "mark": "0xbad/0xfff", "priority": 1},
    {"direction": "to", "protocol": "udp", "label": "0x1/0x1"},
)


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    with shelf.lend(2) as made:
        yield made


class Talk:
    """Datagrams of a peer to one port of the VM, wherever it runs."""

    def __init__(self, vm: Guest, peer: Guest, port: int) -> None:
        self.address = (vm.address, port)
        self.client = peer.socket(socket.SOCK_DGRAM)
        self.client.connect(self.address)
        self.servers: list[socket.socket] = []
        self.listen(vm)

    def listen(self, vm: Guest) -> None:
        self.servers.append(vm.socket(socket.SOCK_DGRAM))
        self.servers[-1].settimeout(20)
        self.servers[-1].bind(self.address)

    def arrives(self) -> None:
        self.client.send(b"are you there?")
        assert self.servers[-1].recv(100) == b"are you there?"

    def is_dropped(self, host: Host, ref: PortRef, reason: str) -> None:
        def dropped() -> int:
            return int(host.run(lambda: host.driver.port(ref)).drops.get(reason, 0))

        before = dropped()
        self.client.send(b"are you there?")
        wait_until(lambda: dropped() > before, f"the datagram is dropped by {reason}")

    def close(self) -> None:
        for one in (self.client, *self.servers):
            one.close()


def load_rules(host: Host, ref: PortRef, before: list[dict[str, object]], after: list[dict[str, object]]) -> None:
    def change() -> None:
        host.driver.load(ref, Table("acl", Op.DELETE, records=[{"id": one["id"]} for one in before]))
        host.driver.load(ref, Table("acl", records=after))

    host.run(change)


def labels(host: Host, ref: PortRef) -> dict[int, tuple[int, int]]:
    """Mark and label by the guest's port."""
    tables = host.run(lambda: list(host.driver.dump(ref, "conntrack")))
    found: dict[int, tuple[int, int]] = {}
    for table in tables:
        columns = table.columns or {}
        for port, mark, label in zip(columns["lport"], columns["mark"], columns["label"].tolist(), strict=True):
            found[int(port)] = int(mark), int.from_bytes(label, "big")
    return found


def test_a_label_decides_after_a_move(pair: list[Host]) -> None:
    source, target = pair
    vm, peer = source.guest("10.0.0.1", GIVES, network="over"), source.guest("10.0.0.2", network="over")
    talks = [Talk(vm, peer, TRUSTED), Talk(vm, peer, OTHER)]
    trusted, other = talks
    try:
        trusted.arrives()
        other.arrives()
        assert labels(source, vm.ref) == {TRUSTED: (0x70, 1), OTHER: (0, 0)}
        assert source.run(lambda: source.driver.describe([vm.ref])).kinds["acl"] == 2
        moved = _move(source, target, vm)
        for talk in talks:
            talk.listen(moved)
            talk.arrives()
        assert labels(target, moved.ref) == {TRUSTED: (0x70, 1), OTHER: (0, 0)}
        load_rules(target, moved.ref, GIVES, ASKS)
        trusted.arrives()  # the label lets it live
        other.is_dropped(target, moved.ref, "policy")  # and only it
        assert labels(target, moved.ref) == {TRUSTED: (0x70, 1)}
        fresh = Talk(moved, peer, FRESH)
        talks.append(fresh)
        fresh.is_dropped(target, moved.ref, "policy")  # nothing new begins with a label
        change = Relabelling(
            pb.RelabelRequest(mark="0xbad", matches=[pb.FieldMatch(field="label", values=["0x1/0x1"])])
        )
        target.run(
            lambda: [change.change(target.driver, moved.ref, one) for one in change.pieces(target.driver, moved.ref)]
        )
        assert (change.matched, change.changed) == (1, 1)
        assert labels(target, moved.ref) == {TRUSTED: (0xBAD, 1)}
        trusted.is_dropped(target, moved.ref, "reject")  # the operator's word ends it
        assert labels(target, moved.ref) == {}
    finally:
        for talk in talks:
            talk.close()


def _move(source: Host, target: Host, vm: Guest) -> Guest:
    moved = twin(target, vm)
    target.run(lambda: target.driver.accept_redirect(moved.ref, CHANNEL, "h1"))
    copy(source, target, vm, moved)
    source.run(lambda: source.driver.hold(vm.ref))
    source.run(lambda: source.driver.quiesce(vm.ref))
    carry(source, target, vm, moved)
    target.run(lambda: target.driver.commit(moved.ref))
    target.run(lambda: target.driver.open(moved.ref))
    source.run(lambda: source.driver.redirect(vm.ref, CHANNEL, "h2"))
    settle(source, target, vm, moved)
    return moved
