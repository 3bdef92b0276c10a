"""Which device belongs to which port: programs go on when a device appears, come off when its port goes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from datapath.drivers.ebpf import devices, queues
from datapath.drivers.ebpf.attach import Attachments, Direction
from datapath.drivers.ebpf.devices import Link
from datapath.drivers.ebpf.instances import Instance, Instances
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.kindtable import KindTables
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.words import Words
from datapath.errors import KernelError
from datapath.provider import Event


class Plugs:
    """Of several instances that name one device the newest has it: the guest of an older one runs elsewhere."""

    def __init__(
        self,
        kernel: Kernel,
        attachments: Attachments,
        instances: Instances,
        words: Words,
        tell: Callable[[Event], None],
        kinds: KindTables,
    ) -> None:
        self._kernel, self._attachments, self._instances, self._tell = kernel, attachments, instances, tell
        self._words, self._kinds = words, kinds
        self._lock = threading.Lock()

    def plug(self, instance: Instance) -> None:
        """Connect the instance if its device is there and no newer one has it."""
        link = devices.link(instance.entry.device) if instance.entry.device else None
        if link is not None and self._instances.on(link.name) is instance:
            self._connect(instance, link)

    def restore(self, instance: Instance) -> None:
        """The agent was away: the device may be gone, or another one may have its name."""
        link = devices.link(instance.entry.device) if instance.entry.device else None
        with self._lock:
            before = self._ifindex(instance)
            if before and (link is None or link.ifindex != before):
                self._disconnect(before)
        self.plug(instance)

    def added(self, link: Link) -> None:
        """A device appeared or changed."""
        instance = self._instances.on(link.name)
        if instance is None:
            return
        before = self._ifindex(instance)
        try:
            self._connect(instance, link)
        except KernelError as error:
            if error.errno != errno.ENODEV:  # gone again: the watch tells that too
                raise
            return
        if before != link.ifindex:
            self._tell(Event("device-added", instance.ref, {"device": link.name, "ifindex": link.ifindex}))

    def removed(self, link: Link) -> None:
        """A device disappeared or was renamed."""
        with self._lock:
            owner = self._kernel.devices.get(link.ifindex)
            if owner is None or owner["role"] != C.DEVICE_PORT:
                return
            instance = self._instances.at(int(owner["slot"]))
            self._disconnect(link.ifindex)
        if instance is not None:
            self._tell(Event("device-removed", instance.ref, {"device": link.name, "ifindex": link.ifindex}))

    def unplug(self, instance: Instance) -> None:
        """The instance needs its device no more; an older one that names it gets it back."""
        with self._lock:
            ifindex = self._ifindex(instance)
            owner = self._kernel.devices.get(ifindex) if ifindex else None
            if owner is not None and owner["slot"] == instance.slot:
                self._disconnect(ifindex)
            self._kernel.ports.view["ifindex"][instance.slot] = 0

    def _connect(self, instance: Instance, link: Link) -> None:
        with self._lock:
            owner = self._kernel.devices.get(link.ifindex)
            if owner is not None and owner["slot"] not in (0, instance.slot):
                self._kernel.ports.view["ifindex"][int(owner["slot"])] = 0
            before = self._ifindex(instance)
            if before not in (0, link.ifindex):
                self._disconnect(before)
            self._kernel.devices.set(link.ifindex, (instance.slot, C.DEVICE_PORT))
            self._words.flag(instance.slot, **{"add" if link.master else "drop": C.PORT_F_BRIDGED})
            self._attachments.attach(link.ifindex, Direction.EGRESS, self._kernel.switch.program("to_port"))
            self._attachments.attach(link.ifindex, Direction.INGRESS, self._kernel.switch.program("from_port"))
            self._kernel.ports.view["ifindex"][instance.slot] = link.ifindex
        if self._arrives(instance):
            queues.widen(instance)
        if before != link.ifindex:
            self._kinds.plugged(instance)

    def _arrives(self, instance: Instance) -> bool:
        word = self._words.word(instance.slot)
        return word.state == C.PORT_STAGED and bool(word.flags & C.PORT_F_UNSETTLED)

    def _disconnect(self, ifindex: int) -> None:
        owner = self._kernel.devices.get(ifindex)
        if owner is not None and self._kernel.ports.view["ifindex"][int(owner["slot"])] == ifindex:
            self._kernel.ports.view["ifindex"][int(owner["slot"])] = 0
        for direction in Direction:
            self._attachments.detach(ifindex, direction)
        self._kernel.devices.delete(ifindex)

    def _ifindex(self, instance: Instance) -> int:
        return int(self._kernel.ports.view["ifindex"][instance.slot])
