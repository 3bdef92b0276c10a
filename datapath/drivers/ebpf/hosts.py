"""Hosts of the cluster: name and underlay address -> index in the kernel's array."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from datapath.drivers.ebpf import layout
from datapath.drivers.ebpf.ledger import Ledger
from datapath.drivers.ebpf.maps import U32, Table
from datapath.drivers.ebpf.records import address_bytes, address_text
from datapath.errors import NotReady, UnsupportedKind


def host_record(address: str) -> np.ndarray[Any, np.dtype[Any]]:
    """struct host of an underlay address."""
    record: np.ndarray[Any, np.dtype[Any]] = np.frombuffer(address_bytes(address), layout.HOST)[0]
    return record


class Hosts:
    """Frames through the tunnel device are taken from these addresses only."""

    def __init__(self, hosts: Table, index: Table, ledger: Ledger) -> None:
        self._array, self._index, self._ledger = hosts, index, ledger
        self._known = ledger.hosts()
        self._lock = threading.Lock()

    def restore(self) -> None:
        """Write what the ledger has into new maps."""
        for index, address in self._known.values():
            self._write(index, address)

    def names(self) -> Mapping[str, tuple[int, str]]:
        """Name -> (index, address)."""
        return dict(self._known)

    def index(self, name: str) -> int:
        """Raises NotReady for a host that set_hosts did not name."""
        if name not in self._known:
            raise NotReady(f"host {name!r} is not known here", hint="the coordinator tells hosts: did the agent join?")
        return self._known[name][0]

    def address(self, name: str) -> str:
        self.index(name)
        return self._known[name][1]

    def name(self, index: int) -> str:
        """Name of a host by its index, "" if it is gone."""
        return next((name for name, (number, _) in self._known.items() if number == index), "")

    def replace(self, hosts: Mapping[str, str], in_use: Collection[int]) -> list[int]:
        """Make these the cluster's hosts. Returns indexes of those that are gone; `in_use` are not given anew.

        A host that changed its address gets a new index. Raises ValueError for what is no address. An IPv6 address
        has many spellings; one is kept, or a host would not know itself among them.
        """
        hosts = {name: address_text(address_bytes(address)) for name, address in hosts.items()}
        with self._lock:
            kept = {n: known for n, known in self._known.items() if hosts.get(n) == known[1]}
            gone = {n: known for n, known in self._known.items() if n not in kept}
            taken = {index for index, _ in self._known.values()} | set(in_use)
            fresh = iter(index for index in range(1, self._array.entries) if index not in taken)
            for name, address in hosts.items():
                if name not in kept:
                    kept[name] = (self._free(fresh), address)
                    self._write(*kept[name])
            for _, address in gone.values():
                if address not in {a for _, a in kept.values()}:
                    self._index.delete(host_record(address))
            self._known = kept
            self._ledger.save_hosts(kept)
            return [index for index, _ in gone.values()]

    def _free(self, fresh: Iterator[int]) -> int:
        index = next(fresh, None)
        if index is None:
            raise UnsupportedKind(
                f"more than {self._array.entries - 1} hosts", hint="raise the driver's option `hosts`"
            )
        return index

    def _write(self, index: int, address: str) -> None:
        record = host_record(address)
        self._array.set(index, record)
        self._index.set(record, U32.type(index))
