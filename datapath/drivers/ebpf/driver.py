"""The driver `ebpf`: the switch of this project. datapath/provider.py has the contract of every method."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datapath import features
from datapath.drivers.ebpf import admission, evolve, queues, status, tun
from datapath.drivers.ebpf.hosts import host_record
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.layout import STRUCTURES, C
from datapath.drivers.ebpf.networks import require_empty
from datapath.drivers.ebpf.options import Options
from datapath.drivers.ebpf.remains import remains
from datapath.drivers.ebpf.running import Running
from datapath.drivers.ebpf.tables import KINDS, VERSIONS, Tables
from datapath.drivers.ebpf.taps import GuestTap
from datapath.errors import FeatureMissing, NotReady
from datapath.provider import Driver, Event, Loaded, Need, Network, Place, PortRef, PortStatus, Pumped
from datapath.state.acl import ACL
from datapath.state.kind import Columns, Record, Table

_log = logging.getLogger(__name__)


class EbpfDriver(Driver):
    """`_structure` is held while ports, networks or hosts are made or taken away; a switchover never waits for it."""

    name = "ebpf"

    def __init__(self) -> None:
        self._running: Running | None = None
        self._tables: Tables | None = None
        self._structure = threading.RLock()

    # ---- the host ----

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
        Options.of(options)
        found = features.probe(options)
        for one in found:
            if not one.there and not one.needed:
                _log.warning("%s is not there, the switch runs without: %s", one.name, one.remedy)
        return [(one.name, one.there, one.remedy) for one in found if one.there or one.needed]

    def start(self, options: Mapping[str, Any], on_event: Callable[[Event], None]) -> None:
        with self._structure:
            if self._running is not None:
                raise NotReady("the driver is running", hint="stop it first")
            running = Running(Options.of(options), on_event)
            running.begin()
            self._running, self._tables = running, Tables(running)

    def stop(self) -> None:
        with self._structure:
            if self._running is not None:
                running, self._running, self._tables = self._running, None, None
                running.stop()

    def destroy(self) -> None:
        with self._structure:
            running = self._parts()
            self._running = self._tables = None
            running.destroy()

    def kinds(self) -> Mapping[str, int]:
        return VERSIONS

    def layout(self) -> str:
        return evolve.digest(STRUCTURES)

    def _parts(self) -> Running:
        if self._running is None:
            raise NotReady("the driver is not running", hint="start it first")
        return self._running

    def _state(self) -> Tables:
        self._parts()
        assert self._tables is not None
        return self._tables

    def _find(self, ref: PortRef) -> Instance:
        return self._parts().instances.find(ref)

    # ---- configuration of the host ----

    def set_network(self, network: Network) -> None:
        with self._structure:
            parts = self._parts()
            parts.networks.set(network)
            parts.kinds.changed()

    def remove_network(self, name: str) -> None:
        with self._structure:
            parts = self._parts()
            if not parts.networks.has(name):
                return
            on_it = [
                one.ref.mac
                for one in parts.instances
                if name in (one.entry.record["network"], *one.entry.record["trunk"].values())
            ]
            require_empty(name, on_it)
            parts.places.network_gone(parts.networks.remove(name))
            parts.kinds.changed()

    def networks(self) -> Sequence[Network]:
        return self._parts().networks.all()

    def set_hosts(self, hosts: Mapping[str, str]) -> None:
        with self._structure:
            parts = self._parts()
            in_use = {int(parts.kernel.ports.view["remote"][one.slot]) for one in parts.instances}
            gone = parts.hosts.replace(hosts, in_use)
            parts.networks.hosts_changed()
            parts.places.host_gone(gone)
            parts.kinds.changed()

    def set_place(self, place: Place) -> None:
        parts = self._parts()
        parts.kinds.placed(place)  # also of a network that this host does not have
        parts.places.set(place)

    def remove_place(self, network: str, mac: str) -> None:
        parts = self._parts()
        parts.kinds.unplaced(network, mac)
        parts.places.remove(network, mac)

    # ---- life of a port ----

    def probe(self, need: Need) -> list[str]:
        with self._structure:  # the slot of a port that is just being purged is free when that is done
            parts = self._parts()
            found = admission.obstacles(need, VERSIONS, parts.networks, parts.instances)
            return found + parts.kinds.obstacles(need.configured)

    def stage(self, ref: PortRef, record: Record, device: str) -> None:
        with self._structure:
            self._parts().staging.stage(ref, record, device)

    def commit(self, ref: PortRef) -> None:
        self._parts().switchover.commit(self._find(ref))

    def open(self, ref: PortRef, *, broadcast: bool = True) -> Pumped:
        parts, instance = self._parts(), self._find(ref)
        if not parts.kernel.ports.view["ifindex"][instance.slot]:
            parts.plugs.plug(instance)  # the watch has not told of it yet: what is held would be dropped
        passed = parts.switchover.open(instance, broadcast=broadcast)
        parts.kinds.opened(instance)
        return passed

    def set_broadcast(self, ref: PortRef, on: bool) -> Pumped:
        parts, instance = self._parts(), self._find(ref)
        if on:
            return parts.switchover.source_done(instance)
        parts.words.flag(instance.slot, add=C.PORT_F_NO_BROADCAST)
        return Pumped(0, 0)

    def hold(self, ref: PortRef) -> None:
        parts, instance = self._parts(), self._find(ref)
        parts.switchover.hold(instance)
        parts.kinds.held(instance)

    def idle(self, ref: PortRef) -> bool | None:
        instance = self._find(ref)
        tap = self._guest_tap(instance)
        if not self._parts().kinds.idle(instance):
            return False
        return None if tap is None or tap.vhost else not tap.readable()

    def quiesce(self, ref: PortRef) -> None:
        parts, instance = self._parts(), self._find(ref)
        parts.switchover.quiesce(instance)
        parts.kinds.quiesced(instance)

    def take(self, ref: PortRef) -> list[bytes]:
        tap = self._guest_tap(self._find(ref))
        return [] if tap is None else tap.drain()

    def inject(self, ref: PortRef, frames: Sequence[bytes], *, judged: bool) -> int:
        instance = self._find(ref)
        if not judged:
            return self._parts().holds.send_as_guest(instance, frames)
        ifindex = int(self._parts().kernel.ports.view["ifindex"][instance.slot])
        if not ifindex:
            raise NotReady(f"port {ref.mac} has no device", hint="wait until it is there")
        return tun.inject(ifindex, frames)

    def resume(self, ref: PortRef) -> Pumped:
        instance = self._find(ref)
        instance.forget_guest()
        parts = self._parts()
        passed = parts.switchover.resume(instance)
        parts.kinds.opened(instance)
        return passed

    def accept_redirect(self, ref: PortRef, channel: int, source: str) -> None:
        parts = self._parts()
        address = parts.hosts.address(source)
        parts.staging.accept(self._find(ref), channel, host_record(address))

    def redirect(self, ref: PortRef, channel: int, host: str, judged: Sequence[bytes] = ()) -> Pumped:
        instance = self._find(ref)
        passed = self._parts().switchover.redirect(instance, channel, host, judged)
        instance.forget_guest()
        return passed

    def passed_on(self, ref: PortRef) -> tuple[int, int]:
        return self._parts().counters.passed_on(self._find(ref).slot)

    def redirect_idle_s(self, ref: PortRef) -> float:
        return self._parts().switchover.redirect_idle_s(self._find(ref))

    def purge(self, ref: PortRef, *, keep_redirect: bool = False) -> None:
        with self._structure:
            parts = self._parts()
            instance = parts.instances.get(ref)
            if instance is None:
                return
            instance.forget_guest()
            if parts.words.running(instance.slot):
                parts.kinds.ended(instance)
            if keep_redirect and parts.words.gate(instance.slot)[0] == C.GATE_REDIRECT:
                parts.staging.shrink(instance)
            else:
                parts.staging.purge(instance)
            heir = parts.instances.on(instance.entry.device)
            if heir is not None and heir is not instance:
                parts.plugs.plug(heir)

    def set_lease(self, ref: PortRef, seconds: float | None) -> None:
        self._parts().switchover.set_lease(self._find(ref), seconds)

    def update(self, ref: PortRef, record: Record) -> None:
        with self._structure:
            self._parts().staging.update(self._find(ref), record)

    def ports(self, vm: str = "") -> list[PortStatus]:
        parts = self._parts()
        return status.ports(parts, parts.instances.of(vm) if vm else parts.instances)

    def port(self, ref: PortRef) -> PortStatus:
        return status.port(self._parts(), self._find(ref))

    def probe_path(self, channel: int, host: str, size: int, timeout_s: float) -> bool:
        parts = self._parts()
        return parts.probe.ask(channel, parts.hosts.address(host), size, timeout_s)

    def set_trace(self, ref: PortRef, on: bool) -> None:
        flag = C.PORT_F_TRACE
        self._parts().words.flag(self._find(ref).slot, add=flag if on else 0, drop=0 if on else flag)

    def _guest_tap(self, instance: Instance) -> GuestTap | None:
        """The queue of the port's device; None when it cannot be read."""
        if instance.guest is None:
            try:
                instance.guest = GuestTap(instance.entry.device)
            except FeatureMissing:
                return None
        return instance.guest

    # ---- state ----

    def dump(self, ref: PortRef, kind: str) -> Iterator[Table]:
        return self._state().dump(self._find(ref), kind)

    def load(self, ref: PortRef, table: Table) -> Loaded:
        return self._state().load(self._find(ref), table)

    def relabel(self, ref: PortRef, columns: Columns) -> int:
        return self._state().relabel(self._find(ref), columns)

    def track(self, ref: PortRef) -> None:
        parts, instance = self._parts(), self._find(ref)
        parts.tracking.begin(instance)
        queues.widen_aside(instance, parts.switchover.aside)

    def drain(self, ref: PortRef) -> list[Table]:
        return self._parts().tracking.drain(self._find(ref))

    def untrack(self, ref: PortRef) -> None:
        instance = self._find(ref)
        instance.forget_guest()  # no switchover follows: its device may go
        self._parts().tracking.end(instance)
        queues.narrow(instance, self._parts().switchover.aside)

    def settle(self, ref: PortRef) -> Iterator[Table]:
        return self._state().settle(self._find(ref))

    def settled(self, ref: PortRef) -> None:
        instance = self._find(ref)
        self._state().settled(instance)
        queues.narrow(instance, self._parts().switchover.aside)

    def describe(self, refs: Sequence[PortRef]) -> Need:
        entries = [self._find(ref).entry for ref in refs]
        kinds = self._parts().kinds
        configured: dict[str, list[Record]] = {}
        for entry in entries:
            for name, records in kinds.used(entry).items():
                configured.setdefault(name, []).extend(records)
        versions = {**VERSIONS, ACL.name: max((ACL.version_of(entry.rules) for entry in entries), default=1)}
        return Need(
            kinds={name: number for name, number in versions.items() if _is_asked(name, configured)},
            configured=configured,
            records=[dict(entry.record) for entry in entries],
            rules_max=max((len(entry.rules) for entry in entries), default=0),
            connections=sum(entry.record["connections_max"] for entry in entries),
        )

    def remains(self) -> Mapping[str, Sequence[str]]:
        return remains(self._parts())


def _is_asked(name: str, configured: Mapping[str, Sequence[Record]]) -> bool:
    """Do ports with these configured kinds ask the kind of a destination?"""
    owner = KINDS[name].part_of or name
    return KINDS[owner].document is None or owner in configured
