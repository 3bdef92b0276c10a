"""Room in a guest's device for a burst: what a hold gives back comes at once, and a tap drops what it cannot queue.

The kernel drops what comes while it changes the queue of a device: now and then a frame where the device has no qdisc
(`noqueue`, as libvirt makes its taps), all that waits where it has one. So with a qdisc that is done only before a
guest runs behind it. Without, the queue is changed `aside`, while frames wait in the port's hold, and goes back when
the move is over, for a guest that reads nothing shall not pin so many frames for good.
"""

from __future__ import annotations

from collections.abc import Callable

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.holds import QUEUE_LENGTH
from datapath.drivers.ebpf.instances import Instance

Aside = Callable[[Instance, Callable[[], None]], None]
"""Makes a change while nothing comes to the instance's device."""
_WITHOUT = "noqueue"


def widen(instance: Instance) -> None:
    """Let the instance's device, behind which no guest has run yet, queue all that a hold can."""
    link = _narrow(instance)
    if link is not None:
        instance.queue_before = link.queue
        devices.set_queue(link, QUEUE_LENGTH)


def widen_aside(instance: Instance, aside: Aside) -> None:
    """The same of a device under traffic, where that costs no frame."""
    link = _narrow(instance)
    if link is not None and link.qdisc == _WITHOUT:
        instance.queue_before = link.queue
        aside(instance, lambda: devices.set_queue(link, QUEUE_LENGTH))


def narrow(instance: Instance, aside: Aside) -> None:
    """Give the device its own length again, where that costs no frame."""
    before, instance.queue_before = instance.queue_before, 0
    link = devices.link(instance.entry.device) if before else None
    if link is not None and link.qdisc == _WITHOUT:
        aside(instance, lambda: devices.set_queue(link, before))


def _narrow(instance: Instance) -> devices.Link | None:
    """The instance's device if it can queue less than a hold."""
    link = devices.link(instance.entry.device) if instance.entry.device else None
    return link if link is not None and link.queue < QUEUE_LENGTH else None
