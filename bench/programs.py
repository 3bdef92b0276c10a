"""What a packet costs in the programs: ns by BPF_PROG_RUN, by what the port has beside the plain path.

Ports of one host with anti-spoofing, connection tracking and a policy. Each figure is raw, with what the kernel needs
to run a program at all: "nothing" says how much that is, and "net" takes it off. New connections, and frames that the
programs change, come through a program that makes each run's frame (programs.bpf.c), whose own cost is taken off.
Each series is the least of several short runs in each round, which a busy machine does not disturb.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Figures, Unverified, verify
from datapath.drivers.ebpf import syscall
from datapath.provider import Network, NetworkKind, Place, PortRef
from datapath.registry import KINDS
from datapath.state.kind import Op, Record, Table
from tests.bpf import frames
from tests.bpf.harness import Switch, sk_buff
from tests.bpf.model import CLANG
from tests.contract.hosts import Host, ebpf_host
from tests.contract.samples import sample

GUEST, PEER, OUTSIDE = "10.0.0.5", "10.0.0.6", "203.0.113.5"
GUEST6, PEER6 = "2001:db8::5", "2001:db8::6"
ADDRESSES = ((GUEST, GUEST6), (PEER, PEER6))
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
FAR = "02:00:00:00:00:09"
SOURCE = Path(__file__).parent / "programs.bpf.c"
THERE = ((GUEST, PEER), (PEER, GUEST))
TC_ACT_OK, TC_ACT_REDIRECT = 0, 7
SYN, ACK = 2, 16
HEAD, SOURCE_PORT = 64, 34
RUNS = 8
"""Runs of which the least is a round's value."""


@dataclass(frozen=True)
class Case:
    """One program under one workload. `port` counts what passes it; `before`: the program that makes its frame."""

    name: str
    program: str
    port: PortRef
    frame: bytes
    before: str = ""
    budget: str = ""

    @property
    def direction(self) -> str:
        return "from" if self.program == "from_port" else "to"


class Bench:
    def __init__(self, host: Host, steer: Switch, *, quick: bool) -> None:
        self.host, self.steer = host, steer
        self.rounds, self.repeat = (3, 100) if quick else (15, 400)
        self.programs = {name: _program(host, name) for name in ("from_port", "to_port")}
        self.figures = Figures()
        self.begun = 1024
        nothing = self.steer.programs["nothing"]
        self.nothing = [self._least(nothing, [datagram(53)] * RUNS, 0, TC_ACT_OK) for _ in range(self.rounds)]
        self.figures.add("nothing: what BPF_PROG_RUN itself takes", "ns", self.nothing)

    def port(self, number: int) -> PortRef:
        ref = self.host.stage(1, mac=MACS[number], addresses=list(ADDRESSES[number]), connections_max=262_144)
        rules = [*policy(10), {**policy(1)[0], "id": 65_000, "direction": "to"}]
        self.host.driver.load(ref, Table("acl", records=rules))
        self.host.driver.commit(ref)
        self.host.driver.open(ref)
        return ref

    def configure(self, number: int, ref: PortRef, **changes: object) -> None:
        """The port's record again, changed."""
        record = {"mac": MACS[number], "addresses": list(ADDRESSES[number]), "connections_max": 262_144, **changes}
        self.host.driver.load(ref, Table("port", records=[self.host.record(**record)]))

    def send(self, program: int, frame: bytes, ifindex: int, verdict: int) -> None:
        """One frame, once."""
        context = ctypes.create_string_buffer(sk_buff(ifindex))
        run = syscall.prog_run(program, frame, ctx=ctypes.addressof(context), ctx_size=192, repeat=1)
        verify("verdict", run.retval, verdict)

    def run(self, *cases: Case, both: str = "", budget: str = "") -> None:
        """Measure the cases in turns; `both`: the name of their sum."""
        raw: dict[str, list[float]] = {case.name: [] for case in cases}
        for _ in range(self.rounds):
            for case in cases:
                raw[case.name].append(self._round(case))
        for case in cases:
            self._add(case.name, raw[case.name], case.budget, 1)
        if both:
            self._add(both, [sum(values) for values in zip(*raw.values(), strict=True)], budget, len(cases))

    def _add(self, name: str, values: list[float], budget: str, programs: int) -> None:
        self.figures.add(name, "ns", values, budget)
        net = [value - programs * least for value, least in zip(values, self.nothing, strict=True)]
        self.figures.add(f"{name}, net", "ns", net)

    def _round(self, case: Case) -> float:
        """The least of RUNS, after it was verified that every frame of them passed the port."""
        counter, status = f"packets_{case.direction}", self.host.driver.port(case.port)
        verdict = TC_ACT_REDIRECT if case.direction == "from" else TC_ACT_OK
        sent, own, program = [case.frame] * RUNS, 0.0, self.programs[case.program]
        if case.before == "next":
            sent = [self._next(case.frame) for _ in range(RUNS)]
        if case.before:
            own = self._least(self.steer.programs[case.before], sent, 0, TC_ACT_OK) - min(self.nothing)
            self.steer.maps["heads"].update(bytes(4), case.frame[:HEAD].ljust(HEAD, b"\0"))
            self.steer.maps["tested"].update(bytes(4), struct.pack("=I", program))
            program = self.steer.programs[case.before]
        try:
            least = self._least(program, sent, status.ifindex, verdict)
        except Unverified as error:
            drops = self.host.driver.port(case.port).drops
            raise Unverified(f"{case.name}: {error}, drops {drops}") from None
        if case.before:
            self.steer.maps["tested"].delete(bytes(4))
        passed = self.host.driver.port(case.port).counters[counter] - status.counters[counter]
        verify(f"{case.name}: frames that passed", passed, RUNS * self.repeat)
        return least - own

    def _next(self, frame: bytes) -> bytes:
        """The frame with a source port behind which no connection was begun yet."""
        self.begun = self.begun + self.repeat if self.begun + self.repeat < 65_000 else 1024
        return frame[:SOURCE_PORT] + struct.pack("!H", self.begun) + frame[SOURCE_PORT + 2 :]

    def _least(self, program: int, sent: list[bytes], ifindex: int, verdict: int) -> float:
        found = []
        for frame in sent:
            context = ctypes.create_string_buffer(sk_buff(ifindex))
            address = ctypes.addressof(context)
            run = syscall.prog_run(program, frame, ctx=address, ctx_size=192, repeat=self.repeat)
            verify("verdict", run.retval, verdict)
            found.append(float(run.duration_ns))
        return min(found)


def measure(*, quick: bool) -> Figures:
    with ebpf_host() as host, _steer() as steer:
        bench = Bench(host, steer, quick=quick)
        guest, peer = bench.port(0), bench.port(1)
        _established(bench, guest, peer)
        for number, rules in enumerate((10, 100, 1_000) if quick else (10, 100, 1_000, 10_000)):
            host.driver.load(guest, Table("acl", records=policy(rules)))
            before, frame = _connections(host, guest), datagram(1000 + number)
            name = f"new connection, {rules:,} rules, from_port"
            bench.run(Case(name, "from_port", guest, frame, "next", "<1000" if rules == 10_000 else ""))
            begun = _connections(host, guest) - before
            verify(f"{name}: connections", begun, bench.rounds * RUNS * bench.repeat)
        host.driver.load(guest, Table("acl", records=policy(10)))
        _kinds(bench, guest, peer)
        _windows(bench, peer)
        _remapped(bench, guest)
        _trunks(bench, guest, peer)
        _migrated(bench, guest, peer)
        _elsewhere(bench, guest)
    return bench.figures


def _established(bench: Bench, guest: PortRef, peer: PortRef) -> None:
    for family, frame in (("", datagram(53)), (", IPv6", datagram6(53))):
        bench.run(
            Case(f"established{family}, from_port", "from_port", guest, frame),
            Case(f"established{family}, to_port", "to_port", peer, frame),
            both=f"established{family}, from_port + to_port",
            budget="" if family else "<300",
        )


def _kinds(bench: Bench, guest: PortRef, peer: PortRef) -> None:
    """An established connection of ports that have one more kind, or are tracked by a migration."""
    frame, driver = datagram(53), bench.host.driver
    for name, table in BESIDE.items():
        for number, ref in enumerate((guest, peer)):
            driver.load(ref, _own(table, number))
        bench.run(
            Case(f"{name}, from_port", "from_port", guest, frame),
            Case(f"{name}, to_port", "to_port", peer, frame),
            both=f"{name}, from_port + to_port",
        )
        for number, ref in enumerate((guest, peer)):
            driver.load(ref, _gone(_own(table, number)))


def _windows(bench: Bench, peer: PortRef) -> None:
    """A TCP segment, without and with kind `window`, each of a connection that was followed from its beginning."""
    driver, out = bench.host.driver, bench.programs["from_port"]
    ifindex = driver.port(peer).ifindex
    checked = Table("window", records=[{"protocol": "tcp", "check": "strict"}])
    for number, name in enumerate(("established TCP, to_port", "the same, its window checked, to_port")):
        if number:
            driver.load(peer, checked)
        ports = (50_000 + number, 443)
        bench.send(bench.programs["to_port"], _segment(0, ports, SYN, 1, 0), ifindex, TC_ACT_OK)
        bench.send(out, _segment(1, ports[::-1], SYN | ACK, 1, 2), ifindex, TC_ACT_REDIRECT)
        bench.run(Case(name, "to_port", peer, _segment(0, ports, ACK, 2, 2)))
    driver.load(peer, _gone(checked))


def _remapped(bench: Bench, guest: PortRef) -> None:
    rule = {"outside": OUTSIDE, "inside": GUEST, "protocol": "", "outside_port": 0, "inside_port": 0}
    counts = {f"{unit}_{way}": 0 for unit in ("packets", "bytes") for way in ("from", "to")}
    table = Table("remap", records=[{**rule, **counts}])
    bench.host.driver.load(guest, table)
    bench.run(Case("remapped, from_port", "from_port", guest, datagram(53), "again"))
    bench.host.driver.load(guest, _gone(table))


def _trunks(bench: Bench, guest: PortRef, peer: PortRef) -> None:
    """From a trunk to a trunk: a tag is taken off and put on, so that the frame is as before."""
    bench.host.driver.set_network(Network("tags", NetworkKind.LOCAL))
    for number, ref in enumerate((guest, peer)):
        bench.configure(number, ref, trunk={"7": "tags"})
    frame = datagram(53)
    tagged = frame[:12] + struct.pack("!HH", 0x8100, 7) + frame[12:]
    bench.run(Case("established, VLAN, trunk to trunk, from_port", "from_port", guest, tagged))
    for number, ref in enumerate((guest, peer)):
        bench.configure(number, ref)


def _migrated(bench: Bench, guest: PortRef, peer: PortRef) -> None:
    bench.host.driver.track(guest)
    bench.host.driver.track(peer)
    bench.run(
        Case("being migrated, from_port", "from_port", guest, datagram(53)),
        Case("being migrated, to_port", "to_port", peer, datagram(53)),
        Case("being migrated, new connection, 10 rules, from_port", "from_port", guest, datagram(2000), "next"),
    )


def _elsewhere(bench: Bench, guest: PortRef) -> None:
    """A frame for another host, through the overlay."""
    driver = bench.host.driver
    driver.set_network(Network("over", NetworkKind.OVERLAY, vni=77, mtu=1450))
    bench.configure(0, guest, network="over")
    driver.set_place(Place("over", FAR, "there"))
    bench.run(Case("established, overlay, from_port", "from_port", guest, datagram(53, FAR)))


# ---- workloads ----


def policy(count: int) -> list[Record]:
    """Rules that do not match, and at last one that does."""
    plain: Record = {"direction": "from", "icmp": [], "action": "allow", "log": False, "hits": 0, "hit_bytes": 0}
    others: list[Record] = [
        {"remote": [f"172.{16 + n // 65_536}.{n // 256 % 256}.{n % 256}/32"], "protocol": "udp", "ports": [[n, n]]}
        for n in range(1, count)
    ]
    rules: list[Record] = [*others, {"remote": [], "protocol": "any", "ports": []}]
    return [{"id": n + 1, "priority": n % 65_536, **plain, **rule} for n, rule in enumerate(rules)]


BESIDE = {
    "sampled one in 1,000": sample("sampling", 1),
    "policed": Table(
        "qos",
        records=[
            {
                "direction": way,
                "mode": "police",
                "rate_bps": 32_000_000_000,
                "burst_bytes": 1 << 30,
                "dscp": -1,
                "priority": 0,
                "dropped_packets": 0,
                "dropped_bytes": 0,
                "debt_ns": 0,
            }
            for way in ("from", "to")
        ],
    ),
    "mirrored": sample("mirror", 1),
}


def _segment(sender: int, ports: tuple[int, ...], flags: int, seq: int, ack: int) -> bytes:
    body = struct.pack("!HHIIBBHHH", *ports, seq, ack, 5 << 4, flags, 65_535, 0, 0) + bytes(22)
    return frames.ethernet(
        MACS[1 - sender], MACS[sender], 0x0800, frames.ipv4(THERE[sender][0], THERE[sender][1], frames.TCP, body)
    )


def _own(table: Table, number: int) -> Table:
    """Two ports have not the same number."""
    if table.kind != "sampling":
        return table
    return Table("sampling", records=[{**record, "sub_agent": 17 + number} for record in table.records or []])


def _gone(table: Table) -> Table:
    """What takes the table's records away."""
    keys = KINDS[table.kind].key
    return Table(table.kind, Op.DELETE, records=[{key: record[key] for key in keys} for record in table.records or []])


def datagram(port: int, target: str = MACS[1]) -> bytes:
    body = frames.ipv4(GUEST, PEER, frames.UDP, frames.udp(40_000, port, bytes(22)))
    return frames.ethernet(target, MACS[0], 0x0800, body)


def datagram6(port: int) -> bytes:
    body = frames.ipv6(GUEST6, PEER6, frames.UDP, frames.udp(40_000, port, bytes(22)))
    return frames.ethernet(MACS[1], MACS[0], 0x86DD, body)


def _connections(host: Host, ref: PortRef) -> int:
    return sum(len(table) for table in host.driver.dump(ref, "conntrack"))


@contextlib.contextmanager
def _steer() -> Iterator[Switch]:
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "programs.bpf.o"
        subprocess.run([*CLANG, "-c", SOURCE, "-o", made], check=True)
        with Switch(made) as steer:
            yield steer


def _program(host: Host, name: str) -> int:
    (pin,) = Path(host.options["bpffs"]).rglob(name)
    return syscall.obj_get(pin)
