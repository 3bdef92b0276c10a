"""This host as the coordinator wants it: networks, hosts, places, ports. Makes the switch so, or says what is not.

Ports that the switch has and the coordinator does not name are left alone: they are reported, and their end is ordered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from datapath.errors import Error, NotReady
from datapath.provider import Driver, PortRef, PortState, PortStatus
from datapath.registry import KINDS
from migrator._pb import migrator_pb2 as pb
from migrator.agent import orders
from migrator.agent.end import Surroundings
from migrator.agent.store import Store
from migrator.errors import AlreadyMigrating, JournalFailed

Changed = Callable[[PortRef, int, Callable[[], None]], None]
"""Instance, revision of the configuration that it has now, and how to make it so again. Called in the VM's lane."""

CHANGEABLE = frozenset({PortState.STAGED, PortState.ACTIVE, PortState.QUIESCED})


class HostConfig:
    """`in_hand(vm)`: a migration of the VM is under way here, so its new instances are that one's business.

    `taking_part(ref)`: an instance takes part in one. `changed` hears of every order that was carried out.
    """

    def __init__(
        self,
        host: str,
        driver: Driver,
        around: Surroundings,
        store: Store,
        in_hand: Callable[[str], bool],
        taking_part: Callable[[PortRef], bool],
        changed: Changed,
    ) -> None:
        self._host = host
        self._driver = driver
        self._around = around
        self._store = store
        self._in_hand = in_hand
        self._taking_part = taking_part
        self._changed = changed
        self._lock = asyncio.Lock()
        self._networks: dict[str, pb.Network] = {}
        self._places: dict[tuple[str, str], str] = {}
        self._unset: dict[tuple[str, str], pb.Place] = {}
        self._place_revision = 0
        self._ended = store.ended()
        self._log = structlog.get_logger()

    async def recall(self) -> None:
        """What the coordinator said last, for a start without it. Ports are in the switch's own books."""
        sync = self._store.sync()
        sync.ClearField("ports")
        async with self._lock:
            try:
                problems = await asyncio.to_thread(self._common, sync)
            except ValueError as error:  # of another version, perhaps: the coordinator says all of it again
                self._store.doubt_sync(str(error))
                problems = []
        for problem in problems:
            self._log.warning("not as configured", problem=problem)

    async def sync(self, sync: pb.Sync) -> list[str]:
        """Make all of it so; returns what could not be, each a sentence."""
        async with self._lock:
            problems = self._keep(sync)
            problems += await asyncio.to_thread(self._common, sync)
            self._place_revision = max(self._place_revision, sync.revision)
            present = _by_port(await asyncio.to_thread(self._driver.ports))
            for order in sync.ports:
                problems += await self._try(order, present)
        return problems

    def _keep(self, sync: pb.Sync) -> list[str]:
        """For a start without the coordinator, which does not say it again: a full disk keeps nothing else from it."""
        try:
            self._store.save_sync(sync)
        except JournalFailed as error:
            return [f"not kept for the next start: {error}"]
        return []

    async def port(self, order: pb.PortOrder) -> None:
        """Make one port so. Raises what the driver does."""
        async with self._lock:
            present = _by_port(await asyncio.to_thread(self._driver.ports, order.port.vm))
            await self._around.call(order.port.vm, self._ensure, order, present)

    async def remove(self, removal: pb.PortRemoval) -> None:
        """Delete a port instance; what an earlier move left of the VM, a redirect, lives on.

        Raises AlreadyMigrating while the instance itself takes part in a migration: the coordinator asks again.
        """
        ref = PortRef(removal.vm, removal.mac, removal.epoch)
        if self._taking_part(ref):
            raise AlreadyMigrating(f"VM {removal.vm} is being moved", hint="wait, or abort the migration first")
        async with self._lock:
            await self._around.call(removal.vm, self._driver.purge, ref)
            self.note_ended(f"{removal.vm}/{removal.mac}", removal.epoch)  # the VM's other ports live on

    async def places(self, update: pb.PlaceUpdate) -> None:
        """Raises NotReady for places that cannot be set (yet); all others are, and they are tried again when told."""
        async with self._lock:
            problems = await asyncio.to_thread(self._change_places, update.places, update.removed)
            self._place_revision = max(self._place_revision, update.revision)
            self._store.add_places(update)
        if problems:
            raise NotReady("; ".join(problems), hint="a network or host that is not known yet comes with the next Sync")

    def places_known(self) -> pb.PlacesKnown:
        """How far the coordinator has been followed, and what of it this host does not have."""
        return pb.PlacesKnown(revision=self._place_revision, unset=self._unset.values())

    async def retry_places(self) -> bool:
        """Try again what could not be set; True when some of it is set now."""
        if not self._unset:
            return False
        async with self._lock:
            before = len(self._unset)
            await asyncio.to_thread(self._change_places, list(self._unset.values()), ())
            return len(self._unset) < before

    def note_ended(self, whose: str, epoch: int) -> None:
        """Instances of this epoch, of a VM or of one port (VM/MAC), have ended here: orders for them come too late."""
        if epoch > self._ended.get(whose, -1):
            self._ended[whose] = epoch
            self._store.save_ended(self._ended)

    def _has_ended(self, ref: PortRef) -> bool:
        return any(ref.epoch <= self._ended.get(whose, -1) for whose in (ref.vm, f"{ref.vm}/{ref.mac}"))

    def mtu(self, network: str) -> int:
        """Bytes of an IP packet that the network carries; 1500 where nothing is said."""
        found = self._networks.get(network)
        return (found.mtu if found else 0) or 1500

    # ---- in threads ----

    def _common(self, sync: pb.Sync) -> list[str]:
        problems = []
        for network in sync.networks:
            try:
                self._driver.set_network(orders.network(network))
            except Error as error:
                problems.append(f"network {network.name}: {error}")
        wanted = {network.name: network for network in sync.networks}
        for gone in [name for name in self._networks if name not in wanted]:
            try:
                self._driver.remove_network(gone)
            except NotReady as error:
                problems.append(f"network {gone}: {error}")
        self._networks = wanted
        self._driver.set_hosts(dict(sync.hosts))
        named = {(place.network, place.mac) for place in sync.places}
        gone_places = [pb.Place(network=n, mac=m) for n, m in {*self._places, *self._unset} if (n, m) not in named]
        return problems + self._change_places(sync.places, gone_places)

    def _change_places(self, places: Iterable[pb.Place], removed: Iterable[pb.Place]) -> list[str]:
        """What could not be set counts as not told: the next word of it is no repetition."""
        problems = []
        for place in removed:
            self._places.pop((place.network, place.mac), None)
            self._unset.pop((place.network, place.mac), None)
            self._driver.remove_place(place.network, place.mac)
        for place in places:
            key = (place.network, place.mac)
            if self._places.get(key) == place.host:
                self._unset.pop(key, None)
                continue
            try:
                if place.host != self._host:  # what is here the port says, when it opens
                    self._driver.set_place(orders.place(place))
            except Error as error:
                self._places.pop(key, None)
                self._unset[key] = place
                problems.append(f"place {place.network}/{place.mac}: {error}")
            else:
                self._places[key] = place.host
                self._unset.pop(key, None)
        return problems

    async def _try(self, order: pb.PortOrder, present: dict[tuple[str, str], list[PortStatus]]) -> list[str]:
        try:
            await self._around.call(order.port.vm, self._ensure, order, present)
        except Error as error:
            return [f"port {order.port.vm}/{order.port.mac}: {error}"]
        return []

    def _ensure(self, order: pb.PortOrder, present: dict[tuple[str, str], list[PortStatus]]) -> None:
        ref = orders.ref(order)
        here = present.get((ref.vm, ref.mac), [])
        same = next((status for status in here if status.ref == ref), None)
        if same is not None:
            self._change(order, same)
        elif self._in_hand(ref.vm) or self._has_ended(ref):
            self._log.info("order comes too late", vm=ref.vm, mac=ref.mac, epoch=ref.epoch)
        elif any(status.state is not PortState.STUB for status in here):
            epochs = sorted(status.ref.epoch for status in here)
            raise NotReady(f"instances of epochs {epochs} are here, the order is for {ref.epoch}")
        elif order.port.host == self._host:
            self._make(order, ref)

    def _change(self, order: pb.PortOrder, status: PortStatus) -> None:
        if status.state not in CHANGEABLE:
            return
        record = orders.port_record(order, self.mtu(order.port.network))
        if status.record.get("revision", 0) <= order.revision and status.record != record:
            self._driver.update(status.ref, record)
        self._set_rules(order, status.ref)
        problems = self._set_kinds(order, status.ref)
        self._changed(status.ref, order.revision, lambda: self._change(order, self._driver.port(status.ref)))
        if not self._in_hand(status.ref.vm):
            self._take_up(status)
        _tell(problems)

    def _take_up(self, status: PortStatus) -> None:
        """No migration will open the port: what an earlier run of the agent, or of the host, left unfinished."""
        if status.state is PortState.STAGED:
            self._driver.open(status.ref)
        elif status.state is PortState.QUIESCED:  # rolled back, and the host crashed before that was written down
            self._driver.resume(status.ref)

    def _set_rules(self, order: pb.PortOrder, ref: PortRef) -> None:
        present = [dict(record) for table in self._driver.dump(ref, "acl") for record in table.records or ()]
        if orders.same_rules(order, present):
            return
        self._driver.load(ref, orders.rules(order))
        withdrawn = orders.withdrawn(order, present)
        if withdrawn is not None:
            self._driver.load(ref, withdrawn)

    def _set_kinds(self, order: pb.PortOrder, ref: PortRef) -> list[str]:
        """Kinds of state that are declared at the port. What cannot be set is told: the port goes on without it."""
        held, problems = self._driver.kinds(), []
        for kind in (kind for kind in KINDS.values() if kind.document is not None and kind.name in held):
            present = (record for table in self._driver.dump(ref, kind.name) for record in table.records or ())
            try:
                for table in orders.kind_changes(order, kind, present):
                    self._driver.load(ref, table)
            except Error as error:
                problems.append(f"{kind.name}: {error}")
        return problems + [f"{name}: this switch holds no such state" for name in order.port.kinds if name not in held]

    def _make(self, order: pb.PortOrder, ref: PortRef) -> None:
        """A new VM: nothing is known of it, so it opens at once."""
        self._driver.stage(ref, orders.port_record(order, self.mtu(order.port.network)), order.device)
        try:
            self._driver.load(ref, orders.rules(order))
            problems = self._set_kinds(order, ref)
            self._driver.open(ref)
        except Error:
            self._driver.purge(ref)
            raise
        self._log.info("port opened", vm=ref.vm, mac=ref.mac, epoch=ref.epoch, device=order.device)
        _tell(problems)


def _tell(problems: list[str]) -> None:
    if problems:
        raise NotReady("; ".join(problems), hint="the port passes frames; what is named is not in force")


def _by_port(statuses: Iterable[PortStatus]) -> dict[tuple[str, str], list[PortStatus]]:
    found: dict[tuple[str, str], list[PortStatus]] = {}
    for status in statuses:
        found.setdefault((status.ref.vm, status.ref.mac), []).append(status)
    return found
