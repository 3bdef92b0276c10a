# SPDX-License-Identifier: GPL-2.0-only
"""Captures of every wire of a cluster, and the law that they obey: what enters a host leaves it, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from migrator.lab.machines import GUEST_DEVICE, Machine
from migrator.lab.processes import Worker, wait_until
from migrator.lab.topology import UPLINK

from .world import World


@dataclass(frozen=True)
class Flow:
    """A numbered stream of `traffic.Streams`, looked at from its number `first` on."""

    number: int
    sender: Machine
    receiver: Machine
    first: int


@dataclass
class Wires:
    """Captures in each host (its uplink, the devices of all machines there) and inside of each machine."""

    world: World
    machines: tuple[Machine, ...]
    workers: dict[str, Worker] = field(default_factory=dict)

    def begin(self) -> Wires:
        """Capture from now on; devices that a move makes are captured when they appear."""
        places = {host: [UPLINK, *filter(None, (device(m, host) for m in self.machines))] for host in self.hosts}
        for place, devices in {**places, **{m.name: [GUEST_DEVICE] for m in self.machines}}.items():
            worker = self.world.cluster.worker(place, "wire", name=f"{place}-wire-{self.machines[0].name}")
            worker.call("capture", devices=devices)
            self.workers[place] = worker
        return self

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.world.cluster.host_names

    def inside(self, machine: Machine, flow: Flow, way: str) -> list[int]:
        """Numbers that a machine's own NIC saw."""
        return self._numbers(machine.name, GUEST_DEVICE, flow, way)

    def uplink(self, host: str, flow: Flow, way: str) -> list[int]:
        return self._numbers(host, UPLINK, flow, way)

    def tap(self, host: str, machine: Machine, flow: Flow, way: str) -> list[int]:
        """Numbers on a machine's device at a host: "out" is towards the machine."""
        name = device(machine, host)
        return self._numbers(host, name, flow, way) if name else []

    def taps(self, machine: Machine, flow: Flow, way: str) -> dict[str, list[int]]:
        return {host: self.tap(host, machine, flow, way) for host in self.hosts}

    def wait_for_tap(self, host: str, machine: Machine) -> None:
        """A move has made the device there, and it is captured."""
        name = device(machine, host)
        wait_until(f"{name} is captured", lambda: name in self.workers[host].call("capturing")["devices"])

    def assert_lossless(self, flow: Flow) -> None:
        """Every number was sent once, came to one tap once, in order, and every host passed on what it got."""
        sent = self.inside(flow.sender, flow, "out")
        assert sent == list(range(flow.first, sent[-1] + 1)), _unlike(range(flow.first, sent[-1] + 1), sent)
        assert self.inside(flow.receiver, flow, "in") == sent, _unlike(sent, self.inside(flow.receiver, flow, "in"))
        self._assert_once(flow.sender, flow, "in", sent)
        self._assert_once(flow.receiver, flow, "out", sent)
        self.assert_conserved(flow)

    def assert_conserved(self, flow: Flow, *, taken: int = 0) -> None:
        """No host keeps, makes or doubles a number; but what was `taken` out of a guest's queue may be on two taps."""
        extra = 0
        for host in self.hosts:
            entered = Counter(self.uplink(host, flow, "in")) + Counter(self.tap(host, flow.sender, flow, "in"))
            left = Counter(self.uplink(host, flow, "out")) + Counter(self.tap(host, flow.receiver, flow, "out"))
            lost, made = sorted((entered - left).elements()), sorted((left - entered).elements())
            assert not lost, f"flow {flow.number}: {host} did not pass on {lost[:20]}"
            assert taken or not made, f"flow {flow.number}: {host} doubled {made[:20]}"
            extra += len(made)
        assert extra <= taken, (
            f"flow {flow.number}: {extra} numbers came twice, {taken} frames were taken out of a queue"
        )
        self._assert_fabric(flow)

    def _assert_once(self, machine: Machine, flow: Flow, way: str, sent: list[int]) -> None:
        """Each number is on one of a machine's taps; on each tap they are in order."""
        taps = self.taps(machine, flow, way)
        for host, numbers in taps.items():
            assert numbers == sorted(numbers), f"flow {flow.number}: out of order on the tap at {host}"
        all_taps = sorted(number for numbers in taps.values() for number in numbers)
        assert all_taps == sent, f"flow {flow.number}, taps of {machine.name}: {_unlike(sent, all_taps)}"

    def _assert_fabric(self, flow: Flow) -> None:
        """Between the hosts nothing is lost or doubled either: a capture that misses a frame shows here."""
        out, came = (Counter(n for host in self.hosts for n in self.uplink(host, flow, way)) for way in ("out", "in"))
        assert came == out, f"flow {flow.number} between hosts: {_unlike(out.elements(), came.elements())}"

    def _numbers(self, place: str, name: str, flow: Flow, way: str) -> list[int]:
        found = self.workers[place].call("numbers", device=name, flow=flow.number, way=way)["numbers"]
        return [number for number in found if number >= flow.first]


def device(machine: Machine, host: str) -> str:
    """A machine's device on a host, "" where it has none."""
    port = machine.ports[0]
    return port.devices.get(host, "") or (port.device if host == machine.host else "")


def _unlike(wanted: Iterable[int], found: Iterable[int]) -> str:
    order = list(found)
    wanted_counts, found_counts = Counter(wanted), Counter(order)
    missing, more = sorted((wanted_counts - found_counts).elements()), sorted((found_counts - wanted_counts).elements())
    if missing or more:
        return f"missing {missing[:20]}, too many {more[:20]}"
    late = [at for at in range(1, len(order)) if order[at] < order[at - 1]]
    return f"out of order {len(late)} times: {[order[max(at - 3, 0) : at + 3] for at in late[:5]]}"
