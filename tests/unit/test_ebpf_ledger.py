"""The driver's files on a disk that is full: errors of the driver's own, nothing lost, and the sweeper goes on."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datapath.drivers.ebpf.ledger import Ledger, PortEntry
from datapath.drivers.ebpf.sweeper import Sweeper
from datapath.errors import KernelError
from datapath.provider import PortRef
from migrator.lab.processes import wait_until

REFS = [PortRef("0a", f"02:00:00:00:00:0{slot}", 1) for slot in (1, 2)]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The kernel writes no byte into any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def entries(state: str) -> list[PortEntry]:
    return [PortEntry(slot, ref, "tap", {"mac": ref.mac}, state=state) for slot, ref in enumerate(REFS, 1)]


def states(folder: Path) -> list[str]:
    return [entry.state for entry in Ledger(folder).ports()]


def test_what_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for entry in entries("staged"):
        ledger.save_port(entry)
    for entry in entries("active"):
        ledger.save_port_later(entry)
    with full_disk():
        for _ in range(2):
            with pytest.raises(KernelError, match=r"ports/1\.json"):
                ledger.flush()
        ledger.save_port_later(entries("quiesced")[0])  # newer than what waits
    assert states(tmp_path) == ["staged", "staged"]
    ledger.flush()
    assert states(tmp_path) == ["quiesced", "active"]


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.save_port(entries("staged")[0])
    ledger.save_fdb(1, np.zeros(3, np.uint64))
    with full_disk():
        with pytest.raises(KernelError):
            ledger.save_port(entries("active")[0])
        with pytest.raises(KernelError):
            ledger.save_fdb(1, np.zeros(9, np.uint64))
    assert states(tmp_path) == ["staged"]
    assert len(ledger.fdb(1)) == 3
    assert not list(tmp_path.rglob("*.partial"))


def test_the_sweeper_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path)
    ledger.save_port_later(entries("active")[0])
    nothing: Any = None
    sweeper = Sweeper(nothing, nothing, ledger, [], nothing, nothing, nothing, 0.001)
    swept = []
    sweeper.age_l2 = lambda: swept.append(1)  # type: ignore[method-assign]
    with full_disk():
        sweeper.start()
        try:
            wait_until("it sweeps", lambda: len(swept) > 3, 20.0)
        finally:
            sweeper.stop()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    ledger.flush()
    assert states(tmp_path) == ["active"]
