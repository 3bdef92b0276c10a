"""The agent's side of libvirt's lock driver (hooks/lock): strict mode's barrier.

libvirtd asks after it has stopped a VM's vCPUs (`release`) and before it starts them (`acquire`), with the VM locked.
The driver lets every VM pass at once that has no mark, a file beside the hook's socket; so what is not moved strictly
does not depend on the agent, and a mark without an agent tells that what was to come has not all come.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from datapath.errors import Error
from migrator.agent.libvirt.hooksocket import Reply, Request
from migrator.agent.side import AgentSide
from migrator.errors import ConfigInvalid, JournalFailed
from migrator.lifecycle.machine import Role

WAIT_S = 1.5
"""Less than the driver waits (2 s), so that the operator reads our reason."""
_NAMES = {Role.SOURCE: "leaving", Role.DESTINATION: "arriving"}


class Marks:
    """Which VMs the driver has to ask for. Several migrations may hold one mark; it goes with the last of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[Path, set[str]] = {}

    def _path(self, vm: str, role: Role) -> Path:
        return self._directory / f"{vm}.{_NAMES[role]}"

    def put(self, vm: str, role: Role, migration: str) -> None:
        """Raises JournalFailed when it cannot be written: then the driver would not ask."""
        path = self._path(vm, role)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(f"{migration}\n")
        except OSError as error:
            raise JournalFailed(f"{path}: {error.strerror}", hint="is there room?") from error
        self._held.setdefault(path, set()).add(migration)

    def take(self, vm: str, role: Role, migration: str) -> None:
        """That migration needs it no more. One that it did not put stays."""
        path = self._path(vm, role)
        held = self._held.get(path, set())
        held.discard(migration)
        if path in self._held and not held:
            del self._held[path]
            path.unlink(missing_ok=True)

    def prune(self) -> None:
        """Remove what an earlier run of the agent left and nobody has put again."""
        if self._directory.is_dir():
            for path in self._directory.iterdir():
                if path not in self._held:
                    path.unlink(missing_ok=True)


class Locking:
    """Answers the requests `acquire` and `release`. `stopped(vm)` has the agent told that its vCPUs have stopped."""

    def __init__(self, side: AgentSide, stopped: Callable[[str], None]) -> None:
        self._side = side
        self._stopped = stopped

    async def release(self, request: Request) -> Reply:
        """The vCPUs have stopped. Whatever is answered, libvirt goes on."""
        vm = _vm(request)
        self._stopped(vm)
        if await self._side.left(vm, WAIT_S):
            return {"ok": True}
        return {"ok": False, "reason": f"the destination has not committed within {WAIT_S:g} s"}

    async def acquire(self, request: Request) -> Reply:
        """The vCPUs are about to start."""
        reason = await self._side.may_start(_vm(request), WAIT_S)
        return {"ok": False, "reason": reason} if reason else {"ok": True}


def _vm(request: Request) -> str:
    """Raises ConfigInvalid."""
    try:
        return str(uuid.UUID(request.get("uuid", "")))
    except ValueError:
        raise ConfigInvalid(f"uuid: expected a uuid, not {request.get('uuid', '')[:80]!r}") from None


def guard(marks: Marks, vm: str, role: Role, migration: str, missing: Callable[[], str]) -> str:
    """Put a mark, unless the driver would not see it; returns why, "" when it does. In a thread: it reads files."""
    why = missing()
    if why:
        return why
    try:
        marks.put(vm, role, migration)
    except Error as error:
        return str(error)
    return ""
