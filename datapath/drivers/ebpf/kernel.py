"""Handles of the loaded switch: every map under its name in maps.h, and the calls of its control programs."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from datapath.drivers.ebpf.loader import Switch
from datapath.drivers.ebpf.maps import Handle
from datapath.errors import KernelError


class Kernel:
    """One per start; closed by `close`."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.ports = switch.mapped("ports")
        self.devices = switch.table("devices")
        self.counters = switch.table("counters")
        self.addresses = switch.table("addresses")
        self.networks = switch.table("networks")
        self.uplinks = switch.table("uplinks")
        self.vnis = switch.table("vnis")
        self.trunks = switch.table("trunks")
        self.l2 = switch.table("l2")
        self.learning = switch.table("learning")
        self.hosts = switch.table("hosts")
        self.host_index = switch.table("host_index")
        self.channels = switch.table("channels")
        self.floods = switch.outer("floods")
        self.conntracks = switch.outer("conntracks")
        self.dirty = switch.outer("dirty")
        self.policies = switch.table("policies")
        self.acl_tries = switch.outer("acl_tries")
        self.acl_lines = switch.outer("acl_lines")
        self.acl_rows = switch.outer("acl_rows")
        self.acl_rules = switch.outer("acl_rules")
        self.acl_labels = switch.outer("acl_labels")
        self.rule_hits = switch.table("rule_hits")
        self.flow_ends = switch.outer("flow_ends")
        self.flow_reports = switch.outer("flow_reports")
        self.flow_exporters = switch.table("flow_exporters")
        self.flow_lost = switch.table("flow_lost")
        self.remaps = switch.table("remaps")
        self.mirrors = switch.table("mirrors")
        self.mirror_counts = switch.table("mirror_counts")
        self.mirror_ports = switch.table("mirror_ports")
        self.mirror_cutter = switch.table("mirror_cutter")
        self.qos = switch.mapped("qos")
        self.samplings = switch.mapped("samplings")
        self.windows = switch.mapped("windows")
        self.settings = switch.table("settings")
        self.exchange = switch.mapped("exchange")
        self.exchange_lock = threading.Lock()
        self.slots = len(self.ports.view)

    def close(self) -> None:
        """Give every handle back; what is pinned goes on."""
        for handle in vars(self).values():
            if isinstance(handle, Handle):
                handle.close()
        self.switch.close()

    def set_settings(self, **fields: int) -> None:
        """Write fields of the one element of `settings`."""
        record = self.settings.get(0)
        if record is None:
            record = np.zeros((), self.settings.value)
        for name, value in fields.items():
            record[name] = value
        self.settings.set(0, record)

    def boot(self) -> int:
        """Random number that says which maps these are."""
        record = self.settings.get(0)
        return 0 if record is None else int(record["boot"])

    def context(self, structure: str, **fields: Any) -> np.ndarray[Any, np.dtype[Any]]:
        """One record of a SYSCALL program's context."""
        made = np.zeros(1, self.switch.structure(structure))
        for name, value in fields.items():
            made[name] = value
        return made

    def compare_and_swap(self, slot: int, expected: int, desired: int) -> int:
        """One cmpxchg on a port's word; returns what was there. Raises KernelError for a slot that is none."""
        context = self.context("port_swap", slot=slot, expected=expected, desired=desired)
        self.run("port_cas", context)
        return int(context["found"][0])

    def run(self, program: str, context: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Run a control program. Raises KernelError with the errno that it returned."""
        result = self.switch.call(program, context)
        if result < 0:
            raise KernelError(f"program {program} for slot {int(context['slot'][0])}", -result)
