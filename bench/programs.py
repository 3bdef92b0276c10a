"""What a packet costs in the programs: ns by BPF_PROG_RUN, of an established connection and of a new one.

Two ports of one host with anti-spoofing, connection tracking and a policy; the frame of the first is for the second.
Every figure has the kernel's own share in it: what a program that does nothing takes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

from bench.figures import Figures
from datapath.drivers.ebpf import syscall
from datapath.provider import PortRef
from datapath.registry import KINDS
from datapath.state.kind import Op, Record, Table
from tests.bpf import frames
from tests.bpf.harness import sk_buff
from tests.contract.hosts import Host, ebpf_host

GUEST, PEER = "10.0.0.5", "10.0.0.6"
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
TC_ACT_OK, TC_ACT_REDIRECT = 0, 7
_SYN, _ACK = 2, 16
_WINDOW: Record = {"protocol": "tcp", "check": "strict"}


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    rounds, repeat = (5, 20_000) if quick else (15, 500_000)
    with ebpf_host() as host:
        ports = [_port(host, mac, address, 10) for mac, address in zip(MACS, (GUEST, PEER), strict=True)]
        out, into = (_program(host, name) for name in ("from_port", "to_port"))
        frame = _datagram(53)
        first, second = (host.driver.port(ref).ifindex for ref in ports)
        sent = [_run(out, frame, first, TC_ACT_REDIRECT, repeat) for _ in range(rounds)]
        received = [_run(into, frame, second, TC_ACT_OK, repeat) for _ in range(rounds)]
        assert host.driver.port(ports[0]).counters["packets_from"] >= rounds * repeat
        figures.add("established, from_port", "ns", sent)
        figures.add("established, to_port", "ns", received)
        both = [one + other for one, other in zip(sent, received, strict=True)]
        figures.add("established, from_port + to_port", "ns", both, "<300")
        _windows(figures, host, ports[1], (out, into), rounds, repeat)
        for rules in (10, 1_000) if quick else (10, 1_000, 10_000):
            _new_connections(figures, host, ports[0], out, rules, 2_000 if quick else 20_000)
    return figures


def _windows(figures: Figures, host: Host, ref: PortRef, programs: tuple[int, int], rounds: int, repeat: int) -> None:
    """A segment to the second port in turn without and with kind `window`."""
    out, into = programs
    ifindex = host.driver.port(ref).ifindex
    costs: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for checked in costs:
            host.driver.load(ref, Table("window", Op.LOAD if checked else Op.DELETE, records=[_WINDOW]))
            ports = (50_000 + 2 * number + checked, 443)
            _run(into, _segment(MACS, (GUEST, PEER), ports, _SYN, 1, 0), ifindex, TC_ACT_OK, 1)
            answer = _segment(MACS[::-1], (PEER, GUEST), ports[::-1], _SYN | _ACK, 1, 2)
            _run(out, answer, ifindex, TC_ACT_REDIRECT, 1)
            costs[checked].append(
                _run(into, _segment(MACS, (GUEST, PEER), ports, _ACK, 2, 2), ifindex, TC_ACT_OK, repeat)
            )
    figures.add("established TCP, to_port", "ns", costs[False])
    figures.add("the same, its window checked", "ns", costs[True])


def _segment(
    macs: Sequence[str], addresses: tuple[str, str], ports: Sequence[int], flags: int, seq: int, ack: int
) -> bytes:
    body = struct.pack("!HHIIBBHHH", *ports, seq, ack, 5 << 4, flags, 65_535, 0, 0) + bytes(22)
    return frames.ethernet(macs[1], macs[0], 0x0800, frames.ipv4(*addresses, frames.TCP, body))


def _new_connections(figures: Figures, host: Host, ref: PortRef, program: int, rules: int, count: int) -> None:
    """Each frame begins a connection, whose rule is the last; then it is repeated: what an established one costs."""
    host.driver.load(ref, Table("acl", records=_rules(rules)))
    ifindex = host.driver.port(ref).ifindex
    begun, repeated = [], []
    for number in range(count):
        frame = _datagram(1024 + number % 60_000)
        begun.append(_run(program, frame, ifindex, TC_ACT_REDIRECT, 1))
        repeated.append(_run(program, frame, ifindex, TC_ACT_REDIRECT, 1))
    (table,) = host.driver.dump(ref, "conntrack")
    assert len(table) >= count, f"{len(table)} connections of {count}"
    figures.add(f"new connection, {rules:,} rules, once and cold", "ns", begun, "<1000" if rules == 10_000 else "")
    figures.add(f"the same again, {rules:,} rules, once and cold", "ns", repeated)
    for deleted in list(host.driver.dump(ref, "conntrack")):
        host.driver.load(ref, _keys(deleted))


def _keys(table: Table) -> Table:
    assert table.columns is not None
    return Table(table.kind, Op.DELETE, {name: table.columns[name] for name in KINDS[table.kind].key})


def _rules(count: int) -> list[Record]:
    """Rules that do not match, and one that does."""
    last = {"remote": [], "protocol": "any", "ports": []}
    others = [
        {"remote": [f"172.{16 + n // 65_536}.{n // 256 % 256}.{n % 256}/32"], "protocol": "udp", "ports": [[n, n]]}
        for n in range(1, count)
    ]
    return [
        {
            "id": number + 1,
            "direction": "from",
            "priority": number % 65_536,
            "icmp": [],
            "action": "allow",
            "log": False,
            "hits": 0,
            "hit_bytes": 0,
            **match,
        }
        for number, match in enumerate([*others, last])
    ]


def _port(host: Host, mac: str, address: str, rules: int) -> PortRef:
    ref = host.stage(1, mac=mac, addresses=[address], connections_max=262_144)
    host.driver.load(ref, Table("acl", records=[*_rules(rules), {**_rules(1)[0], "id": rules + 1, "direction": "to"}]))
    host.driver.commit(ref)
    host.driver.open(ref)
    return ref


def _datagram(port: int) -> bytes:
    body = frames.ipv4(GUEST, PEER, frames.UDP, frames.udp(40_000, port, bytes(22)))
    return frames.ethernet(MACS[1], MACS[0], 0x0800, body)


def _program(host: Host, name: str) -> int:
    (pin,) = Path(host.options["bpffs"]).rglob(name)
    return syscall.obj_get(pin)


def _run(program: int, frame: bytes, ifindex: int, verdict: int, repeat: int) -> float:
    context = ctypes.create_string_buffer(sk_buff(ifindex))
    run = syscall.prog_run(program, frame, ctx=ctypes.addressof(context), ctx_size=192, repeat=repeat)
    assert run.retval == verdict, f"verdict {run.retval}, expected {verdict}"
    return float(run.duration_ns)
