"""What a hypervisor's driver asks of its agent: ports declared and withdrawn, also past an outage; state kept aside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from datapath.errors import PortNotFound, UnsupportedKind
from migrator._pb import migrator_pb2 as pb
from migrator.agent import household
from migrator.agent.household import Household
from migrator.coordinator.cluster import Cluster
from migrator.coordinator.sqlite import SqliteJournal
from migrator.errors import ConfigInvalid, Corrupt, PeerLost, PreflightFailed
from migrator.lifecycle.machine import Guest
from tests.unit.pair import MACS, VM, World, eventually, world


def ports(*macs: str, **fields: object) -> list[pb.Port]:
    body = {"vm": VM, "network": "blue", "device": "t{mac6}", "policy": "web", "declared_by": "libvirt"}
    return [pb.Port(mac=mac, **{**body, **fields}) for mac in macs]  # type: ignore[arg-type]


def scenario(tmp_path: Path, test: Callable[[World, Household], Awaitable[None]]) -> None:
    async def run() -> None:
        async with world(tmp_path) as w:
            await w.start("a", "b")
            networks = [pb.Network(name="blue", kind="uplink", vlan=10)]
            objects = pb.Config(networks=networks, policies=[pb.Policy(name="web")])
            w.cluster.apply(pb.ApplyRequest(config=objects))
            await test(w, w.agents["a"].household)

    asyncio.run(run())


def test_declared_ports_are_open_when_the_call_returns_and_go_when_withdrawn(tmp_path: Path) -> None:
    async def test(w: World, side: Household) -> None:
        assert await side.declare(VM, ports(*MACS)) == []
        assert [ref.mac for ref in w.active("a")] == list(MACS)
        shown = [status async for status in side.statuses()]
        assert [(s.instance.mac, s.device) for s in shown] == [(MACS[0], "t000001"), (MACS[1], "t000002")]
        await side.declare(VM, ports(MACS[1]))
        await eventually(lambda: [ref.mac for ref in w.active("a")] == [MACS[1]])
        await side.withdraw(VM)
        await eventually(lambda: not w.statuses("a"))
        assert not w.cluster.store.catalog.ports

    scenario(tmp_path, test)


def test_what_coordinator_or_switch_refuse_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(w: World, side: Household) -> None:
        with pytest.raises(ConfigInvalid, match="no network nowhere"):
            await side.declare(VM, ports(MACS[0], network="nowhere"))
        monkeypatch.setattr(w.driver("a"), "stage", Mock(side_effect=UnsupportedKind("no room for so many")))
        with pytest.raises(UnsupportedKind, match="no room"):
            await side.declare(VM, ports(*MACS))
        assert not w.statuses("a")

    scenario(tmp_path, test)


def test_after_an_outage_the_newest_word_counts(tmp_path: Path) -> None:
    async def test(w: World, side: Household) -> None:
        await side.declare(VM, ports(*MACS))
        other = VM[:-2] + "ff"
        away = [pb.Port(vm=other, mac="52:54:00:00:00:0f", network="blue", device="t9", declared_by="libvirt")]
        await side.declare(other, away)
        await w.outage()
        with pytest.raises(PeerLost):
            await side.declare(VM, ports(MACS[0]))
        with pytest.raises(PeerLost):
            await side.withdraw(other)
        assert len(w.active("a")) == 2, "ports pass frames without a coordinator"
        await w.recover()
        await eventually(lambda: [ref.mac for ref in w.active("a")] == [MACS[0]], 10.0)
        await eventually(lambda: list(w.cluster.store.catalog.ports) == [f"{VM}/{MACS[0]}"])

    scenario(tmp_path, test)


def test_a_coordinator_that_lost_its_journal_is_told_until_it_can_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(w: World, side: Household) -> None:
        monkeypatch.setattr(household, "AGAIN_S", 0.05)
        await side.declare(VM, ports(*MACS))
        w.fill("a", 5)
        before = w.connections("a")
        await w.outage()
        journal = SqliteJournal(tmp_path / "new.sqlite")
        w.stack.callback(journal.close)
        w.cluster = Cluster(journal)
        await w.recover()
        await eventually(lambda: len(w.cluster.roster) == 2)
        assert not w.cluster.store.catalog.ports
        objects = pb.Config(
            networks=[pb.Network(name="blue", kind="uplink", vlan=10)], policies=[pb.Policy(name="web")]
        )
        w.cluster.apply(pb.ApplyRequest(config=objects))
        await eventually(lambda: len(w.cluster.store.catalog.ports) == 2)
        assert w.connections("a") == before

    scenario(tmp_path, test)


def test_a_vm_that_runs_elsewhere_is_not_taken(tmp_path: Path) -> None:
    async def test(w: World, side: Household) -> None:
        await w.agents["b"].household.declare(VM, ports(*MACS))
        w.hypervisor.place = "b"
        with pytest.raises(PreflightFailed, match="is at b, it cannot be declared at a: it is running there"):
            await side.declare(VM, ports(*MACS))
        w.hypervisor.place = "a"
        assert w.agents["b"].guests.state(VM) is Guest.GONE
        await side.declare(VM, ports(*MACS))
        await eventually(lambda: not w.statuses("b"))
        assert {ref.epoch for ref in w.active("a")} == {2}

    scenario(tmp_path, test)


def test_state_is_kept_aside_and_comes_back_into_new_ports(tmp_path: Path) -> None:
    async def test(w: World, side: Household) -> None:
        path = tmp_path / "kept.mgs"
        with pytest.raises(PortNotFound):
            await side.checkpoint(VM, path)
        assert not list(tmp_path.glob("*kept*"))
        await side.declare(VM, ports(*MACS))
        w.fill("a", 50)
        before = w.connections("a")
        await side.checkpoint(VM, path)
        assert path.stat().st_mode & 0o777 == 0o600
        await side.withdraw(VM)
        await eventually(lambda: not w.statuses("a"))
        await side.declare(VM, ports(*MACS, policy=""))
        loaded = await side.restore(VM, path)
        assert loaded["conntrack"] == 100 and w.connections("a") == before
        assert {ref.epoch for ref in w.active("a")} == {2}
        assert {s.record["policy"] for s in w.statuses("a")} == {""}, "configuration is today's"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(Corrupt):
            await side.restore(VM, path)
        assert w.connections("a") == before

    scenario(tmp_path, test)


def test_a_move_that_the_hypervisor_began_is_brought_joined_and_called_off(tmp_path: Path) -> None:
    async def test(w: World, side: Household) -> None:
        await side.declare(VM, ports(*MACS))
        w.fill("a", 10)
        w.hypervisor.converged = False
        there = w.agents["b"].household
        reports: list[pb.Migration] = []

        async def follow() -> None:
            reports.extend([report async for report in there.bring(VM)])

        first = asyncio.create_task(follow())
        await eventually(lambda: there.arriving(VM) == "loading")
        second = asyncio.create_task(follow())
        assert side.leaving(VM) and not side.arriving(VM) and not there.leaving(VM)
        await there.call_off(VM, "its QEMU ended")
        await asyncio.gather(first, second)
        assert [r.outcome for r in reports if r.done] == ["aborted", "aborted"]
        assert "its QEMU ended" in reports[-1].reason
        await w.quiet()
        assert len(w.active("a")) == 2 and not w.statuses("b")
        await there.call_off(VM, "again")

    scenario(tmp_path, test)


def test_a_move_that_nobody_began_is_refused(tmp_path: Path) -> None:
    async def test(w: World, side: Household) -> None:
        await side.declare(VM, ports(*MACS))
        w.agents["a"].guests.leaving = _no  # type: ignore[method-assign]
        reports = [report async for report in w.agents["b"].household.bring(VM)]
        assert reports[-1].outcome == "refused" and "is not being moved out of a" in reports[-1].reason

    scenario(tmp_path, test)


async def _no(vm: str) -> bool:
    return vm != VM
