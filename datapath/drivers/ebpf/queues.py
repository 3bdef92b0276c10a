"""Room in a guest's device for a burst: what a hold gives back comes at once, and a tap drops what it cannot queue.

The kernel drops what comes while it changes the queue of a device that has a qdisc, so that is done only before a guest
runs behind it. A device without one (`noqueue`, as libvirt makes its taps) can be changed under traffic: there the
queue goes back when the move is over, for a guest that reads nothing shall not pin so many frames for good.
"""

from __future__ import annotations

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.holds import QUEUE_LENGTH
from datapath.drivers.ebpf.instances import Instance

_WITHOUT = "noqueue"


def widen(instance: Instance, *, fresh: bool) -> None:
    """Let the instance's device queue all that a hold can. `fresh`: no guest has run behind it yet."""
    link = devices.link(instance.entry.device) if instance.entry.device else None
    if link is None or link.queue >= QUEUE_LENGTH or not (fresh or link.qdisc == _WITHOUT):
        return
    instance.queue_before = link.queue
    devices.set_queue(link, QUEUE_LENGTH)


def narrow(instance: Instance) -> None:
    """Give the device its own length again, where that costs no frame."""
    before, instance.queue_before = instance.queue_before, 0
    link = devices.link(instance.entry.device) if before else None
    if link is not None and link.qdisc == _WITHOUT:
        devices.set_queue(link, before)
