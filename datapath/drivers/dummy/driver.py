"""The driver of the switch in memory: legal transitions, epochs, and what each call does to the switch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datapath.drivers.dummy import capacity, labels
from datapath.drivers.dummy.instance import Instance, Redirect
from datapath.drivers.dummy.switch import Switch, fabric, ignore
from datapath.drivers.dummy.tables import RecordTable
from datapath.errors import FeatureMissing, LoadRejected, NotReady, PortNotFound, StaleEpoch, UnsupportedKind
from datapath.provider import (
    Driver,
    Event,
    Loaded,
    Need,
    Network,
    Place,
    PortRef,
    PortState,
    PortStatus,
    Pumped,
)
from datapath.registry import KINDS
from datapath.state.check import checked_records
from datapath.state.kind import Columns, Kind, Nature, Op, Record, Table

STAGED, ACTIVE, QUIESCED, STUB = PortState.STAGED, PortState.ACTIVE, PortState.QUIESCED, PortState.STUB


class DummyDriver(Driver):
    """A switch in memory. Every device is there but those that `switch.plug` took away. Events come synchronously.

    Options, all optional:
      host         its name in the fabric, "dummy"
      fabric       name of the network between switches of this process, "default"
      clock        function that gives nanoseconds, time.monotonic_ns
      kinds        names of the kinds it holds, all
      ports_max    port instances, 1024
      connections  sum of connections_max of all ports, 2^32
      rules_max    rules of one policy, 16,384
      tracked_max  changed keys that can be noted, 65,536
    """

    name = "dummy"

    def __init__(self) -> None:
        self._switch: Switch | None = None
        self._options: Mapping[str, Any] = {}

    # ---- the host ----

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
        unknown = sorted(set(options.get("kinds", ())) - set(KINDS))
        return [("kinds", not unknown, f"take {', '.join(unknown)} out of the option `kinds`" if unknown else "")]

    def start(self, options: Mapping[str, Any], on_event: Callable[[Event], None]) -> None:
        if self._switch is not None:
            raise NotReady("the driver was started before", hint="stop it first")
        unknown = set(options.get("kinds", ())) - set(KINDS)
        if unknown:
            raise FeatureMissing(f"no kind {min(unknown)!r}", hint=f"known: {', '.join(KINDS)}")
        self._options = dict(options)
        shared, host = fabric(options.get("fabric", "default")), options.get("host", "dummy")
        clock = options.get("clock", time.monotonic_ns)
        self._switch = shared.switches.setdefault(host, Switch(host, shared, clock))
        self._switch.emit = on_event

    def stop(self) -> None:
        if self._switch is not None:
            self._switch.emit = ignore
            self._switch = None

    def destroy(self) -> None:
        switch = self.switch
        self.stop()
        switch.fabric.switches.pop(switch.host, None)

    def kinds(self) -> Mapping[str, int]:
        return {name: kind.version for name, kind in self._kinds().items()}

    def _kinds(self) -> dict[str, Kind]:
        names = {"port", *self._options.get("kinds", KINDS)}
        return {name: kind for name, kind in KINDS.items() if name in names}

    @property
    def switch(self) -> Switch:
        """The switch that this driver runs. Raises NotReady before start and after stop."""
        if self._switch is None:
            raise NotReady("the driver is not started")
        return self._switch

    # ---- configuration of the host ----

    def set_network(self, network: Network) -> None:
        self.switch.networks[network.name] = network

    def remove_network(self, name: str) -> None:
        users = [ref for ref, port in self.switch.ports.items() if port.record["network"] == name]
        if users:
            raise NotReady(f"network {name} has {len(users)} ports", hint="purge them first")
        self.switch.networks.pop(name, None)

    def networks(self) -> Sequence[Network]:
        return list(self.switch.networks.values())

    def set_hosts(self, hosts: Mapping[str, str]) -> None:
        self.switch.hosts = dict(hosts)

    def set_place(self, place: Place) -> None:
        self.switch.places[place.network, place.mac] = place.host

    def remove_place(self, network: str, mac: str) -> None:
        self.switch.places.pop((network, mac), None)

    # ---- life of a port ----

    def probe(self, need: Need) -> list[str]:
        return capacity.reasons(self.switch, self.kinds(), need, self._options)

    def stage(self, ref: PortRef, record: Record, device: str) -> None:
        switch = self.switch
        if ref in switch.ports:
            raise NotReady(f"{_name(ref)} is here already", hint="purge it first")
        self._refuse_stale(ref)
        checked = self._checked(ref, record)
        if len(switch.ports) >= capacity.limit(self._options, "ports_max"):
            raise UnsupportedKind(f"no room for port {ref.mac}: {len(switch.ports)} ports are here")
        port = Instance(ref, checked, device, self._kinds(), switch.clock, ifindex=next(switch.indexes))
        port.tables["port"].load(Table("port", records=[checked]))
        port.present = device not in switch.absent
        switch.ports[ref] = port
        if port.present:
            switch.emit(Event("device-added", ref, {"device": device}))

    def _checked(self, ref: PortRef, record: Record) -> Record:
        (checked,) = checked_records(KINDS["port"], Table("port", records=[record]))
        checked.pop("counters", None)
        if checked["mac"] != ref.mac:
            raise LoadRejected(f"the record is of {checked['mac']}, the port is {ref.mac}")
        reasons = capacity.network_reasons(self.switch, checked)
        if reasons:
            raise UnsupportedKind("; ".join(reasons), hint="set the network first")
        if checked["connections_max"] < 1:
            raise LoadRejected("port: connections_max has to be positive")
        return checked

    def _refuse_stale(self, ref: PortRef) -> None:
        newer = [r.epoch for r in self.switch.ports if (r.vm, r.mac) == (ref.vm, ref.mac) and r.epoch > ref.epoch]
        if newer:
            raise StaleEpoch(f"{_name(ref)}: epoch {max(newer)} is here")

    def _port(self, ref: PortRef, *states: PortState) -> Instance:
        port = self.switch.ports.get(ref)
        if port is None:
            self._refuse_stale(ref)
            raise PortNotFound(f"{_name(ref)} is not here")
        if states and port.state not in states:
            raise NotReady(f"{_name(ref)} is {port.state}: this needs {' or '.join(states)}")
        return port

    def commit(self, ref: PortRef) -> None:
        port = self._port(ref, STAGED, ACTIVE)
        if port.state is ACTIVE and not port.committed:
            raise NotReady(f"{_name(ref)} is active and was never staged for a commit")
        port.committed = True

    def open(self, ref: PortRef, *, broadcast: bool = True) -> Pumped:
        port = self._port(ref, STAGED, ACTIVE)
        if port.state is STAGED:
            port.broadcast = broadcast
            self.switch.activate(port)
        passed = 0
        while port.held_from:
            self.switch.send(port, port.held_from.popleft())
            passed += 1
        return Pumped(passed, port.drops["hold-full"])

    def set_broadcast(self, ref: PortRef, on: bool) -> Pumped:
        port = self._port(ref)
        port.broadcast = on
        return Pumped(0, port.drops["hold-full"])

    def hold(self, ref: PortRef) -> None:
        self._port(ref, ACTIVE, QUIESCED).shut = True

    def idle(self, ref: PortRef) -> bool | None:
        port = self._port(ref)
        return not port.queue if port.present else None

    def quiesce(self, ref: PortRef) -> None:
        port = self._port(ref, ACTIVE, QUIESCED)
        port.shut = True
        port.state = QUIESCED
        port.stop_clock()

    def take(self, ref: PortRef) -> list[bytes]:
        port = self._port(ref)
        frames = list(port.queue)
        port.queue.clear()
        return frames

    def inject(self, ref: PortRef, frames: Sequence[bytes], *, judged: bool) -> int:
        port = self._port(ref)
        if judged and not port.present:
            return 0
        for frame in frames:
            if judged:
                port.queue.append(frame)
            else:
                self.switch.from_port(port, frame)
        return len(frames)

    def resume(self, ref: PortRef) -> Pumped:
        port = self._port(ref, ACTIVE, QUIESCED)
        self.switch.activate(port)
        return self._pump(port)

    def _pump(self, port: Instance) -> Pumped:
        passed = 0
        while port.held_to:
            self.switch.pass_gate(port, port.held_to.popleft())
            passed += 1
        return Pumped(passed, port.drops["hold-full"])

    def accept_redirect(self, ref: PortRef, channel: int, source: str) -> None:
        self._port(ref, STAGED, ACTIVE)
        self.switch.channels[channel] = (ref, source)

    def redirect(self, ref: PortRef, channel: int, host: str, judged: Sequence[bytes] = ()) -> Pumped:
        port = self._port(ref, QUIESCED, STUB)
        if host not in self.switch.hosts and host not in self.switch.fabric.switches:
            raise NotReady(f"no host {host!r} is known", hint="set_hosts comes first")
        port.redirect = Redirect(channel, host, self.switch.clock())
        port.gate, port.shut = "redirect", False
        for frame in judged:
            self.switch.pass_gate(port, frame, judged=True)
        pumped = self._pump(port)
        return Pumped(pumped.passed + len(judged), pumped.dropped)

    def passed_on(self, ref: PortRef) -> tuple[int, int]:
        port = self._port(ref)
        return port.counters["redirected"], port.came

    def redirect_idle_s(self, ref: PortRef) -> float:
        port = self._port(ref)
        if port.redirect is None:
            raise NotReady(f"{_name(ref)} does not redirect")
        return (self.switch.clock() - port.redirect.last_ns) / 1e9

    def purge(self, ref: PortRef, *, keep_redirect: bool = False) -> None:
        switch = self.switch
        port = switch.ports.get(ref)
        if port is None:
            return
        switch.channels = {number: end for number, end in switch.channels.items() if end[0] != ref}
        if keep_redirect and port.redirect is not None:
            port.state, port.tables, port.committed = STUB, {}, False
            port.queue.clear()
            return
        del switch.ports[ref]
        switch.locations = {place: owner for place, owner in switch.locations.items() if owner != ref}

    def set_lease(self, ref: PortRef, seconds: float | None) -> None:
        port = self._port(ref)
        port.lease_ns = None if seconds is None else self.switch.clock() + int(seconds * 1e9)

    def update(self, ref: PortRef, record: Record) -> None:
        port = self._port(ref, STAGED, ACTIVE, QUIESCED)
        checked = self._checked(ref, record)
        if port.state is ACTIVE and checked["network"] != port.record["network"]:
            raise NotReady("an active port cannot change its network")
        port.tables["port"].load(Table("port", records=[checked]))
        port.configure(checked)

    def ports(self, vm: str = "") -> list[PortStatus]:
        return [self.port(ref) for ref in sorted(self.switch.ports) if vm in ("", ref.vm)]

    def port(self, ref: PortRef) -> PortStatus:
        port = self._port(ref)
        return PortStatus(
            ref=ref,
            state=port.state,
            committed=port.committed,
            device=port.device if port.present else "",
            ifindex=port.ifindex if port.present else 0,
            record=dict(port.record),
            gate=port.gate + (" shut" if port.shut else ""),
            held_to=len(port.held_to),
            held_from=len(port.held_from),
            connections=len(port.tables["conntrack"]) if "conntrack" in port.tables else 0,
            counters=port.totals(),
            drops={name: count for name, count in port.drops.items() if count},
        )

    def probe_path(self, channel: int, host: str, size: int, timeout_s: float) -> bool:  # noqa: ARG002
        switch = self.switch
        peer = switch.fabric.reach(switch.host, host)
        back = peer.fabric.reach(host, switch.host) if peer else None
        return back is switch and size <= switch.fabric.mtu

    def set_trace(self, ref: PortRef, on: bool) -> None:
        self._port(ref).trace = on

    # ---- state ----

    def dump(self, ref: PortRef, kind: str) -> Iterator[Table]:
        port = self._port(ref, STAGED, ACTIVE, QUIESCED)
        if kind not in port.tables:
            raise UnsupportedKind(f"kind {kind} is not held here")
        return port.tables[kind].dump()

    def load(self, ref: PortRef, table: Table) -> Loaded:
        states = (STAGED, ACTIVE, QUIESCED) if table.op is Op.ACCOUNT else (STAGED, ACTIVE)
        port = self._port(ref, *states)
        if table.kind not in port.tables:
            raise UnsupportedKind(f"kind {table.kind} is not held here")
        if table.op is not Op.ACCOUNT and port.time_base is None:
            port.tables[table.kind].check(table)
            port.time_frozen = max(port.time_frozen, table.port_time_ns)
        loaded = port.tables[table.kind].load(table)
        self._note_overflow(port)
        return loaded

    def relabel(self, ref: PortRef, columns: Columns) -> int:
        port = self._port(ref, ACTIVE)
        changed = labels.relabel(port, columns)
        self._note_overflow(port)
        return changed

    def _note_overflow(self, port: Instance) -> None:
        noted = sum(len(table.dirty or ()) for table in port.tables.values())
        port.overflow = port.overflow or noted > capacity.limit(self._options, "tracked_max")

    def track(self, ref: PortRef) -> None:
        port = self._port(ref, STAGED, ACTIVE, QUIESCED)
        if port.tracking and not port.overflow:
            return
        port.tracking, port.overflow = True, False
        for table in port.tables.values():
            if table.kind.nature & Nature.LIVE:
                table.dirty = set()

    def drain(self, ref: PortRef) -> list[Table]:
        port = self._port(ref, STAGED, ACTIVE, QUIESCED)
        if not port.tracking:
            raise NotReady(f"{_name(ref)} is not tracked", hint="call track first")
        if port.overflow:
            raise NotReady(f"{_name(ref)}: more changes than could be noted", hint="track and dump again")
        changed = [part for table in port.tables.values() if table.dirty for part in table.drain()]
        return changed + (_last(port) if port.state is QUIESCED else [])

    def untrack(self, ref: PortRef) -> None:
        port = self._port(ref)
        port.tracking = port.overflow = False
        for table in port.tables.values():
            table.dirty = None

    def settle(self, ref: PortRef) -> Iterator[Table]:
        port = self._port(ref, STAGED, ACTIVE, QUIESCED)
        for table in port.tables.values():
            if table.kind.name != "port":
                yield from table.settle()
        yield Table("port", Op.ACCOUNT, records=[{"mac": ref.mac, "counters": port.totals()}])

    def settled(self, ref: PortRef) -> None:
        self._port(ref)

    def describe(self, refs: Sequence[PortRef]) -> Need:
        ports = [self._port(ref, STAGED, ACTIVE, QUIESCED) for ref in refs]
        configured: dict[str, list[Record]] = {}
        for port in ports:
            for name, table in port.tables.items():
                if table.kind.document is not None and isinstance(table, RecordTable) and len(table):
                    configured.setdefault(name, []).extend(table.configured())
        owners = {name: KINDS[name].part_of or name for name in self.kinds()}
        versions = {**self.kinds(), **labels.versions(ports)}
        kinds = {n: v for n, v in versions.items() if KINDS[owners[n]].document is None or owners[n] in configured}
        return Need(
            kinds=kinds,
            configured=configured,
            records=[dict(port.record) for port in ports],
            rules_max=max((len(port.tables["acl"]) for port in ports if "acl" in port.tables), default=0),
            connections=sum(port.record["connections_max"] for port in ports),
        )

    def remains(self) -> Mapping[str, Sequence[str]]:
        switch = self.switch
        return {
            "ports": sorted(_name(ref) for ref in switch.ports),
            "locations": sorted(f"{network} {mac}" for network, mac in switch.locations),
            "channels": sorted(str(number) for number in switch.channels),
        }


def _last(port: Instance) -> list[Table]:
    """What is live in kinds that note no changes."""
    kept = [table for table in port.tables.values() if isinstance(table, RecordTable)]
    return [part for table in kept if Nature.LIVE in table.kind.nature for part in table.dump()]


def _name(ref: PortRef) -> str:
    return f"port {ref.vm}/{ref.mac} epoch {ref.epoch}"
