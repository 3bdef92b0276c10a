"""What libvirt's driver does by itself beside answering its agent: the composition of this package.

Once the agent is ready, the inventory keeps its ports as libvirt has its VMs, and the hook's socket is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from migrator.agent.libvirt.arrivals import Arrivals
from migrator.agent.libvirt.hooksocket import HookSocket, Reply, Request
from migrator.agent.libvirt.inventory import Inventory, listener
from migrator.agent.libvirt.live import LiveDomains
from migrator.agent.libvirt.locking import Locking
from migrator.agent.libvirt.operations import Operations
from migrator.agent.libvirt.saved import Saved
from migrator.agent.libvirt.taps import Taps
from migrator.agent.side import AgentSide
from migrator.faults import reach

if TYPE_CHECKING:
    from migrator.agent.libvirt.guests import LibvirtGuests


class Service:
    """`start`, then `stop`."""

    def __init__(self, guests: LibvirtGuests, side: AgentSide) -> None:
        options = guests.options
        self._host = side.host
        self._hooks = 0
        self._arrivals = Arrivals(side, begin_s=options.begin_wait_s, copy_s=options.copy_wait_s)
        self._inventory = Inventory(side, LiveDomains(guests), Saved(side.state_dir / "saved"))
        self._operations = Operations(
            side.host, self._inventory, Taps(side.state_dir / "taps"), self._arrivals, strict=options.strict
        )
        self._marks = guests.marks
        locking = Locking(side, guests.stopped)
        self._domains = guests.domains
        self._deaf: Callable[[], None] = lambda: None
        self._socket = HookSocket(
            options.hook_socket,
            {
                "hook": self._hook,
                "status": self._status,
                "acquire": locking.acquire,
                "release": locking.release,
            },
        )

    async def start(self) -> None:
        """Raises ConfigInvalid when the socket cannot be made."""
        self._deaf = self._domains.listen(listener(self._inventory))
        self._marks.prune()
        await self._inventory.start()
        await self._socket.start()

    async def stop(self) -> None:
        await self._socket.stop()
        self._deaf()
        await self._operations.stop()
        await self._inventory.stop()
        await self._arrivals.stop()

    async def _hook(self, request: Request) -> Reply:
        self._hooks += 1
        reach("hook", request.get("operation", ""))
        return await self._operations.answer(request)

    async def _status(self, _: Request) -> Reply:
        return {"ok": True, "host": self._host, "hooks": self._hooks}
