"""The driver's files on a disk that is full: errors of the driver's own, nothing lost, and the sweeper goes on."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datapath.drivers.ebpf.ledger import Ledger, PortEntry
from datapath.drivers.ebpf.sweeper import Sweeper
from datapath.errors import KernelError
from datapath.provider import PortRef
from datapath.state.remap import REMAP
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


def many(number: int) -> list[dict[str, Any]]:
    return [{"outside": f"{n}", "protocol": "", "outside_port": 0, "inside": f"{n}"} for n in range(number)]


def with_rules(rules: list[dict[str, Any]]) -> PortEntry:
    return replace(entries("active")[0], kinds={"qos": ({"direction": "to"},), REMAP.name: tuple(rules)})


def kinds(folder: Path) -> dict[str, list[Any]]:
    (entry,) = Ledger(folder).ports()
    return {name: list(records) for name, records in entry.kinds.items()}


def amended(folder: Path) -> tuple[Ledger, list[dict[str, Any]], Path]:
    """Many rules in a file, and two changes of one in the log behind it."""
    ledger, rules = Ledger(folder), many(1000)
    ledger.save_port(with_rules(rules))
    ledger.save_kinds(with_rules(rules))
    whole = (folder / "ports" / "1.kinds.json").read_bytes()
    rules[3] = {**rules[3], "inside": "other"}
    ledger.amend_kind(with_rules(rules), REMAP, gone=[], new=[rules[3]])
    removed = rules.pop(7)
    ledger.amend_kind(with_rules(rules), REMAP, gone=[REMAP.key_of(removed)], new=[])
    assert (folder / "ports" / "1.kinds.json").read_bytes() == whole
    return ledger, rules, folder / "ports" / "1.kinds.log"


def test_a_change_of_few_records_is_a_line_behind_the_others(tmp_path: Path) -> None:
    _, rules, log = amended(tmp_path)
    assert len(log.read_bytes()) < 300
    assert kinds(tmp_path) == {"qos": [{"direction": "to"}], "remap": rules}
    assert not log.exists()
    assert kinds(tmp_path)["remap"] == rules


def test_half_a_line_was_never_said_to_be_written(tmp_path: Path) -> None:
    _, rules, log = amended(tmp_path)
    with log.open("ab") as file:
        file.write(b'{"kind":"remap","key":["outs')
    assert kinds(tmp_path)["remap"] == rules


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    log = amended(tmp_path)[2]
    log.write_bytes(b"what?\n" + log.read_bytes())
    with pytest.raises(KernelError, match=r"1\.kinds\.log"):
        Ledger(tmp_path).ports()


def test_a_line_that_cannot_be_written_leaves_none(tmp_path: Path) -> None:
    ledger, rules, log = amended(tmp_path)
    before = log.read_bytes()
    with full_disk(), pytest.raises(KernelError, match=r"1\.kinds\.log"):
        ledger.amend_kind(with_rules(rules), REMAP, gone=[], new=[{**rules[0], "inside": "third"}])
    assert log.read_bytes() == before
    assert kinds(tmp_path)["remap"] == rules


def test_a_crash_between_the_whole_and_the_end_of_the_log_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, rules, log = amended(tmp_path)
    rules[3] = {**rules[3], "inside": "newest"}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        ledger.save_kinds(with_rules(rules))
    assert log.exists()
    assert kinds(tmp_path)["remap"] == rules


def test_a_log_does_not_grow_without_end(tmp_path: Path) -> None:
    ledger, rules, log = amended(tmp_path)
    largest = 0
    for number in range(400):
        rules[5] = {**rules[5], "inside": f"{number}" + "x" * 1000}
        ledger.amend_kind(with_rules(rules), REMAP, gone=[], new=[rules[5]])
        largest = max(largest, log.stat().st_size if log.exists() else 0)
    assert 100_000 < largest < 300_000
    assert kinds(tmp_path)["remap"] == rules
