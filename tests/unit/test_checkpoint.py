"""Checkpoint and restore through the switch in memory: whole or not at all; and what inspect and diff say of it."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from datapath.drivers.dummy import DummyDriver
from datapath.errors import KernelError, LoadRejected, NotReady, PortNotFound
from datapath.provider import Event, Loaded, Network, NetworkKind, PortRef, PortState
from datapath.registry import KINDS
from datapath.state.kind import Op, Table
from migrator.checkpoint import checkpoint, restore
from migrator.diff import diff
from migrator.errors import Corrupt, Incompatible, PreflightFailed, SnapshotError
from migrator.inspect import inspect, records
from migrator.snapshot import SnapshotReader
from tests.contract.samples import MAC, ages, normal, port_record, sample

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
OTHER = "02:00:00:00:00:02"
DEVICES = {MAC: "tap0", OTHER: "tap1"}
_numbers = itertools.count()

Made = Callable[..., DummyDriver]


@pytest.fixture
def host() -> Iterator[Made]:
    """Makes hosts that are destroyed at the end."""
    made: list[DummyDriver] = []

    def make(**options: Any) -> DummyDriver:
        driver = DummyDriver()
        driver.start({"host": f"h{next(_numbers)}", "fabric": "checkpoint", **options}, _ignore)
        made.append(driver)
        driver.set_network(Network("blue", NetworkKind.LOCAL))
        return driver

    yield make
    for driver in made:
        driver.destroy()


def _ignore(event: Event) -> None:
    pass


def with_vm(driver: DummyDriver, connections: int = 500, *, macs: tuple[str, ...] = (MAC, OTHER)) -> list[PortRef]:
    """A VM with two ports that are active and full of state."""
    refs = []
    for number, mac in enumerate(macs):
        ref = PortRef(VM, mac, 3)
        driver.stage(ref, port_record(mac=mac, connections_max=200_000), f"tap{number}")
        driver.load(ref, sample("acl", 20))
        driver.load(ref, sample("fdb", 10))
        driver.load(ref, sample("conntrack", connections * (number + 1)))
        driver.load(ref, Table("port", Op.ACCOUNT, records=[{"mac": mac, "counters": {"packets_to": 77}}]))
        driver.open(ref)
        driver.quiesce(ref)
        refs.append(ref)
    return refs


def saved(driver: DummyDriver, refs: list[PortRef], **options: Any) -> bytes:
    return b"".join(checkpoint(driver, refs, "host-a", **options))


def opener(raw: bytes) -> Callable[[], io.BytesIO]:
    return lambda: io.BytesIO(raw)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_restored_vm_is_the_one_that_was_saved(host: Made, codec: str) -> None:
    a, b = host(), host()
    refs = with_vm(a)
    restored = restore(b, opener(saved(a, refs, codec=codec)), 9, DEVICES)
    assert restored.refs == [PortRef(VM, MAC, 9), PortRef(VM, OTHER, 9)]
    assert restored.loaded == {"port": 2, "acl": 40, "fdb": 20, "conntrack": 1500}
    assert restored.skipped == {}
    for old, new in zip(refs, restored.refs, strict=True):
        for kind in KINDS:
            got = normal(list(b.dump(new, kind)))
            assert got == normal(list(a.dump(old, kind))), kind
        assert ages(list(b.dump(new, "fdb"))).keys() == ages(list(a.dump(old, "fdb"))).keys()
        status = b.port(new)
        assert (status.state, status.committed, status.device) == (PortState.ACTIVE, True, DEVICES[new.mac])
        assert status.counters["packets_to"] == 77


def test_a_checkpoint_changes_nothing(host: Made) -> None:
    driver = host()
    refs = with_vm(driver)
    before = driver.ports()
    assert saved(driver, refs) == saved(driver, refs)
    assert driver.ports() == before


def test_ports_can_be_left_committed(host: Made) -> None:
    a, b = host(), host()
    restored = restore(b, opener(saved(a, with_vm(a))), 9, DEVICES, open_ports=False)
    assert {(b.port(ref).state, b.port(ref).committed) for ref in restored.refs} == {(PortState.STAGED, True)}


def test_every_damage_leaves_nothing_behind(host: Made) -> None:
    a, b = host(), host()
    whole = saved(a, with_vm(a, 3, macs=(MAC,)))
    calls: list[str] = []
    b.stage = lambda *_: calls.append("stage")  # type: ignore[method-assign, assignment]
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        with pytest.raises(SnapshotError):
            restore(b, opener(bytes(damaged)), 9, DEVICES)
    with pytest.raises(Corrupt):
        restore(b, opener(whole[:-1]), 9, DEVICES)
    assert calls == []


class Failing(DummyDriver):
    """Fails at its n-th call that changes something."""

    fails_at = -1

    def _count(self) -> None:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise KernelError("BPF_MAP_UPDATE_BATCH conntrack", 12)

    def stage(self, *args: Any) -> None:
        self._count()
        super().stage(*args)

    def load(self, *args: Any) -> Loaded:
        self._count()
        return super().load(*args)

    def commit(self, *args: Any) -> None:
        self._count()
        super().commit(*args)

    def open(self, *args: Any, **options: Any) -> Any:
        self._count()
        return super().open(*args, **options)


def test_a_failure_anywhere_leaves_nothing_behind(host: Made) -> None:
    a = host()
    raw = saved(a, with_vm(a))
    b = Failing()
    b.start({"host": "failing", "fabric": "checkpoint"}, _ignore)
    try:
        b.set_network(Network("blue", NetworkKind.LOCAL))
        empty = b.remains()
        for step in itertools.count(1):
            b.fails_at = step
            try:
                restore(b, opener(raw), 9, DEVICES)
            except KernelError:
                assert b.remains() == empty
                continue
            break
        assert step > 10
        assert len(b.ports()) == 2
    finally:
        b.destroy()


def test_an_instance_that_lives_is_not_purged_by_a_failing_restore(host: Made) -> None:
    a = host()
    refs = with_vm(a)
    raw = saved(a, refs)
    with pytest.raises(NotReady):
        restore(a, opener(raw), 3, DEVICES)
    assert [status.ref for status in a.ports()] == refs


def test_a_snapshot_that_changed_between_both_readings(host: Made) -> None:
    a, b = host(), host()
    raw = saved(a, with_vm(a))
    readings = iter([raw, raw[:-200] + bytes(200)])
    with pytest.raises(Corrupt):
        restore(b, lambda: io.BytesIO(next(readings)), 9, DEVICES)
    assert b.ports() == []


def test_a_host_that_cannot_take_it_says_all_reasons(host: Made) -> None:
    a, b = host(), host(connections=100, kinds=["port", "acl"])
    b.remove_network("blue")
    with pytest.raises(PreflightFailed) as caught:
        restore(b, opener(saved(a, with_vm(a))), 9, {MAC: "tap0"})
    text = str(caught.value)
    for reason in ("blue", "conntrack", "fdb", "400000 connections", OTHER):
        assert reason in text
    assert b.ports() == []


def test_what_does_not_fit_is_refused_and_not_cut(host: Made) -> None:
    a, b = host(), host()
    raw = saved(a, with_vm(a))
    real = b.load
    b.load = lambda ref, table: Loaded(0, (("full", 1),)) if table.kind == "fdb" else real(ref, table)  # type: ignore
    with pytest.raises(LoadRejected, match="fdb do not fit: 1 full"):
        restore(b, opener(raw), 9, DEVICES)
    assert b.ports() == []


def test_ports_of_two_vms_or_of_none(host: Made) -> None:
    driver = host()
    refs = with_vm(driver)
    with pytest.raises(Incompatible, match="one VM"):
        checkpoint(driver, [refs[0], PortRef("other", OTHER, 1)], "host-a")
    with pytest.raises(Incompatible, match="one VM"):
        checkpoint(driver, [], "host-a")
    with pytest.raises(PortNotFound):
        checkpoint(driver, [PortRef(VM, MAC, 8)], "host-a")


def test_a_snapshot_without_a_ports_record(host: Made) -> None:
    a, b = host(), host()
    ref = with_vm(a, macs=(MAC,))[0]
    a.switch.ports[ref].tables["port"].load(Table("port", Op.DELETE, records=[{"mac": MAC}]))
    with pytest.raises(Corrupt, match=MAC):
        restore(b, opener(saved(a, [ref])), 9, DEVICES)
    assert b.ports() == []


# ---- inspect ----


def test_inspect_is_json_and_complete(host: Made) -> None:
    a = host()
    raw = saved(a, with_vm(a))
    shown = json.loads(json.dumps(inspect(io.BytesIO(raw))))
    assert shown["ports"][OTHER] == {"port": 2, "acl": 20, "fdb": 10, "conntrack": 1000}
    assert shown["accounting"] == {"port": 2}
    assert shown["needs"] == {"rules_max": 20, "connections": 400_000}
    assert (shown["vm"], shown["source"], shown["driver"]) == (VM, "host-a", "dummy")
    reader = SnapshotReader(io.BytesIO(raw))
    assert len(list(reader)) == shown["sections"]


def test_records_are_shown_as_people_read_them(host: Made) -> None:
    a = host()
    raw = saved(a, with_vm(a))
    (first, *rest) = records(io.BytesIO(raw), kind="conntrack", port=MAC, limit=5)
    assert len(rest) == 4
    assert (first["port"], first["kind"], first["op"]) == (MAC, "conntrack", "load")
    record = first["record"]
    assert (record["laddr"], record["raddr"]) == ("10.0.0.5", "11.0.0.0")
    assert (record["proto"], record["state"], record["flags"]) == ("udp", "REPLIED", ["REPLIED", "ASSURED"])
    (entry, *_) = records(io.BytesIO(raw), kind="fdb")
    assert (entry["record"]["mac"], entry["record"]["flags"]) == ("06:11:00:00:00:00", ["STATIC"])
    assert json.dumps(list(records(io.BytesIO(raw))))


# ---- diff ----


def test_the_same_snapshot_differs_in_nothing(host: Made) -> None:
    a = host()
    raw = saved(a, with_vm(a))
    assert diff(io.BytesIO(raw), io.BytesIO(raw)) == []


def test_diff_finds_what_was_added_removed_and_changed(host: Made) -> None:
    a = host()
    (ref,) = with_vm(a, macs=(MAC,))
    before = saved(a, [ref])
    a.resume(ref)
    whole = sample("conntrack", 503).columns or {}
    part = {name: array[7:].copy() for name, array in whole.items()}  # 7 go, 3 come
    part["state"][:5] = 6
    part["packets_to"][:8] += 1
    a.load(ref, Table("conntrack", Op.DELETE, columns={name: whole[name][:7] for name in KINDS["conntrack"].key}))
    a.load(ref, Table("conntrack", columns=part, port_time_ns=sample("conntrack", 1).port_time_ns))
    rule = dict((sample("acl", 1).records or [])[0])
    a.load(ref, Table("acl", records=[{**rule, "action": "drop"}, {**rule, "id": 500}]))
    a.load(ref, Table("acl", Op.DELETE, records=[{"id": 2}]))
    a.quiesce(ref)
    after = saved(a, [ref])
    found = {d.kind: d for d in diff(io.BytesIO(before), io.BytesIO(after), ignore={"age_ns"})}
    assert set(found) == {"acl", "conntrack"}
    assert found["conntrack"].counts() == {"added": 3, "removed": 7, "changed": 8}
    assert found["conntrack"].fields == {"state": 5, "packets_to": 8}
    assert found["acl"].counts() == {"added": 1, "removed": 1, "changed": 1}
    assert found["acl"].fields == {"action": 1}
    live = {d.kind: d for d in diff(io.BytesIO(before), io.BytesIO(after), ignore={"age_ns"}, accounting=False)}
    assert live["conntrack"].counts()["changed"] == 5
    pairs = zip(found["conntrack"].before.columns["id"], found["conntrack"].after.columns["id"], strict=True)  # type: ignore
    assert all(one == other for one, other in pairs)


def test_diff_is_by_vectors(host: Made) -> None:
    a = host()
    ref = PortRef(VM, MAC, 1)
    a.stage(ref, port_record(connections_max=200_000), "tap0")
    a.load(ref, sample("conntrack", 100_000))
    before = saved(a, [ref])
    columns = {name: array[50_000:].copy() for name, array in (sample("conntrack", 100_000).columns or {}).items()}
    columns["mark"] = columns["mark"] + np.uint32(1)
    a.load(ref, Table("conntrack", columns=columns, port_time_ns=sample("conntrack", 1).port_time_ns))
    (found,) = diff(io.BytesIO(before), io.BytesIO(saved(a, [ref])))
    assert found.fields == {"mark": 50_000}
