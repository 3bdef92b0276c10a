# SPDX-License-Identifier: GPL-2.0-only
"""Real sockets of two network namespaces through a guarded port: the kernel's own stacks are the judges."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from datapath.drivers.ebpf.acl import compile_rules

from . import frames
from .frames import TCP, UDP, mac
from .lab import DEADLINE_S, Lab, inside, namespace, wait_for
from .model import MODEL
from .probe import TIMEOUTS_MS, load_policy, rule
from .sysbpf import TCX_EGRESS, TCX_INGRESS, Map

GUEST, PEER = 1, 2
LARGE = 200_000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Net:
    lab: Lab
    names: dict[int, str]
    table: Map

    def address(self, side: int, v6: bool) -> str:
        return f"2001:db8::{side}" if v6 else f"10.0.0.{side}"

    def socket(self, side: int, kind: int, v6: bool, port: int = 0) -> socket.socket:
        with inside(self.names[side]):
            made = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, kind)
        made.settimeout(DEADLINE_S)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.address(side, v6), port))
        return made

    def entry(self, proto: int, lport: int, rport: int, v6: bool) -> Any:
        addresses = [frames.address(self.address(side, v6)) for side in (GUEST, PEER)]
        value = self.table.lookup(b"".join(addresses) + struct.pack("!HHBBBB", lport, rport, proto, 0, 0, 0))
        return None if value is None else MODEL.ct_entry.from_buffer_copy(value)

    def state(self, proto: int, lport: int, rport: int, v6: bool) -> int | None:
        entry = self.entry(proto, lport, rport, v6)
        return None if entry is None else int(entry.word & 0xFF)


@pytest.fixture
def net(lab: Lab) -> Iterator[Net]:
    """A guest behind port 1, whose policy lets it out and nothing in, and a peer behind port 2, which has none."""
    with contextlib.ExitStack() as stack:
        names = {}
        lab.network(1, [(MODEL.L2_PORT, slot, 0) for slot in (GUEST, PEER)])
        table = lab.switch.inner("conntracks", GUEST, "ct_table", 1024)
        for side in (GUEST, PEER):
            names[side] = stack.enter_context(namespace())
            stack.enter_context(inside(lab.namespace))
            plug(lab, side, names[side])
        rules = [rule(1, "from", "reject", protocol="tcp", ports=[[81, 81]], priority=0)]
        rules += [rule(2, "from", "reject", protocol="udp", ports=[[81, 81]], priority=0), rule(3, "from")]
        compiled = compile_rules(rules)
        load_policy(lab.switch, 1, compiled)
        lab.switch.put("policies", 1, compiled.digest << 32 | 1)
        port = lab.switch.get("ports", "port", GUEST)
        for name, value in TIMEOUTS_MS.items():
            port.timeouts[getattr(MODEL, name)] = value
        lab.switch.put("ports", GUEST, port)
        yield Net(lab, names, table)


def plug(lab: Lab, side: int, name: str) -> None:
    near = f"tap{side}"
    ip("link", "add", near, "type", "veth", "peer", "name", "eth0", "address", mac(side), "netns", name)
    ip("link", "set", near, "up")
    ifindex = socket.if_nametoindex(near)
    lab.attach("from_port", ifindex, TCX_INGRESS)
    lab.attach("to_port", ifindex, TCX_EGRESS)
    lab.switch.put("devices", ifindex, MODEL.device(slot=side, role=MODEL.DEVICE_PORT))
    flags = 0 if side == GUEST else MODEL.PORT_F_STATELESS
    lab.set_port(side, mac(side), ifindex=ifindex, flags=flags, policy=1)
    with inside(name):
        Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("0")
        Path("/proc/sys/net/ipv6/conf/eth0/accept_dad").write_text("0")
        ip("addr", "add", f"10.0.0.{side}/24", "dev", "eth0")
        ip("addr", "add", f"2001:db8::{side}/64", "dev", "eth0", "nodad")
        ip("link", "set", "eth0", "up")


@pytest.mark.parametrize("v6", [False, True])
def test_a_stream(net: Net, v6: bool) -> None:
    with net.socket(PEER, socket.SOCK_STREAM, v6, 80) as server, net.socket(GUEST, socket.SOCK_STREAM, v6) as client:
        server.listen()
        client.connect(server.getsockname())
        lport = client.getsockname()[1]
        accepted, _ = server.accept()
        wait_for(lambda: net.state(TCP, lport, 80, v6) == MODEL.CT_ESTABLISHED, "established")
        with accepted:
            received = exchange(client, accepted)
        assert received == LARGE
        header = 72 if v6 else 52
        entry = net.entry(TCP, lport, 80, v6)
        assert not entry.word >> 8 & MODEL.CT_F_INBOUND
        assert entry.packets[0] >= LARGE // (1500 - header)  # segments, however large the frames were
        assert entry.bytes[0] >= LARGE + entry.packets[0] * (header - 12)
        assert client.recv(1) == b""  # the peer has closed
        wait_for(lambda: net.state(TCP, lport, 80, v6) == MODEL.CT_CLOSE_WAIT, "half closed")
    wait_for(lambda: net.state(TCP, lport, 80, v6) == MODEL.CT_TIME_WAIT, "closed")
    assert net.lab.drops(GUEST) == {}


def exchange(sender: socket.socket, receiver: socket.socket) -> int:
    """Sends LARGE bytes while they are read. Returns how many came."""
    left, received = LARGE, 0
    sender.setblocking(False)
    end = time.monotonic() + DEADLINE_S
    while received < LARGE and time.monotonic() < end:
        readable, writable, _ = select.select([receiver], [sender] if left else [], [], 0.1)
        if writable:
            left -= sender.send(bytes(left))
        if readable:
            received += len(receiver.recv(65536))
    sender.settimeout(DEADLINE_S)
    return received


@pytest.mark.parametrize("v6", [False, True])
def test_nothing_comes_in(net: Net, v6: bool) -> None:
    with net.socket(GUEST, socket.SOCK_STREAM, v6, 80) as server, net.socket(PEER, socket.SOCK_STREAM, v6) as client:
        server.listen()
        client.setblocking(False)
        assert client.connect_ex(server.getsockname()) == errno.EINPROGRESS
        wait_for(lambda: net.lab.drops(GUEST).get(MODEL.DROP_POLICY), "dropped")
        assert net.table.keys() == []


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("size", [10, 6000])
def test_datagrams_whole_and_in_pieces(net: Net, v6: bool, size: int) -> None:
    with net.socket(GUEST, socket.SOCK_DGRAM, v6) as guest, net.socket(PEER, socket.SOCK_DGRAM, v6, 53) as peer:
        sent = bytes(range(250)) * (size // 250) or b"x" * size
        guest.sendto(sent, peer.getsockname())
        data, origin = peer.recvfrom(65536)
        assert data == sent
        peer.sendto(data[::-1], origin)
        assert guest.recv(65536) == sent[::-1]
        entry = net.entry(UDP, guest.getsockname()[1], 53, v6)
        pieces = 1 if size < 1500 else 5
        assert list(entry.packets) == [pieces, pieces]
    assert net.lab.drops(GUEST) == {}


@pytest.mark.parametrize("v6", [False, True])
def test_an_error_reaches_its_socket(net: Net, v6: bool) -> None:
    with net.socket(GUEST, socket.SOCK_DGRAM, v6) as guest:
        guest.connect((net.address(PEER, v6), 9))
        guest.send(b"nobody listens")
        with pytest.raises(ConnectionRefusedError):
            guest.recv(100)
    assert net.lab.drops(GUEST) == {}


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_rejected_socket_knows_at_once(net: Net, kind: int, v6: bool) -> None:
    with net.socket(GUEST, kind, v6) as guest:
        with pytest.raises(ConnectionRefusedError):
            guest.connect((net.address(PEER, v6), 81))
            guest.send(b"data")
            guest.recv(100)
    assert net.lab.drops(GUEST)[MODEL.DROP_REJECT] == 1
