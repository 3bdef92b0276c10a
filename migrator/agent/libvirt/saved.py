"""Snapshots of VMs that libvirt saved: kept by the agent until the VM is restored, booted anew or undefined.

libvirt tells nobody into which file `virsh save` wrote the memory, and the ports' state outlives QEMU only in the
switch. So it goes into the agent's own directory, by the VM's uuid: one for each VM, the newest.
"""

from __future__ import annotations

from pathlib import Path

from migrator.errors import JournalFailed


class Saved:
    """The directory of snapshots, readable by root only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, vm: str) -> Path:
        """Where the snapshot of a VM is, or is to be. Raises JournalFailed when the directory cannot be made."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise JournalFailed(f"{self._directory}: {error.strerror}", hint="is agent.state_dir writable?") from error
        return self._directory / f"{vm}.mgs"

    def has(self, vm: str) -> bool:
        return (self._directory / f"{vm}.mgs").exists()

    def drop(self, vm: str) -> None:
        """Nobody wants it any more."""
        (self._directory / f"{vm}.mgs").unlink(missing_ok=True)

    def put_aside(self, vm: str) -> Path:
        """It cannot be used: keep it for whoever wants to know why."""
        path = self._directory / f"{vm}.mgs"
        return path.replace(path.with_suffix(".unusable"))
