# SPDX-License-Identifier: GPL-2.0-only
"""What forwarding costs, beside what a user would otherwise use (bench.switches), all in one run and in turns.

CPU time of a 64 byte frame from end to end, of the path's own: the least of many short bursts in a round, because
whoever else runs on the machine makes a burst dearer and none cheaper. TCP throughput in segments of several sizes.
New connections when the table is full. Each frame of a burst is counted at the other end, and before all of it each
filter is shown to let the same through and nothing else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.bursts import Burst, Messages, Received, Sender, datagrams
from bench.figures import Figure, Figures, Unverified, verify
from bench.plot import Bars
from bench.switches import LEFT, RIGHT, SERVICE, UDP_PORTS, Bridge, Filtered, Ours, Switch, run, switches
from migrator.lab.processes import wait_until

SOURCE = 40_000
BURST, BURSTS = 256, 40  # frames of a burst, bursts of a round: half a millisecond each
NEW = 65_536  # connections begun in one go beside a full table
SEGMENTS = {"segments of 1,448 bytes": (1448, True), "of 536": (536, True), "1,448, no offload": (1448, False)}
"""Size and whether the ends hand over up to 64 KiB at once, as guests with TSO do."""
TRIES = 5
PASSES_S, DROPPED_S = 10.0, 1.0
FULL = 0.79
"""Of its limit: from 80 percent on our sweep drops what has not been answered, as nf_conntrack does at 100."""


@dataclass
class Lane:
    """One switch with a sender each way and a connection that both ends have spoken on."""

    switch: Switch
    there: Sender
    back: Sender
    established: Messages

    def passes(self, source: int, target: int, *, back: bool = False, deadline_s: float = PASSES_S) -> bool:
        """A datagram between these ports, towards the right or back."""
        sender, macs, ips = self.there, self.switch.macs, (LEFT, RIGHT)
        if back:
            sender, macs, ips = self.back, macs[::-1], (RIGHT, LEFT)
        one = datagrams(macs, ips, np.full(1, source, np.uint16), np.full(1, target, np.uint16))
        try:
            sender.burst(one, deadline_s)
        except Unverified:
            return False
        return True


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    if not shutil.which("ovs-vswitchd"):
        figures.notes.append("Open vSwitch is not installed (Debian: openvswitch-switch): left out")
    with lanes() as made:
        for lane in made:
            _verify(lane)
        _frames(figures, made, 3 if quick else 15)
        _new_connections(figures, [lane for lane in made if _evicts(lane.switch)], 2 if quick else 7)
        _throughput(figures, made, 1 if quick else 5, 1.0)
    return figures


@contextmanager
def lanes() -> Iterator[list[Lane]]:
    directory = Path(tempfile.mkdtemp(prefix="bench-forwarding-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        made = stack.enter_context(switches(directory, open_vswitch=bool(shutil.which("ovs-vswitchd"))))
        yield [stack.enter_context(_lane(switch)) for switch in made]


@contextmanager
def _lane(switch: Switch) -> Iterator[Lane]:
    there, back = (Sender(switch, *ends) for ends in ((switch.left, switch.right), (switch.right, switch.left)))
    ports = np.full(BURST, SOURCE, np.uint16), np.full(BURST, UDP_PORTS[0], np.uint16)
    try:
        yield Lane(switch, there, back, datagrams(switch.macs, (LEFT, RIGHT), *ports))
    finally:
        there.close()
        back.close()


def _verify(lane: Lane) -> None:
    """What the filter lets begin passes, so does its answer, and nothing else: Unverified."""
    name, first, last = lane.switch.name, *UDP_PORTS
    for target in UDP_PORTS:
        verify(f"{name}: a datagram to port {target} passes", lane.passes(SOURCE, target), True)
        verify(f"{name}: its answer passes", lane.passes(target, SOURCE, back=True), True)
    passed = [target for target in (first - 1, last + 1) if lane.passes(SOURCE, target, deadline_s=DROPPED_S)]
    passed += [SOURCE + 1] if lane.passes(first, SOURCE + 1, back=True, deadline_s=DROPPED_S) else []
    wanted = [] if lane.switch.tracks else [first - 1, last + 1, SOURCE + 1]
    verify(f"{name}: what passes of ports that may not be begun to", passed, wanted)


# ---- frames ----


def _frames(figures: Figures, made: list[Lane], rounds: int) -> None:
    cost: dict[str, list[float]] = {lane.switch.name: [] for lane in made}
    rate: dict[str, list[float]] = {lane.switch.name: [] for lane in made}
    for _ in range(rounds):
        bursts: dict[str, list[Burst]] = {name: [] for name in cost}
        for _ in range(BURSTS):
            for lane in made:
                bursts[lane.switch.name].append(_again(lane.there, lane.established))
        for name, some in bursts.items():
            cost[name].append(min(burst.cpu_ns_a_frame for burst in some))
            rate[name].append(max(burst.frames_a_s for burst in some))
    _check_sinks(made, rounds * BURSTS * BURST)
    rows = {name: figures.add(f"64 byte frame, {name}", "ns of CPU", values) for name, values in cost.items()}
    chart = Bars("CPU time of a 64 byte frame from end to end", "ns")
    for name, row in rows.items():
        chart.add("established", name, row)
    figures.chart("frame", chart)
    added = {name: _added(figures, rows, name) for name in (Ours.name, Filtered.name)}
    figures.ratio("added by this switch / by nftables", added[Ours.name], added[Filtered.name], "<0.5")
    for name, values in rate.items():
        figures.add(f"64 byte frames, one sender, {name}", "frames/s", values)


def _again(sender: Sender, messages: Messages) -> Burst:
    """A frame that the kernel leaves to its thread for softirqs is not in the sender's time: then once more."""
    for _ in range(TRIES):
        try:
            return sender.burst(messages)
        except Unverified as error:
            last = error
    raise last


def _added(figures: Figures, rows: dict[str, Figure], name: str) -> Figure:
    bare = rows[Bridge.name].values
    return figures.add(
        f"added to the bare bridge by {name}",
        "ns of CPU",
        [mine - bridge for mine, bridge in zip(rows[name].values, bare, strict=True)],
    )


def _check_sinks(made: list[Lane], least: int) -> None:
    for lane in made:
        text = run(lane.switch.right, ["nft", "-j", "list", "counter", "netdev", "sink", "taken"])
        (counter,) = [one["counter"] for one in json.loads(text)["nftables"] if "counter" in one]
        if counter["packets"] < least:
            raise Unverified(f"{lane.switch.name}: {counter['packets']} datagrams of at least {least} at the other end")


# ---- connections ----


def _evicts(switch: Switch) -> bool:
    """A full table makes room for new ones: Open vSwitch's does not, they stay outside of it."""
    return isinstance(switch, Ours | Filtered)


def _new_connections(figures: Figures, made: list[Lane], rounds: int) -> None:
    cost: dict[str, list[float]] = {}
    for lane in made:
        limit = lane.switch.empty()
        _begin(lane, 0, limit)
        held = lane.switch.connections()
        if held < FULL * limit:
            raise Unverified(f"{lane.switch.name}: {held} connections in a table for {limit}")
    for number in range(rounds):
        for lane in made:
            burst = _begin(lane, limit + number * NEW, NEW)
            cost.setdefault(lane.switch.name, []).append(1e9 / burst.cpu_ns_a_frame)
            if not FULL * limit <= (held := lane.switch.connections()) <= limit:
                raise Unverified(f"{lane.switch.name}: {held} connections in a table for {limit}")
    rows = [
        figures.add(f"new connections, table of {limit:,} at its limit, {name}", "1/s of CPU", values)
        for name, values in cost.items()
    ]
    figures.ratio("new connections, this switch / bridge + nftables", rows[0], rows[1])


def _begin(lane: Lane, first: int, count: int) -> Burst:
    """As many connections, none of which was there before."""
    numbers = np.arange(first, first + count)
    sources, targets = 1024 + numbers % 60_000, UDP_PORTS[0] + numbers // 60_000
    messages = datagrams(lane.switch.macs, (LEFT, RIGHT), sources.astype(np.uint16), targets.astype(np.uint16))
    return lane.there.burst(messages)


# ---- throughput ----


def _throughput(figures: Figures, made: list[Lane], rounds: int, seconds: float) -> None:
    chart = Bars("TCP between two namespaces", "Gbit/s")
    figures.chart("tcp", chart)
    for what, (size, offload) in SEGMENTS.items():
        for lane in made:
            for end in (lane.switch.left, lane.switch.right):
                state = "on" if offload else "off"
                run(end, ["ethtool", "-K", "eth0", "tso", state, "gso", state])
        rates: dict[str, list[float]] = {lane.switch.name: [] for lane in made}
        for _ in range(rounds):
            for lane in made:
                rates[lane.switch.name].append(_iperf(lane.switch, size, seconds) / 1e9)
        rows = {name: figures.add(f"TCP, {what}, {name}", "Gbit/s", values) for name, values in rates.items()}
        for name, row in rows.items():
            chart.add(what, name, row)
            if name != Ours.name:
                figures.ratio(f"TCP, {what}, this switch / {name}", rows[Ours.name], row)


def _iperf(switch: Switch, size: int, seconds: float) -> float:
    """Bits a second that the right end's application received."""
    received = Received(switch.right)
    server = switch.right.run(
        lambda: subprocess.Popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    )
    try:
        wait_until("iperf3 listens", lambda: str(SERVICE) in run(switch.right, ["ss", "-Hltn"]), 10.0)
        before = received.bytes()
        command = ["iperf3", "-J", "-c", RIGHT, "-p", str(SERVICE), "-t", str(seconds), "-M", str(size)]
        report = json.loads(run(switch.left, command))["end"]["sum_received"]
        if not 0 < report["bytes"] <= received.bytes() - before:
            raise Unverified(
                f"{switch.name}: iperf3 tells of {report['bytes']} bytes, {received.bytes() - before} came in"
            )
        return float(report["bits_per_second"])
    finally:
        received.close()
        server.kill()
        server.wait(10)
