"""What a hypervisor's driver may ask of the agent that it belongs to. `migrator.agent.daemon` implements it.

A driver that only says where guests run needs none of this. One that learns of VMs by itself (libvirt: hooks, events,
domain XML) declares their ports, and has the state of a VM follow a move that somebody else ordered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

from migrator._pb import migrator_pb2 as pb


class AgentSide(Protocol):
    """The agent, seen from its hypervisor's driver. All calls are made in the agent's event loop."""

    @property
    def host(self) -> str: ...

    @property
    def state_dir(self) -> Path:
        """Where the agent keeps what must outlive it; the driver may make files of its own there."""

    async def declare(self, vm: str, ports: Sequence[pb.Port]) -> list[str]:
        """These are the VM's ports, here; returns the coordinator's warnings. Idempotent.

        A VM that the coordinator knows elsewhere comes here if nothing of it runs there. Raises ConfigInvalid (no such
        network or policy, MAC taken), PreflightFailed (it runs elsewhere), AlreadyMigrating, PeerLost (no coordinator:
        declare again when it is back).
        """

    async def withdraw(self, vm: str) -> None:
        """The VM is no more here: its ports and their state go. Nothing when it has moved on. Raises PeerLost."""

    def bring(self, vm: str, *, strict: bool = False) -> AsyncIterator[pb.Migration]:
        """Have the state of a VM follow a move to this host that the hypervisor makes: the migration's reports.

        Joins the migration when it is in hand already, but not one that is less strict than asked. Raises what
        MigrateRequest does: PreflightFailed with reasons.
        """

    async def call_off(self, vm: str, reason: str) -> None:
        """Its guest will not come: have the coordinator end the migration of the VM to this host. Raises PeerLost.

        Nothing when there is none, or when the guest has come.
        """

    def arriving(self, vm: str) -> str:
        """How far a migration of the VM to this host is: the destination's phase, "" when there is none."""

    def leaving(self, vm: str) -> str:
        """How far a migration of the VM from this host is: the source's phase, "" when there is none."""

    async def left(self, vm: str, seconds: float) -> bool:
        """The hypervisor has stopped a VM, which was told, and waits: True when it may go on.

        That is when the destination of its strict migration has committed, or the migration was given up; at once when
        there is none.
        """

    async def may_start(self, vm: str, seconds: float) -> str:
        """The hypervisor is about to start a VM here, and waits: why it must not, "" when it may.

        At the destination of a strict migration that is when all of its state is committed; at the source the ports
        are active when this returns, at the latest after `seconds`. At once when there is no such migration.
        """

    def statuses(self) -> AsyncIterator[pb.PortStatus]:
        """All port instances of this host's switch."""

    async def checkpoint(self, vm: str, path: Path) -> None:
        """Write a snapshot of the VM's ports, as a whole or not at all. Raises PortNotFound."""

    async def restore(self, vm: str, path: Path) -> dict[str, int]:
        """Load a snapshot into the VM's ports here; returns records by kind. Raises Corrupt, AlreadyMigrating."""
