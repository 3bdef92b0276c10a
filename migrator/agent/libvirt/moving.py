"""What is asked of one domain for its move to another host. Functions here wait for libvirt: call them in a thread."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import libvirt
import structlog

from migrator.agent.guests.word import BY_DEFAULT, MoveOptions
from migrator.agent.libvirt import memory
from migrator.agent.libvirt.domain import read_xml
from migrator.agent.libvirt.memory import Aim
from migrator.agent.libvirt.metadata import AS_CONFIGURED, ELEMENT, Lead, read_metadata
from migrator.agent.libvirt.options import LibvirtOptions
from migrator.errors import ConfigInvalid

QEMU_LIMIT_MS = 300  # as QEMU has it
EMULATED = "qemu"  # <domain type>

Domain = Any
"""libvirt.virDomain, which has no types."""


@dataclass(frozen=True)
class Tuned:
    """What was found when a move began. `limit_ms`: how long QEMU might have stopped the guest by itself."""

    own: Lead = AS_CONFIGURED
    limit_ms: int = QEMU_LIMIT_MS
    emulated: bool = False

    def aim(self, configured: Aim, order_ms: int = 0) -> Aim:
        return memory.aim_of(configured, self.own, order_ms=order_ms, qemu_ms=self.limit_ms, emulated=self.emulated)


def tune(domain: Domain, configured: Aim) -> Tuned:
    """Read how this VM is to be led, and keep QEMU from stopping it first."""
    root = read_xml(domain.XMLDesc())
    element = root.find(f"metadata/{ELEMENT}")
    own = AS_CONFIGURED
    if element is not None:
        with contextlib.suppress(ConfigInvalid):  # the ports' keeper has said so; the VM moves as it is configured
            own = read_metadata(domain.name(), element).lead
    tuned = Tuned(own, _limit(domain), root.get("type") == EMULATED)
    limit = tuned.aim(configured).limit_ms
    if limit is not None:
        try:
            domain.migrateSetMaxDowntime(limit)
        except libvirt.libvirtError as error:  # then QEMU may stop it first, and the agent follows
            structlog.get_logger().warning("QEMU's limit stays as it is", vm=domain.UUIDString(), error=str(error))
    return tuned


def _limit(domain: Domain) -> int:
    try:
        return int(domain.migrateGetMaxDowntime()) or QEMU_LIMIT_MS
    except libvirt.libvirtError:
        return QEMU_LIMIT_MS


COPY_STORAGE = {"": 0, "all": libvirt.VIR_MIGRATE_NON_SHARED_DISK, "inc": libvirt.VIR_MIGRATE_NON_SHARED_INC}


def migrate(domain: Domain, options: LibvirtOptions, to: str, order: MoveOptions = BY_DEFAULT) -> None:
    """Have libvirtd here move the domain to `to`; returns when it has. Raises libvirtError.

    What the order does not say is as configured.
    """
    defined = bool(domain.isPersistent())
    tunnelled = _either(order.tunnelled, options.tunnelled)
    wanted = {
        libvirt.VIR_MIGRATE_PERSIST_DEST: _either(order.persistent, defined),
        libvirt.VIR_MIGRATE_UNDEFINE_SOURCE: _either(order.undefine, defined),
        libvirt.VIR_MIGRATE_POSTCOPY: _either(order.postcopy, options.postcopy),
        libvirt.VIR_MIGRATE_TUNNELLED: tunnelled,
    }
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | COPY_STORAGE[order.copy_storage]
    flags |= sum(flag for flag, on in wanted.items() if on)
    data_uri = "" if tunnelled else order.data_uri or options.data_uri_of(to)
    bandwidth = order.bandwidth_mib_s or options.bandwidth_mib_s
    parameters: dict[str, Any] = {libvirt.VIR_MIGRATE_PARAM_URI: data_uri} if data_uri else {}
    if bandwidth:
        parameters[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = bandwidth
    domain.migrateToURI3(order.uri or options.uri_of(to), parameters, flags)


def _either(ordered: bool | None, configured: bool) -> bool:
    return configured if ordered is None else ordered


@dataclass(frozen=True)
class Still:
    """A domain that is here. `over`: no move of it is in hand. `stopped`: it can be started again here."""

    over: bool
    running: bool
    stopped: bool


def still(domain: Domain) -> Still:
    """How a domain is whose move was to end. Raises libvirtError when it is not here."""
    over = not memory.ending(domain.jobStats())
    state, reason = domain.state()
    elsewhere = {libvirt.VIR_DOMAIN_PAUSED_POSTCOPY, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED}
    paused = state == libvirt.VIR_DOMAIN_PAUSED and reason not in elsewhere
    return Still(over, state in {libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED}, paused)
