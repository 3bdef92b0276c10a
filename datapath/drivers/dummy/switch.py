"""The switch in memory itself: what stays while drivers come and go, and how frames find their way.

A fabric is the network between switches of one process. Frames are bytes that begin with an Ethernet header (an inner
vnet header is neither needed nor looked at); only the destination and source MAC of it are read.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from datapath.drivers.dummy.instance import Instance
from datapath.provider import Event, Network, PortRef, PortState

HOPS_MAX = 2
HOLD_MAX = 16_384  # frames, as the hold tap's txqueuelen

Emit = Callable[[Event], None]


@dataclass
class Fabric:
    """Switches that reach each other by host name. `cuts` are pairs (from, to) that lose everything."""

    switches: dict[str, Switch] = field(default_factory=dict)
    cuts: set[tuple[str, str]] = field(default_factory=set)
    mtu: int = 65_535

    def reach(self, source: str, destination: str) -> Switch | None:
        """The switch of `destination` as `source` sees it, None when nothing gets there."""
        return None if (source, destination) in self.cuts else self.switches.get(destination)

    def cut(self, source: str, destination: str) -> None:
        """From now on nothing gets from `source` to `destination`; `mend` ends that."""
        self.cuts.add((source, destination))

    def mend(self, source: str, destination: str) -> None:
        self.cuts.discard((source, destination))


def ignore(event: Event) -> None:
    """Nobody listens while no driver runs the switch."""


_FABRICS: dict[str, Fabric] = {}


def fabric(name: str) -> Fabric:
    """The fabric of that name, made when it is not there."""
    return _FABRICS.setdefault(name, Fabric())


@dataclass
class Switch:
    """One host's switch: it outlives the driver objects that run it, as a kernel's does."""

    host: str
    fabric: Fabric
    clock: Callable[[], int]
    networks: dict[str, Network] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    places: dict[tuple[str, str], str] = field(default_factory=dict)
    ports: dict[PortRef, Instance] = field(default_factory=dict)
    locations: dict[tuple[str, str], PortRef] = field(default_factory=dict)
    channels: dict[int, tuple[PortRef, str]] = field(default_factory=dict)
    drops: Counter[str] = field(default_factory=Counter)
    absent: set[str] = field(default_factory=set)
    uplink: list[bytes] = field(default_factory=list)
    emit: Emit = field(default_factory=lambda: ignore)
    indexes: itertools.count[int] = field(default_factory=lambda: itertools.count(2))

    def plug(self, device: str, present: bool) -> None:
        """Make a device appear or disappear, with the event that a kernel's message gives."""
        (self.absent.discard if present else self.absent.add)(device)
        for port in self.ports.values():
            if port.device == device and port.present != present:
                port.present = present
                self.emit(Event("device-added" if present else "device-removed", port.ref, {"device": device}))

    # ---- frames from a guest ----

    def from_port(self, port: Instance, frame: bytes) -> None:
        """A frame that the guest sent. The first one of a guest that was resumed opens a committed port."""
        if port.state is PortState.STAGED and port.committed and not port.lease_over():
            self.activate(port)
            self.emit(Event("opened", port.ref))
        if port.state is PortState.STAGED:
            self._hold_from(port, frame)
        elif port.state is not PortState.ACTIVE:
            self.drop(port, "not-active", frame, "from")
        elif port.held_from:
            self._hold_from(port, frame)
        else:
            self.send(port, frame)

    def send(self, port: Instance, frame: bytes) -> None:
        """A frame of an active port goes where its destination is."""
        port.counters["packets_from"] += 1
        port.counters["bytes_from"] += len(frame)
        self._trace(port, "from", "pass", "none", frame)
        self.forward(str(port.record["network"]), frame, port)

    def _hold_from(self, port: Instance, frame: bytes) -> None:
        if port.lease_over():
            self.drop(port, "lease", frame, "from")
        elif len(port.held_from) >= HOLD_MAX:
            self.drop(port, "hold-full", frame, "from")
        else:
            port.held_from.append(frame)
            port.counters["held"] += 1

    def activate(self, port: Instance) -> None:
        """The guest runs here: frames for it come to this port. Idempotent."""
        port.state, port.gate, port.shut, port.redirect = PortState.ACTIVE, "local", False, None
        port.run_clock()
        self.locations[str(port.record["network"]), port.ref.mac] = port.ref

    # ---- frames on a network ----

    def forward(self, network: str, frame: bytes, source: Instance | None) -> None:
        """Deliver by destination MAC: a port here, another host, else flood to the network's ports and the uplink."""
        destination = frame[:6].hex(":")
        port = self.located(network, destination)
        place = self.places.get((network, destination))
        if port is not None and (port.gate == "local" or port.shut or not place):
            self.deliver(port, frame)
        elif place and place != self.host:
            peer = self.fabric.reach(self.host, place)
            if peer:
                peer.from_network(network, frame)
            else:
                self.drop(source, "tunnel", frame, "from")
        else:
            self._flood(network, frame, source)

    def from_network(self, network: str, frame: bytes) -> None:
        """A frame of a network that another switch sent here."""
        port = self.located(network, frame[:6].hex(":"))
        if port is not None:
            self.deliver(port, frame)
        elif frame[0] & 1:
            self._flood(network, frame, None, uplink=False)
        else:
            self.drops["no-place"] += 1

    def located(self, network: str, mac: str) -> Instance | None:
        """The port instance that has the MAC's location entry."""
        ref = self.locations.get((network, mac))
        return self.ports.get(ref) if ref else None

    def _flood(self, network: str, frame: bytes, source: Instance | None, *, uplink: bool = True) -> None:
        for port in list(self.ports.values()):
            if port is not source and port.record["network"] == network and port.gate == "local":
                if port.broadcast or not frame[0] & 1:
                    self.deliver(port, frame)
                else:
                    self.drop(port, "broadcast-path", frame, "to")
        if uplink:
            self.uplink.append(frame)

    # ---- frames for a guest: the gate ----

    def deliver(self, port: Instance, frame: bytes, *, hops: int = 0) -> None:
        """A frame for the guest meets the gate: held, passed to the device, redirected, or dropped."""
        if port.lease_over():
            self.drop(port, "lease", frame, "to")
        elif port.shut or port.held_to:
            self._hold_to(port, frame)
        else:
            self.pass_gate(port, frame, hops=hops)

    def _hold_to(self, port: Instance, frame: bytes) -> None:
        if len(port.held_to) >= HOLD_MAX:
            self.drop(port, "hold-full", frame, "to")
        else:
            port.held_to.append(frame)
            port.counters["held"] += 1

    def pass_gate(self, port: Instance, frame: bytes, *, hops: int = 0, judged: bool = False) -> None:
        """A frame leaves through the gate's target."""
        if port.gate == "redirect":
            self._redirect(port, frame, hops, judged)
        elif port.gate == "none":
            self.drop(port, "no-place", frame, "to")
        else:
            self.to_port(port, frame)

    def to_port(self, port: Instance, frame: bytes) -> None:
        """A frame reaches the device of an active port."""
        if port.state is not PortState.ACTIVE or not port.present:
            self.drop(port, "not-active", frame, "to")
            return
        port.counters["packets_to"] += 1
        port.counters["bytes_to"] += len(frame)
        self._trace(port, "to", "pass", "none", frame)
        port.queue.append(frame)

    def _redirect(self, port: Instance, frame: bytes, hops: int, judged: bool) -> None:
        redirect = port.redirect
        peer = self.fabric.reach(self.host, redirect.host) if redirect else None
        if hops >= HOPS_MAX:
            self.drop(port, "hops", frame, "to")
        elif redirect is None or peer is None:
            self.drop(port, "tunnel", frame, "to")
        else:
            redirect.last_ns = self.clock()
            port.counters["redirected"] += 1
            peer.from_channel(redirect.channel, self.host, frame, hops + 1, judged)

    def from_channel(self, channel: int, source: str, frame: bytes, hops: int, judged: bool) -> None:
        """A redirected frame: only from the announced host, only for the instance that waits for it."""
        ref, announced = self.channels.get(channel, (None, ""))
        port = self.ports.get(ref) if ref else None
        if port is None or announced != source:
            self.drops["channel"] += 1
            return
        port.came += 1
        if not judged and frame[0] & 1 and port.broadcast and port.gate == "local" and port.state is PortState.ACTIVE:
            self.drop(port, "broadcast-path", frame, "to")  # its own network may have flooded it here before
        elif judged and port.state is PortState.ACTIVE and port.gate == "local":
            port.queue.append(frame)
        else:
            self.deliver(port, frame, hops=hops)

    def drop(self, port: Instance | None, reason: str, frame: bytes, direction: str) -> None:
        """Count a dropped frame under its reason, on the port or on the host."""
        if port is None:
            self.drops[reason] += 1
            return
        port.drops[reason] += 1
        self._trace(port, direction, "drop", reason, frame)

    def _trace(self, port: Instance, direction: str, verdict: str, reason: str, frame: bytes) -> None:
        if port.trace:
            data = {"time_ns": self.clock(), "direction": direction, "verdict": verdict, "reason": reason}
            self.emit(Event("trace", port.ref, {**data, "rule": 0, "length": len(frame), "frame": frame[:128]}))
