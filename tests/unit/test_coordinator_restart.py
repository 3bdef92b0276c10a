"""The coordinator killed at each step of a migration: started again, it undoes what it had not authorised and finishes
what it had."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from migrator._pb import migrator_pb2 as pb
from tests.unit.scripted import MAC, VM, Agent, Bench, source

Scenario = Callable[[Bench, Agent, Agent], Awaitable[None]]


def restarted(folder: Path, before: Scenario, after: Callable[[Bench, pb.Migration], Awaitable[None]]) -> None:
    """Run `before` with two hosts and a migration, kill the coordinator, start it on the same journal, run `after`."""

    async def main() -> None:
        async with Bench(folder) as bench:
            a, b = await bench.two_hosts()
            a.on, b.on = {}, {}
            report = await bench.begin_migration()
            await a.hear("describe")
            await before(bench, a, b)
            await bench.kill()
            await bench.begin()
            await after(bench, report)

    asyncio.run(main())


async def described(_: Bench, a: Agent, __: Agent) -> None:
    await a.hear("describe")


async def staged(_: Bench, __: Agent, b: Agent) -> None:
    await b.hear("prepare")


async def started(_: Bench, a: Agent, __: Agent) -> None:
    await a.hear("start")


async def precopy(bench: Bench, a: Agent, __: Agent) -> None:
    await a.hear("start")
    await bench.phase(a.migration, "pre-copy")


@pytest.mark.parametrize("before", [described, staged, started, precopy])
def test_not_authorised_is_undone_at_both_ends(tmp_path: Path, before: Scenario) -> None:
    async def after(bench: Bench, report: pb.Migration) -> None:
        a, b = Agent("h1"), Agent("h2")
        a.on = {"abort": ["rolled-back"]}
        b.on = {"abort": ["aborted"], "verdict": ["aborted"]}
        await bench.attach(a, b)
        ended = await bench.finished(report.id)
        assert ended.outcome == "aborted"
        assert "authorise" not in a.names()
        assert (await bench.stub.Show(pb.Empty())).ports[0].host == "h1"
        again = await bench.begin_migration()  # and the VM can be moved again, under a new epoch
        assert again.epoch == 3

    restarted(tmp_path, before, after)


async def authorised(_: Bench, a: Agent, __: Agent) -> None:
    await a.hear("start")
    a.progress("converged")
    await a.hear("authorise")


async def paused(bench: Bench, a: Agent, b: Agent) -> None:
    await authorised(bench, a, b)
    a.progress("held")
    await bench.phase(a.migration, "switchover")


async def committed(bench: Bench, a: Agent, b: Agent) -> None:
    await paused(bench, a, b)
    b.progress("committed", a.migration)
    await bench.phase(a.migration, "committed")


@pytest.mark.parametrize("before", [authorised, paused, committed])
@pytest.mark.parametrize("told", ["progress", "hello"])
def test_authorised_is_finished_when_the_agents_are_back(tmp_path: Path, before: Scenario, told: str) -> None:
    """The destination opened while no coordinator was there; it says so again, or only its Hello shows it."""

    async def after(bench: Bench, report: pb.Migration) -> None:
        active = pb.Instance(vm=VM, mac=MAC, epoch=2, state="active", committed=True)
        a, b = source(), Agent("h2", **({"instances": [active]} if told == "hello" else {}))
        await bench.attach(a, b)
        assert "abort" not in a.names() + b.names()
        if told == "progress":
            b.progress("opened", report.id)
        ended = await bench.finished(report.id)
        assert ended.outcome == "complete"
        assert (await a.hear("verdict")).opened
        assert (await bench.stub.Show(pb.Empty())).ports[0].host == "h2"

    restarted(tmp_path, before, after)


async def opened(bench: Bench, a: Agent, b: Agent) -> None:
    await authorised(bench, a, b)
    b.progress("opened", a.migration)
    await bench.phase(a.migration, "open")


def test_opened_before_the_crash_is_settled_after_it(tmp_path: Path) -> None:
    async def after(bench: Bench, report: pb.Migration) -> None:
        assert (await bench.stub.Show(pb.Empty())).ports[0].host == "h2"
        a, b = source(), Agent("h2")
        await bench.attach(a, b)
        assert (await bench.finished(report.id)).outcome == "complete"
        a.say(redirect_idle=pb.RedirectIdle(vm=VM, epoch=1, idle_s=61))
        assert (await a.hear("end_redirect")).epoch == 1

    restarted(tmp_path, opened, after)


def test_settled_while_no_coordinator_was_there(tmp_path: Path) -> None:
    """The source's Hello shows a stub: its state is purged, only the redirect lives."""

    async def after(bench: Bench, report: pb.Migration) -> None:
        stub = pb.Instance(vm=VM, mac=MAC, epoch=1, state="stub", redirecting=True)
        await bench.attach(Agent("h1", instances=[stub]), Agent("h2"))
        assert (await bench.finished(report.id)).outcome == "complete"

    restarted(tmp_path, opened, after)


@pytest.mark.parametrize("settled", [True, False])
def test_redirect_is_ended_by_a_coordinator_started_later(tmp_path: Path, settled: bool) -> None:
    """Not all hosts had acknowledged the place at the crash. One that does not come back is not waited for."""

    async def moved(bench: Bench, a: Agent, b: Agent) -> None:
        deaf = Agent("h3")
        deaf.acknowledges = False
        deaf.silent.add("sync")
        await bench.attach(deaf)
        if settled:
            a.on = {"verdict": ["redirecting", "settled"]}
            await authorised(bench, a, b)
            b.progress("opened", a.migration)
            await bench.finished(a.migration)  # it may have settled before anybody sees it open
        else:
            await opened(bench, a, b)

    async def after(bench: Bench, _: pb.Migration) -> None:
        a, b = source("h1"), Agent("h2")
        await bench.attach(a, b)
        a.say(redirect_idle=pb.RedirectIdle(vm=VM, epoch=1, idle_s=61))
        await bench.stub.Hosts(pb.Empty())
        assert "end_redirect" not in a.names()  # h3 is still expected
        bench.cluster.roster.expect([])
        bench.cluster._forget_missing(["h3"])
        await a.hear("end_redirect")

    restarted(tmp_path, moved, after)


def test_rollback_told_after_the_restart(tmp_path: Path) -> None:
    async def after(bench: Bench, report: pb.Migration) -> None:
        a, b = Agent("h1"), Agent("h2")
        await bench.attach(a, b)
        assert not (await b.hear("verdict")).guest_at  # nobody has said that the guest is at the source
        b.on = {"verdict": ["aborted"]}
        a.progress("rolled-back", report.id)
        assert (await b.hear("verdict", 2)).guest_at == "h1"
        assert (await bench.finished(report.id)).outcome == "aborted"

    restarted(tmp_path, committed, after)
