"""Where the hypervisors say that a guest is: against the operator's word, and when it is nowhere."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from datapath.provider import PortState
from migrator._pb import migrator_pb2 as pb
from migrator.agent.guests import GuestEvent
from migrator.coordinator.rpc import received
from migrator.errors import IllegalTransition
from migrator.lifecycle.machine import Guest
from tests.unit.pair import MACS, VM, World, eventually, world
from tests.unit.scripted import Bench


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LOOK_S", 0.05), ("DOUBT_S", 0.05), ("ANSWER_S", 0.5)):
        monkeypatch.setattr(f"migrator.coordinator.whereabouts.{name}", seconds)


@pytest.mark.parametrize(
    ("at", "source", "destination", "believed"),
    [
        ("h1", "gone", "", False),
        ("h1", "gone", "running", False),
        ("h1", "", "running", False),
        ("h1", "paused", "running", False),
        ("h2", "", "gone", False),
        ("h2", "running", "paused", False),
        ("h1", "", "", True),
        ("h1", "", "gone", True),
        ("h1", "running", "paused", True),
        ("h1", "paused", "gone", True),
        ("h2", "paused", "running", True),
        ("h2", "gone", "", True),
        ("h2", "paused", "", True),
    ],
)
def test_the_operator_is_believed_where_no_hypervisor_says_otherwise(
    tmp_path: Path, at: str, source: str, destination: str, believed: bool
) -> None:
    async def scenario() -> None:
        async with Bench(tmp_path, switchover_s=0.1) as bench:
            a, b = await bench.two_hosts()
            a.on["verdict"] = b.on["verdict"] = []
            a.guest, b.guest = source, destination
            report = await bench.phase((await bench.begin_migration()).id, "in-doubt")
            request = pb.ResolveRequest(id=report.id, guest_at=at)
            if believed:
                await bench.stub.Resolve(request)
                assert (await b.hear("verdict")).guest_at == at
                return
            with pytest.raises(grpc.RpcError) as caught:
                await bench.stub.Resolve(request)
            problem = received(caught.value, "coordinator")
            assert type(problem) is IllegalTransition and problem.hint
            assert f"h1: {source or 'nothing'}, h2: {destination or 'nothing'}" in str(problem)
            assert "verdict" not in b.names() and "verdict" not in a.names()

    asyncio.run(scenario())


def test_an_agent_that_does_not_answer_leaves_it_to_the_operator(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Bench(tmp_path, switchover_s=0.1) as bench:
            a, b = await bench.two_hosts()
            a.on["verdict"] = []
            a.guest, b.guest = "gone", "gone"
            for agent in (a, b):
                agent.silent.add("guest")
            report = await bench.phase((await bench.begin_migration()).id, "in-doubt")
            await bench.stub.Resolve(pb.ResolveRequest(id=report.id, guest_at="h1"))
            assert (await a.hear("verdict")).guest_at == "h1"

    asyncio.run(scenario())


def test_rule_a_guest_that_is_nowhere_twice_is_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Bench(tmp_path, switchover_s=0.1) as bench:
            a, b = await bench.two_hosts()
            a.on["verdict"] = b.on["verdict"] = ["aborted"]
            report = await bench.phase((await bench.begin_migration()).id, "in-doubt")
            a.guest = "gone"
            seen = a.names().count("guest")
            await a.hear("guest", seen + 4)
            assert "verdict" not in a.names()  # B has said nothing
            b.guest = "gone"
            told = await b.hear("verdict")
            assert told.gone and not told.guest_at and (await a.hear("verdict")).gone
            report = await bench.finished(report.id)
            assert (report.outcome, report.reason) == ("aborted", "neither host has the VM any more")
            anew = await a.until(lambda: next((m.port for m in a.heard if m.port.epoch == 3), None))
            assert anew.port.host == "h1"
            config = await bench.stub.Show(pb.Empty())
            assert config.ports[0].host == "h1"

    asyncio.run(scenario())


def test_one_look_at_the_wrong_moment_decides_nothing(tmp_path: Path) -> None:
    """One hypervisor had given the guest away, the other had not yet said that it has it."""

    async def scenario() -> None:
        async with Bench(tmp_path, switchover_s=30.0) as bench:
            a, b = await bench.two_hosts()
            report = await bench.begin_migration()
            await bench.phase(report.id, "switchover")
            a.guest = b.guest = "gone"
            a.say(guest=pb.GuestEvent(vm=VM_SHOP, state="gone"))
            await b.hear("guest")
            b.guest = "running"
            await b.hear("guest", 2)
            assert (await bench.stub.Hosts(pb.Empty())).hosts
            assert "verdict" not in b.names()

    asyncio.run(scenario())


VM_SHOP = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"


class Dead:
    """The hypervisor of a host that has the VM no more."""

    def __init__(self, side: Any) -> None:
        side.state = lambda _: Guest.GONE
        side.states = dict
        self.side = side

    def tell(self) -> None:
        self.side.on_event(GuestEvent(VM, "gone", moving=False, reason="destroyed"))


async def committed(w: World) -> None:
    await eventually(lambda: any(str(end.state.phase) == "committed" for end in w.agents["a"].ends))


@pytest.mark.parametrize("agent", ["stays", "restarts"])
def test_a_vm_destroyed_after_the_pause_leaves_nothing_and_can_be_started_again(tmp_path: Path, agent: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 20)
            old = w.active("a")
            w.hypervisor.downtime_s = 30.0
            migration = await w.migrate("b")
            await committed(w)
            w.hypervisor.moving = ""
            dead = [Dead(w.hypervisor.side(host)) for host in "ab"]
            if agent == "restarts":
                await w.stop("a")
                await w.start("a")
            dead[0].tell()
            report = await w.finish(migration)
            assert (report.outcome, report.reason) == ("aborted", "neither host has the VM any more")
            await eventually(lambda: len(w.active("a")) == len(MACS))
            new = w.active("a")
            assert min(ref.epoch for ref in new) > report.epoch > old[0].epoch
            assert not any(w.connections("a").values())
            await w.quiet()
            assert not w.statuses("b")
            assert {status.ref for status in w.statuses("a")} == set(new)
            assert {status.state for status in w.statuses("a")} == {PortState.ACTIVE}

    asyncio.run(scenario())
