"""What the agent keeps on disk: the coordinator's last word on this host, and the migrations in hand.

Nothing is flushed: files have to outlive the agent, and what a crash of the host takes, it takes from the switch too.
A migration's file is overwritten in place by one write, which a dying process cannot cut in two: that costs a
switchover tens of microseconds, where a rename would cost it a millisecond each time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import structlog

from migrator._pb import migrator_pb2 as pb
from migrator.errors import JournalFailed


class Store:
    """A directory of small files. Raises JournalFailed when it cannot be written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ends = directory / "migrations"
        self._log = structlog.get_logger()
        self._open: dict[str, tuple[int, int]] = {}  # descriptor and length of what was written
        try:
            self._ends.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(directory, error) from error

    def sync(self) -> pb.Sync:
        """What the coordinator said last, empty if it never did."""
        try:
            return pb.Sync.FromString((self._directory / "sync.pb").read_bytes())
        except FileNotFoundError:
            return pb.Sync()

    def save_sync(self, sync: pb.Sync) -> None:
        self._replace(self._directory / "sync.pb", sync.SerializeToString())

    def ends(self) -> list[dict[str, Any]]:
        """Every end of a migration that was in hand. What cannot be read is put aside as NAME.damaged and left out."""
        found = []
        for path in sorted(self._ends.glob("*.json")):
            data = path.read_bytes()
            fields = _fields(data)
            if fields is None:
                self._log.error("damaged, put aside", file=str(path), bytes=len(data))
                path.replace(path.with_suffix(".damaged"))
                continue
            self._open[path.stem] = (os.open(path, os.O_WRONLY | os.O_CLOEXEC), len(data))
            found.append(fields)
        return found

    def save_end(self, name: str, fields: dict[str, Any]) -> None:
        path = self._ends / f"{name}.json"
        try:
            if name not in self._open:
                self._open[name] = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), 0)
            descriptor, length = self._open[name]
            data = json.dumps(fields).encode().ljust(length)  # a shorter text covers all of a longer one
            os.pwrite(descriptor, data, 0)
            self._open[name] = (descriptor, len(data))
        except OSError as error:
            raise _unwritable(path, error) from error

    def forget_end(self, name: str) -> None:
        if name in self._open:
            os.close(self._open.pop(name)[0])
        (self._ends / f"{name}.json").unlink(missing_ok=True)

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

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
            raise _unwritable(path, error) from error


def _fields(data: bytes) -> dict[str, Any] | None:
    """The end of a migration that these bytes are; None when they are not: a crash of the host may leave anything."""
    try:
        fields = json.loads(data)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and fields.keys() >= {"id", "role", "vm", "state", "order"} else None


def _unwritable(path: Path, error: OSError) -> JournalFailed:
    return JournalFailed(f"{path}: {error.strerror}", hint="agent.state_dir has to be writable")
