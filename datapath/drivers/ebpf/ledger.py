"""What the kernel's maps cannot tell after a restart of the agent: which port instance a slot is, and names of indexes.

JSON files in `state_dir`: SLOT.json, SLOT.rules.json, SLOT.kinds.json and SLOT.carried.json for a port, one for
networks, one for hosts.
A file is replaced by rename, so a crash leaves the old or the new one; a change of few among many records is a line
behind it, in SLOT.kinds.log. The maps are the truth for everything that programs change: states, gates, clocks, tables.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.errors import KernelError
from datapath.provider import Network, NetworkKind, PortRef
from datapath.state.kind import Kind, Record

_PARTS = ("rules", "carried", "kinds")
_WRITABLE = "the driver's state_dir has to be writable"
_LOGGED_FROM = 256  # records of a kind: fewer are written anew each time
_LOG_MAX = 1 << 18  # bytes; then the whole is written, and the log begins anew

Key = tuple[Any, ...]


@dataclass(frozen=True)
class PortEntry:
    """One port instance as configured here.

    `carried` holds what hosts before counted: {"counters": {name: count}, "hits": {rule id: [packets, bytes]},
    "ended": {connection id as text: [packets_from, packets_to, bytes_from, bytes_to]}}.
    """

    slot: int
    ref: PortRef
    device: str
    record: Record
    state: str = "staged"  # for the day the maps are gone: after a reboot of the host
    committed: bool = False
    rules: tuple[Record, ...] = ()
    carried: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, tuple[Record, ...]] = field(default_factory=dict)  # of kindtable.py, by name

    def with_carried(self, part: str, values: Mapping[Any, Any]) -> PortEntry:
        """The same with one part of what was carried replaced."""
        return replace(self, carried={**self.carried, part: dict(values)})


class Ledger:
    """The files. Not thread safe for one port; different ports may be saved side by side."""

    def __init__(self, folder: Path) -> None:
        self._ports = folder / "ports"
        self._folder = folder
        self._later: dict[int, PortEntry] = {}
        self._lock = threading.Lock()  # of `_later`, never held while a file is written
        self._files = threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._ports.mkdir(exist_ok=True)

    # ---- ports ----

    def ports(self) -> list[PortEntry]:
        """Every port instance, by slot."""
        slots = sorted(int(path.stem) for path in self._ports.glob("*.json") if path.stem.isdigit())
        entries = [self._port(slot) for slot in slots]
        for entry in entries:
            if self._log(entry.slot).exists():
                self.save_kinds(entry)  # its last line may be half written: no other shall follow that
        return entries

    def _port(self, slot: int) -> PortEntry:
        values = _read(self._ports / f"{slot}.json")
        rules, carried, kinds = (_read_or_none(self._ports / f"{slot}.{part}.json") for part in _PARTS)
        parts = {"ref": PortRef(**values["ref"]), "rules": tuple(rules or ()), "carried": carried or {}}
        parts["kinds"] = _amended({name: tuple(records) for name, records in (kinds or {}).items()}, self._log(slot))
        return PortEntry(**{**values, **parts})

    def save_port(self, entry: PortEntry) -> None:
        """All but what has a file of its own: rules, kinds, and what was carried."""
        with self._files:
            with self._lock:
                self._later.pop(entry.slot, None)
            self._write_port(entry)

    def save_port_later(self, entry: PortEntry) -> None:
        """The same at the next `flush`: within a switchover no file system is waited for."""
        with self._lock:
            self._later[entry.slot] = entry

    def flush(self) -> None:
        """Write what was put off. Raises KernelError; then what is not written is written by a later call."""
        with self._files:
            with self._lock:
                entries, self._later = self._later, {}
            try:
                while entries:
                    self._write_port(next(iter(entries.values())))
                    entries.pop(next(iter(entries)))
            finally:
                with self._lock:
                    self._later = {**entries, **self._later}

    def _write_port(self, entry: PortEntry) -> None:
        values = {name: value for name, value in vars(entry).items() if name not in _PARTS}
        _write(self._ports / f"{entry.slot}.json", {**values, "ref": asdict(entry.ref)})

    def save_rules(self, entry: PortEntry) -> None:
        _write(self._ports / f"{entry.slot}.rules.json", entry.rules)

    def save_kinds(self, entry: PortEntry) -> None:
        """All of them. A log that is there is taken away after it, and says the same until then."""
        log = self._log(entry.slot)
        if log.exists():
            _append(log, {"whole": entry.kinds})
        _write(self._ports / f"{entry.slot}.kinds.json", entry.kinds)
        log.unlink(missing_ok=True)

    def amend_kind(self, entry: PortEntry, kind: Kind, gone: Sequence[Key], new: Sequence[Record]) -> None:
        """All that has changed in `entry`: a kind lost some keys, and some of its records are new or otherwise."""
        if len(entry.kinds[kind.name]) >= max(_LOGGED_FROM, 8 * (len(gone) + len(new))):
            change = {"kind": kind.name, "key": kind.key, "gone": gone, "new": new}
            if _append(self._log(entry.slot), change) <= _LOG_MAX:
                return
        self.save_kinds(entry)

    def _log(self, slot: int) -> Path:
        return self._ports / f"{slot}.kinds.log"

    def save_carried(self, entry: PortEntry) -> None:
        _write(self._ports / f"{entry.slot}.carried.json", entry.carried)

    def forget_port(self, slot: int) -> None:
        with self._files:
            with self._lock:
                self._later.pop(slot, None)
            for path in self._ports.glob(f"{slot}.*"):
                path.unlink(missing_ok=True)

    def save_fdb(self, slot: int, entries: NDArray[Any]) -> None:
        """L2 entries that a staged port will own when it opens."""
        with _replacing(self._ports / f"{slot}.fdb.npy") as partial, partial.open("wb") as file:
            np.save(file, entries, allow_pickle=False)

    def fdb(self, slot: int) -> NDArray[Any] | None:
        path = self._ports / f"{slot}.fdb.npy"
        if not path.exists():
            return None
        loaded: NDArray[Any] = np.load(path, allow_pickle=False)
        return loaded

    def forget_fdb(self, slot: int) -> None:
        (self._ports / f"{slot}.fdb.npy").unlink(missing_ok=True)

    # ---- networks and hosts ----

    def networks(self) -> dict[int, Network]:
        """Index -> network."""
        return {
            int(index): Network(**{**values, "kind": NetworkKind(values["kind"])})
            for index, values in self._read_table("networks").items()
        }

    def save_networks(self, networks: Mapping[int, Network]) -> None:
        self._write_table("networks", {str(index): asdict(network) for index, network in networks.items()})

    def hosts(self) -> dict[str, tuple[int, str]]:
        """Name -> (index, underlay address)."""
        return {name: (int(index), str(address)) for name, (index, address) in self._read_table("hosts").items()}

    def save_hosts(self, hosts: Mapping[str, tuple[int, str]]) -> None:
        self._write_table("hosts", dict(hosts))

    def boot(self) -> int:
        """`settings.boot` of the maps that the ledger belongs to, 0 at first."""
        return int(self._read_table("switch").get("boot", 0))

    def save_boot(self, boot: int) -> None:
        self._write_table("switch", {"boot": boot})

    # ---- a takeover (takeover.py) ----

    def save_held(self, held: Mapping[int, tuple[int, int]]) -> None:
        """Frames that waited in each port's hold taps, (to, from), when it was copied. Waits for no disk."""
        path = self._folder / "takeover.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({str(slot): list(counts) for slot, counts in held.items()}))
        partial.replace(path)

    def held(self) -> dict[int, tuple[int, int]]:
        return {int(slot): (int(to), int(from_)) for slot, (to, from_) in self._read_table("takeover").items()}

    def forget_held(self) -> None:
        (self._folder / "takeover.json").unlink(missing_ok=True)

    def destroy(self) -> None:
        """Delete every file."""
        for path in [*self._ports.iterdir(), *self._folder.glob("*.json"), *self._folder.glob("*.partial")]:
            path.unlink()
        self._ports.rmdir()

    def _read_table(self, name: str) -> dict[str, Any]:
        path = self._folder / f"{name}.json"
        table: dict[str, Any] = _read_or_none(path) or {}
        return table

    def _write_table(self, name: str, table: Mapping[str, Any]) -> None:
        _write(self._folder / f"{name}.json", table)


def _read_or_none(path: Path) -> Any:
    return _read(path) if path.exists() else None


def _read(path: Path) -> Any:
    return _parsed(path.read_bytes(), path)


def _parsed(text: bytes, path: Path) -> Any:
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise KernelError(
            f"read {path}: {error}", 5, hint="the file was damaged; move it away and stage its port again"
        ) from error
    return values


def _amended(kinds: dict[str, tuple[Record, ...]], log: Path) -> dict[str, tuple[Record, ...]]:
    """Records with what a log says of them. Its last line may be half written: then nobody was told that it is so."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    keyed: dict[str, dict[Key, Record]] = {}
    for change in (_parsed(line, log) for line in lines):
        if "whole" in change:
            kinds, keyed = {name: tuple(records) for name, records in change["whole"].items()}, {}
            continue
        name, key = change["kind"], change["key"]
        if name not in keyed:
            keyed[name] = {tuple(one[field] for field in key): one for one in kinds.get(name, ())}
        for gone in change["gone"]:
            keyed[name].pop(tuple(gone), None)
        keyed[name] |= {tuple(one[field] for field in key): one for one in change["new"]}
    return {**kinds, **{name: tuple(records.values()) for name, records in keyed.items()}}


def _write(path: Path, values: Any) -> None:
    with _replacing(path) as partial, partial.open("w") as file:
        file.write(json.dumps(values, separators=(",", ":")))  # many times as fast as json.dump
        file.flush()
        os.fsync(file.fileno())


def _append(path: Path, values: Any) -> int:
    """One line more. Returns the file's size. Raises KernelError; then the file is as it was."""
    line = json.dumps(values, separators=(",", ":")).encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise KernelError(f"write {path}", error.errno or errno.EIO, hint=_WRITABLE) from error
    return size + len(line)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`. Raises KernelError; then nothing has changed."""
    partial = path.with_suffix(".partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise KernelError(f"write {path}", error.errno or errno.EIO, hint=_WRITABLE) from error
