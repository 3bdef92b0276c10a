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
        network or policy, MAC taken), AlreadyMigrating, PeerLost (no coordinator: declare again when it is back).
        """

    async def withdraw(self, vm: str) -> None:
        """The VM is no more here: its ports and their state go. Nothing when it has moved on. Raises PeerLost."""

    def bring(self, vm: str) -> AsyncIterator[pb.Migration]:
        """Have the state of a VM follow a move to this host that the hypervisor makes: the migration's reports.

        Joins the migration when it is in hand already. Raises what MigrateRequest does: PreflightFailed with reasons.
        """

    async def call_off(self, vm: str, reason: str) -> None:
        """Its guest will not come: have the coordinator end the migration of the VM to this host. Raises PeerLost.

        Nothing when there is none, or when the guest has come.
        """

    def arriving(self, vm: str) -> str:
        """How far a migration of the VM to this host is: the destination's phase, "" when there is none."""

    def leaving(self, vm: str) -> str:
        """How far a migration of the VM from this host is: the source's phase, "" when there is none."""

    def statuses(self) -> AsyncIterator[pb.PortStatus]:
        """All port instances of this host's switch."""

    async def checkpoint(self, vm: str, path: Path) -> None:
        """Write a snapshot of the VM's ports, as a whole or not at all. Raises PortNotFound."""

    async def restore(self, vm: str, path: Path) -> dict[str, int]:
        """Load a snapshot into the VM's ports here; returns records by kind. Raises Corrupt, AlreadyMigrating."""
