"""A running switch: all parts of the driver, put together on the loaded programs, and what an earlier run left."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from datapath.drivers.ebpf import bpffs, loader, takeover
from datapath.drivers.ebpf.attach import Attachments, attachments, program_of
from datapath.drivers.ebpf.configured import TABLES
from datapath.drivers.ebpf.connections import Connections
from datapath.drivers.ebpf.counters import Counters
from datapath.drivers.ebpf.devices import Link, Watch
from datapath.drivers.ebpf.events import Reader
from datapath.drivers.ebpf.fdb import Fdb
from datapath.drivers.ebpf.floods import Floods
from datapath.drivers.ebpf.holding import Holds
from datapath.drivers.ebpf.hosts import Hosts
from datapath.drivers.ebpf.instances import Instance, Instances
from datapath.drivers.ebpf.keeper import Keeper
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.kindtable import KindTables
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.ledger import Ledger, PortEntry
from datapath.drivers.ebpf.loader import Sizes
from datapath.drivers.ebpf.networks import Networks
from datapath.drivers.ebpf.options import Options
from datapath.drivers.ebpf.pathprobe import PathProbe
from datapath.drivers.ebpf.places import Places
from datapath.drivers.ebpf.plugs import Plugs
from datapath.drivers.ebpf.policies import Policies
from datapath.drivers.ebpf.reports import Reports
from datapath.drivers.ebpf.staging import Staging
from datapath.drivers.ebpf.sweeper import Sweeper
from datapath.drivers.ebpf.switchover import Switchover
from datapath.drivers.ebpf.tracking import Tracking
from datapath.drivers.ebpf.underlay import Underlay
from datapath.drivers.ebpf.uplinks import Uplinks
from datapath.drivers.ebpf.words import Words
from datapath.errors import DatapathError, NotReady
from datapath.provider import Event

_log = logging.getLogger(__name__)


class Running:
    """Made by start, ended by stop or destroy."""

    def __init__(self, options: Options, tell: Callable[[Event], None]) -> None:
        """Loads the programs; nothing of an earlier run is touched before `begin`."""
        self.options, self.tell = options, tell
        self.bpffs = Path(options.bpffs) if options.bpffs else None
        self.pins = bpffs.pins(options.instance, self.bpffs)
        self.ledger = Ledger(options.state)
        sizes = Sizes(options.slots, options.networks, options.hosts, options.l2)
        self.differences = loader.differences(self.pins, sizes)
        self.kernel = Kernel(self._loaded(sizes))
        with contextlib.ExitStack() as undo:
            undo.callback(self.kernel.close)
            self.attachments: Attachments = attachments(self.pins.links, options.instance)
            undo.callback(self.attachments.close)
            self._make_tables()
            self._make_ports()
            undo.pop_all()

    def _loaded(self, sizes: Sizes) -> loader.Switch:
        """On the maps that are here; when these are of another layout, on maps of their own beside them."""
        if not self.differences:
            return loader.load(self.pins, sizes)
        following = self.pins.of(bpffs.NEXT)
        following.make()
        try:
            return loader.load(following, sizes)
        except BaseException:
            self.pins.mend()
            raise

    def _make_tables(self) -> None:
        kernel, ledger = self.kernel, self.ledger
        self.words = Words(kernel.ports, kernel.compare_and_swap)
        self.instances = Instances(kernel.slots)
        self.underlay = Underlay(kernel, self.attachments, self.options)
        self.uplinks = Uplinks(kernel, self.attachments, self.options.uplinks)
        self.hosts = Hosts(kernel.hosts, kernel.host_index, ledger)
        self.floods = Floods(kernel.floods)
        self.networks = Networks(kernel, ledger, self.uplinks, self.floods, self.peers, self.underlay.room)
        self.places = Places(kernel, self.networks, self.hosts, self.underlay.address, self.is_gone)
        self.fdb = Fdb(kernel, self.networks, self.places, ledger)
        self.connections = Connections(kernel, self.words)
        self.policies = Policies(kernel)
        self.counters = Counters(kernel, self.words)
        self.kinds = KindTables((table(self) for table in TABLES), ledger)
        self.tracking = Tracking(kernel, self.words, self.connections, self.fdb, self.kinds)

    def _make_ports(self) -> None:
        kernel, options = self.kernel, self.options
        self.keeper = Keeper(options.state / "keeper.sock") if options.keeper else None
        self.holds = Holds(kernel, self.attachments, options.tap_prefix, self.keeper)
        self.plugs = Plugs(kernel, self.attachments, self.instances, self.words, self.tell, self.kinds)
        self.staging = Staging(self)
        self.switchover = Switchover(kernel, self.words, self.fdb, self.places, self.hosts, self.holds, self.ledger)
        self.probe = PathProbe(self.underlay.address, options.tunnel_port, kernel.channels)
        self.reports = Reports(self.instances, self.probe, self.tell)
        self.sweeper = Sweeper(
            kernel,
            self.words,
            self.ledger,
            self.instances,
            self.networks,
            self.holds,
            self.tell,
            options.sweep_interval_s,
        )
        self.watch = Watch(self.device_added, self.device_removed)
        self.reader = Reader(kernel.switch.map_fd("events"), self.reports.deliver)

    # ---- what parts ask of each other ----

    def peers(self) -> list[int]:
        """Indexes of all other hosts."""
        return [index for index, address in self.hosts.names().values() if address != self.underlay.address]

    def is_gone(self, slot: int) -> bool:
        """No port is in the slot: nothing that comes for its MACs can be passed on by it."""
        return self.words.word(slot).state == C.PORT_FREE

    def device_added(self, link: Link) -> None:
        """From the watch's thread."""
        with self._logged(f"device {link.name} appeared"):
            if link.name in self.uplinks.names and self.uplinks.ifindex(link.name) not in (0, link.ifindex):
                self.networks.uplink_changed(link.name)
            self.plugs.added(link)
            self.kinds.changed()

    def device_removed(self, link: Link) -> None:
        """From the watch's thread."""
        with self._logged(f"device {link.name} disappeared"):
            self.plugs.removed(link)
            self.kinds.changed()

    @contextlib.contextmanager
    def _logged(self, what: str) -> Iterator[None]:
        """Nobody is there to be told by an exception."""
        try:
            yield
        except DatapathError:
            _log.exception("%s: the switch could not follow", what)

    # ---- begin ----

    def begin(self) -> None:
        """Take over what an earlier run left, then start the threads. If it raises, call nothing more."""
        try:
            self._take_over()
            self.underlay.start()
            self.hosts.restore()
            self.networks.restore()
            self._restore_ports()
            self.ledger.save_boot(self.kernel.boot())
        except BaseException:
            self.stop()
            raise
        self.watch.start()
        self.reader.start()
        self.kinds.start()
        self.sweeper.start()

    def _take_over(self) -> None:
        """From here every hook point runs these programs, on maps with these layouts."""
        if self.differences:
            takeover.carry_out(self, self.differences)
        elif self.pins.turned():
            takeover.resume(self)
        else:
            self.replace_programs()

    def replace_programs(self) -> None:
        """At all hook points, one after the other; versions that share maps understand each other meanwhile."""
        roles = {int(k): int(v["role"]) for k, v in zip(*self.kernel.devices.read(), strict=True)}
        for one in self.attachments.attached():
            name = program_of(roles.get(one.ifindex, 0), one.direction)
            if name:
                self.attachments.attach(one.ifindex, one.direction, self.kernel.switch.program(name))

    def _restore_ports(self) -> None:
        rebooted = self.ledger.boot() != self.kernel.boot()
        entries = self.ledger.ports()
        for entry in entries:
            self.instances.claim(entry.slot)
        alive = [entry for entry in entries if self._is_alive(entry)]
        self.policies.restore([(entry.slot, entry.rules) for entry in alive if entry.state != "stub"])
        adopted = [self._adopt(entry) for entry in alive]
        for instance in adopted:  # all are known: an older one of the VM may name a device that is a newer one's
            self.plugs.restore(instance)
        for entry in entries:
            if entry in alive:
                continue
            if rebooted and entry.state != "stub":
                self._make_anew(entry)
            else:
                self.staging.wipe(entry.slot)
        self._free_strangers()

    def _is_alive(self, entry: PortEntry) -> bool:
        word = self.words.word(entry.slot)
        return word.state != C.PORT_FREE and word.epoch == entry.ref.epoch

    def _adopt(self, entry: PortEntry) -> Instance:
        table = self.kernel.conntracks.inner(entry.slot) or self.kernel.conntracks.new(1)  # a stub has none
        instance = Instance(entry, table, *self.holds.take_over(entry.slot))
        self.kernel.ports.view["hold_to"][entry.slot] = instance.hold_to.ifindex
        self.kernel.ports.view["hold_from"][entry.slot] = instance.hold_from.ifindex
        instance.hold_began = self.holds.overflowed(instance)
        self.tracking.restore(instance)
        self.instances.add(instance)
        if entry.state != "stub":
            self.kinds.applied(instance)
        if entry.state == "active" and self.words.word(entry.slot).state == C.PORT_STAGED:
            self.staging.go_on(instance, entry.ref.epoch, held=False)
        elif self.words.running(entry.slot) and self.words.gate(entry.slot) == (C.GATE_LOCAL, False):
            self._pass_on(instance)
        return instance

    def _pass_on(self, instance: Instance) -> None:
        """An agent that opened the port died before all that waited had passed; what does not pass keeps no agent."""
        for pump in (self.holds.pump_from, self.holds.pump_to):
            try:
                pump(instance)
            except NotReady as error:
                _log.warning("%s", error)

    def _make_anew(self, entry: PortEntry) -> None:
        """The host was rebooted: the port as configured, its tables empty."""
        instance = self.staging.make(entry)
        if entry.state == "active":
            self.switchover.open(instance, broadcast=True)
        elif entry.state == "quiesced":
            self.words.change(entry.slot, entry.ref.epoch, (C.PORT_STAGED,), C.PORT_QUIESCED)

    def _free_strangers(self) -> None:
        """Slots in use that the ledger does not know: nobody can name such a port."""
        used = np.flatnonzero(self.kernel.ports.view["word"] & np.uint64(0xFF)).tolist()
        for slot in used:
            if slot and self.instances.at(slot) is None:
                _log.warning("slot %d is in use and not in the ledger: freed", slot)
                self.staging.wipe(slot)

    # ---- end ----

    def stop(self) -> None:
        """Let go; the switch goes on."""
        self.sweeper.stop()
        self.kinds.stop()
        self.watch.stop()
        try:
            self.reader.stop()
        finally:
            self._close()

    def _close(self) -> None:
        self.ledger.flush()
        self.kinds.close()
        for instance in self.instances:
            for handle in (instance.table, instance.dirty, instance.hold_to, instance.hold_from):
                if handle is not None:
                    handle.close()
        self.holds.close()
        self.attachments.close()
        self.kernel.close()

    def destroy(self) -> None:
        """Take all of it off the host."""
        self.sweeper.stop()
        self.kinds.stop()
        self.watch.stop()
        self.reader.stop()
        for instance in list(self.instances):
            self.staging.purge(instance)
        self.kinds.destroy()
        self.uplinks.detach()
        self.underlay.destroy()
        self.holds.destroy()
        self._close()
        self.pins.clear()
        if self.bpffs is not None:
            bpffs.unmount(self.bpffs)
        self.ledger.destroy()
