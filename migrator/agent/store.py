"""What the agent keeps on disk: the coordinator's last word on this host, and the migrations in hand.

Nothing is flushed: files have to outlive the agent, and what a crash of the host takes, it takes from the switch too.
A migration's file is overwritten in place by one write, which a dying process cannot cut in two: that costs a
switchover tens of microseconds, where a rename would cost it a millisecond each time. Its room is taken when the
migration begins, so that a disk that becomes full does not cut it in two either.

A file that cannot be read, for a crash of the host may leave anything, keeps no agent from starting: it is put aside as
NAME.damaged, with a warning, and the agent goes on with what the switch and the coordinator say.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import structlog
import xxhash
from google.protobuf.message import DecodeError

from migrator._pb import migrator_pb2 as pb
from migrator.agent.frames import TakenFrames
from migrator.errors import JournalFailed

T = TypeVar("T")
SYNC_MAGIC = b"sync\x00\x00\x00\x01"  # the last byte is the version
PLACES_BYTES = 1 << 20  # of changes; then all is written anew
BLOCK = 4096
_HEAD = struct.Struct("<Q8s")  # length of a change, and its digest


class Store:
    """A directory of small files. Raises JournalFailed when it cannot be written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ends = directory / "migrations"
        self._places = directory / "places.pb"
        self._log = structlog.get_logger()
        self._open: dict[str, tuple[int, int]] = {}  # descriptor and length of what was written
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # tokens of migrations, and guests' frames
            self._ends.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(directory, error) from error

    def sync(self) -> pb.Sync:
        """What the coordinator said last, empty if it never did; places as they were told since."""
        sync = self._read(self._directory / "sync.pb", _unsealed, pb.Sync())
        told = sync.revision
        nothing: list[pb.PlaceUpdate] = []
        for update in self._read(self._places, _updates, nothing):
            if update.revision > told:  # the agent may have died before it took away what a Sync made superfluous
                _follow(sync, update)
        return sync

    def save_sync(self, sync: pb.Sync) -> None:
        body = sync.SerializeToString()
        self._replace(self._directory / "sync.pb", SYNC_MAGIC + xxhash.xxh3_64_digest(body) + body)
        self._places.unlink(missing_ok=True)

    def add_places(self, update: pb.PlaceUpdate) -> None:
        """Places have changed since the last Sync: a few bytes for each change, not all of them again."""
        body = update.SerializeToString()
        try:
            with self._places.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(piece := _piece(body)) < len(piece):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _unwritable(self._places, error) from error
        if size > PLACES_BYTES:
            self.save_sync(self.sync())

    def doubt_sync(self, why: str) -> None:
        """What the coordinator said last can be read and makes no sense."""
        self._put_aside(self._directory / "sync.pb", why)

    def ends(self) -> list[dict[str, Any]]:
        """Every end of a migration that was in hand. What cannot be read is left out."""
        found = []
        for path in sorted(self._ends.glob("*.json")):
            fields = self._read(path, _fields, None)
            if fields is not None:
                self._open[path.stem] = (os.open(path, os.O_WRONLY | os.O_CLOEXEC), path.stat().st_size)
                found.append(fields)
        return found

    def doubt_end(self, name: str, why: str) -> None:
        """An end that can be read and makes no sense, as one of a later version."""
        if name in self._open:
            os.close(self._open.pop(name)[0])
        self._put_aside(self._ends / f"{name}.json", why)

    def save_end(self, name: str, fields: dict[str, Any]) -> None:
        path = self._ends / f"{name}.json"
        try:
            if name not in self._open:
                self._open[name] = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), 0)
            descriptor, length = self._open[name]
            data = json.dumps(fields).encode()
            if len(data) > length:
                length = _make_room(descriptor, length, len(data))
                self._open[name] = (descriptor, length)
            _write_all(descriptor, data.ljust(length), 0)  # a shorter text covers all of a longer one
        except OSError as error:
            raise _unwritable(path, error) from error

    def forget_end(self, name: str) -> None:
        if name in self._open:
            os.close(self._open.pop(name)[0])
        (self._ends / f"{name}.json").unlink(missing_ok=True)
        self.taken(name).forget()

    def taken(self, name: str) -> TakenFrames:
        """Frames that this end took out of its guest's queue."""
        return TakenFrames(self._ends / f"{name}.frames")

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def ended(self) -> dict[str, int]:
        """VM -> highest epoch of an instance that has ended here: nothing older may begin again."""
        return self._read(self._directory / "ended.json", _ended, {})

    def save_ended(self, ended: dict[str, int]) -> None:
        self._replace(self._directory / "ended.json", json.dumps(ended).encode())

    def _read(self, path: Path, decode: Callable[[bytes], T], missing: T) -> T:
        """What is in a file; `missing` where there is none, or none that can be read."""
        try:
            return decode(path.read_bytes())
        except FileNotFoundError:
            return missing
        except (OSError, ValueError, DecodeError) as error:
            self._put_aside(path, str(error))
            return missing

    def _put_aside(self, path: Path, why: str) -> None:
        aside = path.with_suffix(".damaged")
        self._log.warning("damaged, put aside", file=str(path), name=aside.name, why=why)
        try:
            path.replace(aside)
        except OSError as error:
            raise _unwritable(path, error) from error

    def _replace(self, path: Path, data: bytes) -> None:
        new = path.with_name(f".{path.name}")
        try:
            new.write_bytes(data)
            new.replace(path)
        except OSError as error:
            raise _unwritable(path, error) from error


def _make_room(descriptor: int, length: int, wanted: int) -> int:
    """Lengthen a file to what is wanted and more, by spaces: what is in it stays whole when that fails.

    A disk that is full later takes what needs no new blocks.
    """
    room = -(-2 * wanted // BLOCK) * BLOCK
    try:
        _write_all(descriptor, bytes(room - length).replace(b"\0", b" "), length)
    except OSError:
        os.ftruncate(descriptor, length)
        raise
    return room


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Raises OSError also when only a part was written, as on a disk that has just become full."""
    if os.pwrite(descriptor, data, offset) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _unsealed(data: bytes) -> pb.Sync:
    magic, digest, body = data[:8], data[8:16], data[16:]
    if magic != SYNC_MAGIC:
        raise ValueError("no file of this version")
    if digest != xxhash.xxh3_64_digest(body):
        raise ValueError("cut off, or changed")
    return pb.Sync.FromString(body)


def _piece(body: bytes) -> bytes:
    return _HEAD.pack(len(body), xxhash.xxh3_64_digest(body)) + body


def _updates(data: bytes) -> list[pb.PlaceUpdate]:
    """Changes of places, in order. Raises ValueError when the file does not consist of them."""
    found, start = [], 0
    while start < len(data):
        if len(data) - start < _HEAD.size:
            raise ValueError("cut off")
        length, digest = _HEAD.unpack_from(data, start)
        body = data[start + _HEAD.size : start + _HEAD.size + length]
        if len(body) != length or digest != xxhash.xxh3_64_digest(body):
            raise ValueError("cut off, or changed")
        found.append(pb.PlaceUpdate.FromString(body))
        start += _HEAD.size + length
    return found


def _follow(sync: pb.Sync, update: pb.PlaceUpdate) -> None:
    """Change the places of a Sync as an update says."""
    places = {(place.network, place.mac): place for place in sync.places}
    for place in update.removed:
        places.pop((place.network, place.mac), None)
    places.update({(place.network, place.mac): place for place in update.places})
    kept = [pb.Place.FromString(place.SerializeToString()) for place in places.values()]
    del sync.places[:]
    sync.places.extend(kept)
    sync.revision = update.revision


def _fields(data: bytes) -> dict[str, Any] | None:
    fields = json.loads(data)
    if not isinstance(fields, dict) or not fields.keys() >= {"id", "role", "vm", "state", "order"}:
        raise ValueError("no end of a migration")
    return fields


def _ended(data: bytes) -> dict[str, int]:
    found = json.loads(data)
    if not isinstance(found, dict) or not all(type(epoch) is int for epoch in found.values()):
        raise ValueError("no epochs by VM")
    return found


def _unwritable(path: Path, error: OSError) -> JournalFailed:
    return JournalFailed(f"{path}: {error.strerror}", hint="agent.state_dir has to be writable")
