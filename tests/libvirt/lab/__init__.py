# SPDX-License-Identifier: GPL-2.0-only
"""libvirt hosts with real QEMU guests on one machine: see README.md beside this file."""

from .domain import Wiring, domain_xml
from .events import Event, Events
from .guests import (
    GuestMachine,
    Move,
    NotWhole,
    add_guest,
    allow_downtime,
    last_move,
    migrate,
    still_whole,
)
from .host import HostDaemon, LibvirtHost
from .labs import LibvirtCluster, LibvirtLab

__all__ = [
    "Event",
    "Events",
    "GuestMachine",
    "HostDaemon",
    "LibvirtCluster",
    "LibvirtHost",
    "LibvirtLab",
    "Move",
    "NotWhole",
    "Wiring",
    "add_guest",
    "allow_downtime",
    "domain_xml",
    "last_move",
    "migrate",
    "still_whole",
]
