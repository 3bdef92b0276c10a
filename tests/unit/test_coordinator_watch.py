"""Watch: a consistent snapshot, then every change exactly once, from any revision that is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.journal import Batch, Write
from migrator.coordinator.rpc import received
from migrator.coordinator.sqlite import SqliteJournal
from migrator.coordinator.store import Store
from migrator.errors import ConfigInvalid, RevisionCompacted
from tests.unit.scripted import DEADLINE_S, Bench, configuration


async def take(bench: Bench, count: int, **request: object) -> list[pb.Change]:
    call = bench.stub.Watch(pb.WatchRequest(**request))
    async with asyncio.timeout(DEADLINE_S):
        changes = [await call.read() for _ in range(count)]
    call.cancel()
    return changes


def test_snapshot_then_changes(tmp_path: Path) -> None:
    async def main() -> None:
        async with Bench(tmp_path) as bench:
            await bench.stub.Apply(pb.ApplyRequest(config=configuration()))
            call = bench.stub.Watch(pb.WatchRequest())
            async with asyncio.timeout(DEADLINE_S):
                first = [await call.read() for _ in range(6)]
                assert [c.sort for c in first] == ["network", "address-set", "policy", "port", "place", ""]
                assert all(c.snapshot for c in first)
                assert first[-1].snapshot_end
                await bench.stub.Apply(pb.ApplyRequest(config=pb.Config(networks=[pb.Network(name="n", kind="local")])))
                change = await call.read()
            assert (change.sort, change.network.name, change.snapshot) == ("network", "n", False)
            assert change.revision == first[-1].revision + 1
            call.cancel()

    asyncio.run(main())


def test_resumed_from_any_revision_each_change_comes_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with Bench(tmp_path) as bench:
            await bench.stub.Apply(pb.ApplyRequest(config=configuration()))
            for number in range(20):
                prefix = pb.AddressSet(name="office", prefixes=[f"10.0.{number}.0/24"])
                await bench.stub.Apply(pb.ApplyRequest(config=pb.Config(address_sets=[prefix])))
            await bench.kill()
            await bench.begin()
            last = bench.cluster.store.revision
            for start in range(1, last):
                changes = await take(bench, last - start, from_revision=start)
                assert [change.revision for change in changes] == list(range(start + 1, last + 1))

    asyncio.run(main())


def test_sorts_are_filtered_and_unknown_ones_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with Bench(tmp_path) as bench:
            await bench.stub.Apply(pb.ApplyRequest(config=configuration()))
            changes = await take(bench, 2, sorts=["place"])
            assert [change.sort for change in changes] == ["place", ""]
            with pytest.raises(grpc.RpcError) as caught:
                await take(bench, 1, sorts=["plaice"])
            assert type(received(caught.value, "coordinator")) is ConfigInvalid
            with pytest.raises(grpc.RpcError) as caught:
                await take(bench, 1, from_revision=99)
            assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE

    asyncio.run(main())


def test_hosts_and_migrations_are_watched(tmp_path: Path) -> None:
    async def main() -> None:
        async with Bench(tmp_path) as bench:
            await bench.two_hosts()
            start = bench.cluster.store.revision
            report = await bench.begin_migration(dry_run=True)
            await bench.finished(report.id)
            changes = await take(bench, 3, from_revision=start, sorts=["migration"])
            assert {change.migration.id for change in changes} == {report.id}
            assert all(change.migration.revision == change.revision for change in changes)
            hosts = await take(bench, 3, sorts=["host"])
            assert [change.name for change in hosts[:2]] == ["h1", "h2"]

    asyncio.run(main())


def test_compacted_changes_are_refused_with_the_way_out(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite", changes_kept=10)
    store = Store(journal)
    for number in range(30):
        network = pb.Network(name="n", kind="local", mtu=1000 + number)
        store.commit(Batch([Write("network", "n", network.SerializeToString())]), durable=False)
    assert [entry.revision for entry in journal.changes(20, 100)] == list(range(21, 31))
    with pytest.raises(RevisionCompacted) as caught:
        journal.changes(19, 100)
    assert "revision 0" in caught.value.hint
    journal.close()
