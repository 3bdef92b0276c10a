"""What libvirt says of the domains of this host, for `migrator.agent.libvirt.inventory`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import libvirt

from migrator.agent.libvirt.connection import Libvirt
from migrator.lifecycle.machine import Guest

if TYPE_CHECKING:
    from migrator.agent.libvirt.guests import LibvirtGuests


class LiveDomains:
    """Implements `inventory.Domains`. Where guests run `guests` has heard; the rest is asked. Raises GuestFailed."""

    def __init__(self, guests: LibvirtGuests) -> None:
        self._guests = guests

    def running(self) -> Iterable[str] | None:
        """See Domains."""
        if not self._guests.speaks:
            return None
        return {vm for vm, state in self._guests.states().items() if state is not Guest.GONE}

    async def xml(self, vm: str) -> str:
        """See Domains."""
        return await self._guests.connection.call(lambda conn: _xml(conn, vm))

    async def kept(self, vm: str) -> bool:
        """See Domains."""
        return await self._guests.connection.call(lambda conn: _kept(conn, vm))


def _xml(conn: Libvirt, vm: str) -> str:
    try:
        domain = conn.lookupByUUIDString(vm)
        return str(domain.XMLDesc(0)) if domain.isActive() else ""
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return ""
        raise


def _kept(conn: Libvirt, vm: str) -> bool:
    try:
        return bool(conn.lookupByUUIDString(vm).hasManagedSaveImage(0))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return False
        raise
