# SPDX-License-Identifier: GPL-2.0-only
"""The ebpf driver on real frames: forwarding, policies, learning."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from datapath.provider import Network, NetworkKind
from datapath.state.kind import Op, Table

from .driver_lab import Guest, Host, hosts, rules, wait_until


@pytest.fixture
def host() -> Iterator[Host]:
    with hosts(1) as made:
        yield made[0]


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    """Parametrised by the underlay's version of IP, 4 unless a test says so."""
    with hosts(2, getattr(request, "param", 4)) as made:
        yield made


either_underlay = pytest.mark.parametrize("pair", [4, 6], indirect=True, ids=["ipv4", "ipv6"])


def listen(guest: Guest, port: int = 7000) -> socket.socket:
    server = guest.socket(socket.SOCK_STREAM)
    server.bind((guest.address, port))
    server.listen()
    return server


def talk(server: Guest, client: Guest, port: int = 7000) -> None:
    """A TCP connection with data both ways."""
    with listen(server, port) as listener, client.socket(socket.SOCK_STREAM) as one:
        one.connect((server.address, port))
        other, _ = listener.accept()
        with other:
            for sender, receiver in ((one, other), (other, one)):
                sender.sendall(b"x" * 100_000)
                got = 0
                receiver.settimeout(10)
                while got < 100_000:
                    part = receiver.recv(65536)
                    assert part
                    got += len(part)


def test_tcp_under_default_drop(host: Host) -> None:
    server = host.guest("10.0.0.1", [{"direction": "to", "protocol": "tcp", "ports": [[7000, 7000]]}])
    client = host.guest("10.0.0.2", [{"direction": "from", "protocol": "tcp", "ports": [[7000, 7001]]}])
    talk(server, client)
    with listen(server, 7001), client.socket(socket.SOCK_STREAM) as refused:
        refused.settimeout(1)
        with pytest.raises(TimeoutError):
            refused.connect((server.address, 7001))
    dropped = host.run(lambda: host.driver.port(server.ref)).drops
    assert dropped["policy"] >= 1
    (table,) = host.run(lambda: list(host.driver.dump(server.ref, "acl")))
    assert table.records is not None and table.records[0]["hits"] == 1


@either_underlay
@pytest.mark.parametrize("network", ["vlan", "over"])
def test_tcp_between_hosts(pair: list[Host], network: str) -> None:
    server = pair[0].guest("10.0.0.1", network=network)
    client = pair[1].guest("10.0.0.2", network=network)
    talk(server, client)


def test_new_policy_judges_connections_again(host: Host) -> None:
    allowed = {"direction": "to", "protocol": "udp", "ports": [[9000, 9000]]}
    server, client = host.guest("10.0.0.1", [allowed]), host.guest("10.0.0.2")
    with server.socket(socket.SOCK_DGRAM) as receiver, client.socket(socket.SOCK_DGRAM) as sender:
        receiver.bind((server.address, 9000))
        sender.sendto(b"1", (server.address, 9000))
        assert receiver.recv(10) == b"1"
        host.run(lambda: host.driver.load(server.ref, Table("acl", records=rules({**allowed, "action": "drop"}))))
        sender.sendto(b"2", (server.address, 9000))
        host.run(lambda: host.driver.load(server.ref, Table("acl", records=rules(allowed))))
        sender.sendto(b"3", (server.address, 9000))
        assert receiver.recv(10) == b"3"


def test_rules_go_by_id(host: Host) -> None:
    guest = host.guest("10.0.0.1", [{"direction": "to", "protocol": "tcp"}, {"direction": "from", "protocol": "udp"}])
    host.run(lambda: host.driver.load(guest.ref, Table("acl", Op.DELETE, records=[{"id": 1}])))
    (table,) = host.run(lambda: list(host.driver.dump(guest.ref, "acl")))
    assert [rule["id"] for rule in table.records or ()] == [2]


def test_hits_of_a_rule_go_with_it(host: Host) -> None:
    """Also those that it had on hosts before: else each change of a policy would leave some behind for ever."""
    server = host.guest("10.0.0.1", [{"direction": "to", "protocol": "tcp", "ports": [[7000, 7000]]}])
    client = host.guest("10.0.0.2", [{"direction": "from", "protocol": "tcp", "ports": [[7000, 7001]]}])
    talk(server, client)
    counted = Table("acl", Op.ACCOUNT, records=[{"id": 1, "hits": 10, "hit_bytes": 1000}])
    host.run(lambda: host.driver.load(server.ref, counted))
    before = host.run(lambda: host.driver.remains()["hits"])
    host.run(lambda: host.driver.load(server.ref, Table("acl", Op.DELETE, records=[{"id": 1}])))
    gone = set(before) - set(host.run(lambda: host.driver.remains().get("hits", ())))
    assert [name.rpartition(" ")[2] for name in gone] == ["1"]
    host.run(lambda: host.driver.quiesce(server.ref))
    accounts = [t for t in host.run(lambda: list(host.driver.settle(server.ref))) if t.kind == "acl"]
    assert 1 not in {record["id"] for table in accounts for record in table.records or ()}


def test_second_mac_behind_a_port_is_learned_and_dumped(host: Host) -> None:
    guest = host.guest("10.0.0.1", antispoof=False)
    frame = bytes.fromhex("ffffffffffff0200000000aa0806") + bytes(46)

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            raw.send(frame)

    guest.run(send)

    def macs() -> set[str]:
        (table,) = host.run(lambda: list(host.driver.dump(guest.ref, "fdb")))
        assert table.columns is not None
        return {bytes(mac).hex(":") for mac in table.columns["mac"]}

    wait_until(lambda: "02:00:00:00:00:aa" in macs(), "the MAC is learned")
    assert macs() == {guest.ref.mac, "02:00:00:00:00:aa"}
    host.run(lambda: host.driver.set_network(Network("blue", NetworkKind.LOCAL, ageing_s=1)))
    wait_until(lambda: macs() == {guest.ref.mac}, "what is silent is forgotten, the port's own MAC is not")
