"""What the agent keeps on disk: the coordinator's last word on this host, and the migrations in hand.

Files are replaced by rename and not flushed: they have to outlive the agent, and what a crash of the host takes, it
takes from the switch too. So a write costs the switchover tens of microseconds and no disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from migrator._pb import migrator_pb2 as pb
from migrator.errors import JournalFailed


class Store:
    """A directory of small files. Raises JournalFailed when it cannot be written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ends = directory / "migrations"
        try:
            self._ends.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalFailed(f"{directory}: {error.strerror}", hint="agent.state_dir has to be writable") from error

    def sync(self) -> pb.Sync:
        """What the coordinator said last, empty if it never did."""
        try:
            return pb.Sync.FromString((self._directory / "sync.pb").read_bytes())
        except FileNotFoundError:
            return pb.Sync()

    def save_sync(self, sync: pb.Sync) -> None:
        self._replace(self._directory / "sync.pb", sync.SerializeToString())

    def ends(self) -> list[dict[str, Any]]:
        """Every end of a migration that was in hand."""
        return [json.loads(path.read_text()) for path in sorted(self._ends.glob("*.json"))]

    def save_end(self, name: str, fields: dict[str, Any]) -> None:
        self._replace(self._ends / f"{name}.json", json.dumps(fields).encode())

    def forget_end(self, name: str) -> None:
        (self._ends / f"{name}.json").unlink(missing_ok=True)

    def ended(self) -> dict[str, int]:
        """VM -> highest epoch of an instance that has ended here: nothing older may begin again."""
        try:
            found: dict[str, int] = json.loads((self._directory / "ended.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def save_ended(self, ended: dict[str, int]) -> None:
        self._replace(self._directory / "ended.json", json.dumps(ended).encode())

    def _replace(self, path: Path, data: bytes) -> None:
        new = path.with_name(f".{path.name}")
        try:
            new.write_bytes(data)
            new.replace(path)
        except OSError as error:
            raise JournalFailed(f"{path}: {error.strerror}", hint="agent.state_dir has to be writable") from error
