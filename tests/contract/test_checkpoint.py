"""Snapshots of any driver: a VM is restored from its own file and from another driver's."""

from __future__ import annotations

import io

import pytest

from datapath.errors import LoadRejected
from datapath.provider import PortState
from datapath.registry import KINDS
from datapath.state.kind import Op, Table
from migrator.checkpoint import checkpoint, restore
from migrator.diff import diff
from migrator.errors import PreflightFailed
from migrator.snapshot import SnapshotReader
from tests.contract.hosts import Host, dummy_host, inside, ref
from tests.contract.samples import MAC, normal, sample

COUNTS = {"acl": 60, "remap": 12, "fdb": 20, "conntrack": 4_000, "qos": 2}


def with_state(host: Host, epoch: int = 1) -> bytes:
    """A snapshot of a quiesced port full of state; the port is gone then."""
    made = host.stage(epoch)
    for kind, count in COUNTS.items():
        host.driver.load(made, sample(kind, count))
    host.driver.load(made, Table("port", Op.ACCOUNT, records=[{"mac": MAC, "counters": {"packets_to": 5_000}}]))
    host.driver.open(made)
    host.driver.quiesce(made)
    raw = b"".join(checkpoint(host.driver, [made], "here"))
    host.driver.purge(made)
    return raw


def assert_restored(host: Host, raw: bytes, epoch: int) -> None:
    host.plug("ctback")
    restored = restore(host.driver, lambda: io.BytesIO(raw), epoch, {MAC: "ctback"})
    assert restored.refs == [ref(epoch)]
    status = host.driver.port(ref(epoch))
    assert (status.state, status.device) == (PortState.ACTIVE, "ctback")
    assert status.counters["packets_to"] >= 5_000
    for kind, count in COUNTS.items():
        expected = normal([sample(kind, count)])
        got = normal(list(host.driver.dump(ref(epoch), kind)))
        assert {key: got.get(key) for key in expected} == expected, kind


def test_a_file_names_the_kinds_that_the_vm_uses(host: Host) -> None:
    """What no port of it has is not asked of the host that restores it."""
    raw = with_state(host)
    asked = SnapshotReader(io.BytesIO(raw)).header.kinds
    configured = {name for name, kind in KINDS.items() if kind.document is not None}
    assert asked.keys() & configured == COUNTS.keys() & configured
    assert asked.keys() >= {"port", *COUNTS}
    assert "flows" not in asked


def test_a_vm_comes_back_from_its_file(host: Host) -> None:
    assert_restored(host, with_state(host), 2)


def test_a_vm_comes_back_from_the_file_of_another_driver(host: Host) -> None:
    with dummy_host() as other:
        raw = with_state(other)
    assert_restored(host, raw, 3)


def test_a_vm_goes_to_another_driver(host: Host) -> None:
    raw = with_state(host)
    with dummy_host() as other, inside(other):
        assert_restored(other, raw, 4)


def test_two_checkpoints_of_a_quiesced_port_do_not_differ(host: Host) -> None:
    made = host.stage()
    for kind, count in COUNTS.items():
        host.driver.load(made, sample(kind, count))
    host.driver.open(made)
    host.driver.quiesce(made)
    one, other = (b"".join(checkpoint(host.driver, [made], "here")) for _ in range(2))
    assert diff(io.BytesIO(one), io.BytesIO(other), ignore={"age_ns"}) == []


def test_a_snapshot_that_does_not_fit_leaves_nothing(host: Host) -> None:
    raw = with_state(host)
    before = host.driver.remains()
    host.driver.remove_network("blue")
    with pytest.raises(PreflightFailed, match="blue"):
        restore(host.driver, lambda: io.BytesIO(raw), 2, {MAC: "ctback"})
    assert host.driver.ports() == []
    assert host.driver.remains() == before


def test_rejected_records_leave_nothing(host: Host) -> None:
    """More connections than the port's table takes: the file was made by hand, or the limit was lowered in it."""
    raw = _with_too_many(host)
    before = host.driver.remains()
    with pytest.raises(LoadRejected, match="do not fit"):
        restore(host.driver, lambda: io.BytesIO(raw), 2, {MAC: "ctback"})
    assert host.driver.ports() == []
    assert host.driver.remains() == before


def _with_too_many(host: Host) -> bytes:
    """A snapshot with 1,500 connections of a port that has room for 1,000."""
    made = host.stage(connections_max=1_000)
    try:
        real = host.driver.dump
        host.driver.dump = (  # type: ignore[method-assign]
            lambda port, kind: iter([sample(kind, 1_500)]) if kind == "conntrack" else real(port, kind)
        )
        return b"".join(checkpoint(host.driver, [made], "here"))
    finally:
        del host.driver.dump  # type: ignore[method-assign]
        host.driver.purge(made)
