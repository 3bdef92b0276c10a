"""Which domains of this host are ours, as libvirt has them now: for who asks once, without an agent."""

from __future__ import annotations

from dataclasses import dataclass

import libvirt

from migrator.agent.libvirt.connection import failure
from migrator.agent.libvirt.domain import parse
from migrator.errors import ConfigInvalid


@dataclass(frozen=True)
class Surveyed:
    """A domain with our metadata. `refused`: sentences, each why something of it cannot be owned."""

    uuid: str
    name: str
    running: bool
    ports: tuple[str, ...]  # MACs
    refused: tuple[str, ...]


def survey(uri: str) -> list[Surveyed]:
    """All domains that are ours, by name. Raises GuestFailed."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # it prints, beside raising
    try:
        conn = libvirt.openReadOnly(uri)
        try:
            found = [_look(domain) for domain in conn.listAllDomains(0)]
        finally:
            conn.close()
    except libvirt.libvirtError as error:
        raise failure(error) from error
    return sorted((one for one in found if one is not None), key=lambda one: one.name)


def _look(domain: libvirt.virDomain) -> Surveyed | None:
    uuid, name, running = domain.UUIDString(), domain.name(), bool(domain.isActive())
    try:
        read = parse(domain.XMLDesc(0))
    except ConfigInvalid as error:
        return Surveyed(uuid, name, running, (), (str(error),))
    if not read.ours:
        return None
    missing = tuple(f"no interface has MAC {mac}, which the metadata names" for mac in read.missing)
    return Surveyed(uuid, name, running, tuple(port.mac for port in read.ports), read.refused + missing)
