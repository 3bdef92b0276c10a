# SPDX-License-Identifier: GPL-2.0-only
"""What each wire carried during a move, frame by frame: captures at the guest, the peer, both taps and two uplinks."""

from __future__ import annotations

from collections import Counter

import pytest

from migrator.lab import oracle
from migrator.lab.processes import Worker, wait_until
from migrator.lab.topology import UPLINK
from migrator.lab.workers.probe import FORMAT, MAGIC

from .traffic import Streams
from .world import World


def numbers(capture: Worker, flow: int, way: str, first: int) -> list[int]:
    """Numbers of a flow that a wire carried, in order, from `first` on: all captures had begun by then."""
    found = []
    for _, direction, frame in capture.call("captured", contains=(MAGIC + flow.to_bytes(4, "big")).hex())["frames"]:
        if direction == way:
            data = bytes.fromhex(frame)
            found.append(FORMAT.unpack_from(data, data.index(MAGIC))[2])
    return [number for number in found if number >= first]


@pytest.mark.parametrize("network", ["blue", "over"])
def test_every_frame_on_every_wire(world: World, network: str) -> None:
    vm, peer = world.vm("h1", network, behaviour={"memory_ms": 1500}), world.peer("h3", network)
    streams = Streams(vm, peer)
    guest, outside = vm.worker("raw"), peer.worker("raw")
    wires = {"guest": guest, "peer": outside, "h1": _tap(world, vm, "h1")}
    uplinks = {host: _tap(world, vm, host, UPLINK) for host in ("h1", "h3")}
    for wire in (*wires.values(), *uplinks.values()):
        wire.call("capture")
    to, back = streams.sent(1), streams.sent(2)
    reports = world.cluster.migration(vm, "h2")
    next(reports)
    device = vm.ports[0].devices["h2"]
    wait_until("the destination's tap", lambda: device in oracle.traces(world.cluster, "h2")["links"], 10.0)
    wires["h2"] = _tap(world, vm, "h2")
    wires["h2"].call("capture")
    *_, report = reports
    assert report.outcome == "complete"
    streams.run_on(100)
    streams.assert_perfect()

    sent = numbers(outside, 1, "out", to)
    source, destination = numbers(wires["h1"], 1, "out", to), numbers(wires["h2"], 1, "out", to)
    assert sent == list(range(to, sent[-1] + 1))
    assert source + destination == sent, "each frame goes to one of the taps, the source's first"
    assert source and destination
    assert Counter(numbers(guest, 1, "in", to)) == Counter(sent)
    assert numbers(uplinks["h3"], 1, "out", to) == sent, "once, whatever network it is"
    redirected = numbers(uplinks["h1"], 1, "out", to)
    assert numbers(uplinks["h1"], 1, "in", to) == source + redirected, "what the source did not deliver it passed on"
    assert redirected and redirected == destination[: len(redirected)]
    answers = numbers(guest, 2, "out", back)
    assert numbers(wires["h1"], 2, "in", back) + numbers(wires["h2"], 2, "in", back) == answers
    assert numbers(outside, 2, "in", back) == answers


def _tap(world: World, vm, host: str, device: str = "") -> Worker:  # type: ignore[no-untyped-def]
    device = device or vm.ports[0].devices[host]
    return world.cluster.worker(host, "raw", {"device": device}, name=f"{vm.name}-{device}-{host}")
