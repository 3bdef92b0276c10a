"""One migration through the real service, with scripted agents."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.migrations import free_channel
from migrator.coordinator.rpc import received
from migrator.coordinator.running import Agreed, Running, close, merge
from migrator.errors import AlreadyMigrating, ConfigInvalid, MigrationNotFound, PreflightFailed
from migrator.lifecycle import coordinator as machine
from tests.unit.scripted import DEADLINE_S, MAC, VM, Agent, Bench, configuration, source

AGREED = Agreed("m", VM, "h1", "h2", 2, 1, "", False, False, False, 1.0, 1)


def run(folder: Path, scenario, **deadlines: float) -> None:
    async def main() -> None:
        async with Bench(folder, **deadlines) as bench:
            await scenario(bench)

    asyncio.run(main())


def test_vm_moves_and_every_host_is_told(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        third = Agent("h3")
        await bench.attach(third)
        report = await bench.begin_migration()
        await a.hear("authorise")
        b.progress("committed", a.migration, moved={"conntrack": 5})
        b.progress("opened", a.migration)
        report = await bench.finished(report.id)
        assert (report.outcome, report.phase, report.epoch) == ("complete", "done", 2)
        assert report.moved == {"conntrack": 5}
        start, prepare = a.last("start"), b.last("prepare")
        assert start.token == prepare.token and len(start.token) == 16
        assert start.channel == prepare.channel > 0
        assert dict(prepare.devices) == {MAC: "t123456"}
        assert dict(start.epochs) == {MAC: 1} and start.epoch == 2
        for agent in (a, b, third):
            place = (await agent.until(lambda agent=agent: moved_place(agent))).places[0]
            assert (place.mac, place.host, place.epoch) == (MAC, "h2", 2)
        config = await bench.stub.Show(pb.Empty())
        assert config.ports[0].host == "h2"

    run(tmp_path, scenario)


def moved_place(agent: Agent):
    found = [m.places for m in agent.heard if m.WhichOneof("message") == "places"]
    return next((p for p in found if p.places and p.places[0].host == "h2"), None)


def test_redirect_ends_when_idle_and_known_everywhere(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        deaf = Agent("h3")
        deaf.acknowledges = False
        deaf.silent.add("sync")
        await bench.attach(deaf)
        report = await bench.begin_migration()
        await a.hear("authorise")
        b.progress("opened", a.migration)
        await bench.finished(report.id)
        a.say(redirect_idle=pb.RedirectIdle(vm=VM, epoch=1, idle_s=61))
        told = await deaf.until(lambda: moved_place(deaf))
        assert (await bench.stub.Hosts(pb.Empty())).hosts  # a round trip after the idle word
        assert "end_redirect" not in a.names()
        deaf.say(places=pb.PlacesKnown(revision=told.revision))
        ended = await a.hear("end_redirect")
        assert (ended.vm, ended.epoch) == (VM, 1)

    run(tmp_path, scenario)


def test_destination_that_refuses_leaves_the_vm_where_it_is(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        b.refuse.add("prepare")
        b.on["abort"] = ["aborted"]
        report = await bench.finished((await bench.begin_migration()).id)
        assert report.outcome == "refused"
        assert "prepare refused" in report.reason
        assert "start" not in a.names()
        assert (await bench.stub.Show(pb.Empty())).ports[0].host == "h1"

    run(tmp_path, scenario)


def test_dry_run_prepares_then_undoes(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        b.on["abort"] = ["aborted"]
        report = await bench.finished((await bench.begin_migration(dry_run=True)).id)
        assert (report.outcome, report.reason) == ("complete", "dry run")
        assert "start" not in a.names()
        await b.hear("abort")

    run(tmp_path, scenario)


def test_operator_aborts_in_precopy(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        a.on = {"abort": ["rolled-back"]}
        b.on = {"verdict": ["aborted"], "abort": ["aborted"]}
        report = await bench.begin_migration()
        await a.hear("start")
        await bench.phase(report.id, "pre-copy")
        await bench.stub.Abort(pb.MigrationRef(id=report.id))
        report = await bench.finished(report.id)
        assert report.outcome == "aborted"
        assert "operator" in report.reason

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"vm": "nobody", "to": "h2"}, MigrationNotFound),
        ({"vm": "shop", "to": "h9"}, PreflightFailed),
        ({"vm": VM, "to": "h1"}, PreflightFailed),
    ],
)
def test_refusals_before_anything_happens(tmp_path: Path, request_: dict, error: type) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.two_hosts()
        with pytest.raises(grpc.RpcError) as caught:
            await bench.begin_migration(**request_)
        problem = received(caught.value, "coordinator")
        assert type(problem) is error
        assert problem.hint
        assert not (await bench.stub.Migrations(pb.Empty())).migrations

    run(tmp_path, scenario)


def test_never_two_migrations_of_one_vm(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.two_hosts()
        await bench.begin_migration()
        with pytest.raises(grpc.RpcError) as caught:
            await bench.begin_migration()
        assert type(received(caught.value, "coordinator")) is AlreadyMigrating

    run(tmp_path, scenario)


def test_of_several_orders_after_a_dry_run_one_goes_on(tmp_path: Path) -> None:
    """All wait until the dry run is undone; then one is first."""

    async def scenario(bench: Bench) -> None:
        _, b = await bench.two_hosts()
        await bench.finished((await bench.begin_migration(dry_run=True)).id)
        orders = [asyncio.create_task(bench.begin_migration()) for _ in range(3)]
        await b.hear("abort")
        await asyncio.sleep(0)
        b.progress("aborted")
        got = await asyncio.gather(*orders, return_exceptions=True)
        refused = [received(error, "") for error in got if isinstance(error, grpc.RpcError)]
        assert [type(error) for error in refused] == [AlreadyMigrating, AlreadyMigrating]

    run(tmp_path, scenario)


def test_channels_of_live_migrations_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([99, 98, 101, 102])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(drawn))
    live = Running(replace(AGREED, channel=100), machine.State(), pb.Migration(), {"a": 1, "b": 1, "c": 1})
    assert free_channel(2, [live]) == 103  # 100, 99 and 102 would meet 100 to 102


def test_silent_destination_is_refused_after_its_deadline(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        _, b = await bench.two_hosts()
        b.silent.add("prepare")
        b.on["abort"] = ["aborted"]
        report = await bench.finished((await bench.begin_migration()).id)
        assert report.outcome in ("refused", "aborted")
        assert report.reason

    run(tmp_path, scenario, stage_s=0.3)


def test_lost_agents_after_authorisation_put_it_in_doubt_and_the_operator_resolves(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        a.on["verdict"] = ["rolled-back"]
        b.on["verdict"] = ["aborted"]
        report = await bench.begin_migration()
        report = await bench.phase(report.id, "in-doubt")
        assert not report.done
        report = await bench.stub.Resolve(pb.ResolveRequest(id=report.id, guest_at="h1"))
        assert (await b.hear("verdict")).guest_at == "h1"
        assert (await bench.finished(report.id)).outcome == "aborted"

    run(tmp_path, scenario, switchover_s=0.2)


def test_a_doubt_that_was_dispelled_is_a_warning(tmp_path: Path) -> None:
    """Nobody shall read in the report of a complete move that it is not known where the guest runs."""

    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        report = await bench.begin_migration()
        await bench.phase(report.id, "in-doubt")
        b.progress("committed", a.migration)
        b.progress("opened", a.migration)
        report = await bench.finished(report.id)
        assert (report.outcome, report.reason) == ("complete", "")
        assert [text for text in report.warnings if "deadline of phase" in text]

    run(tmp_path, scenario, switchover_s=0.2)


def test_change_during_a_migration_goes_to_both_instances(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        a.on = {}
        report = await bench.begin_migration()
        await bench.phase(report.id, "pre-copy")
        await bench.stub.Apply(
            pb.ApplyRequest(config=pb.Config(address_sets=[pb.AddressSet(name="office", prefixes=["198.51.100.0/24"])]))
        )
        order = await b.hear("port")
        assert (order.epoch, order.device, list(order.rules[0].remote)) == (2, "t123456", ["198.51.100.0/24"])
        here = await a.until(lambda: a.last("port").rules[0].remote[0].startswith("198") and a.last("port"))
        assert here.epoch == 1

    run(tmp_path, scenario)


NARROW = pb.Rule(direction="to", priority=1, protocol="any", action="allow", label="0x1/0x1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policies": [pb.Policy(name="web", rules=[NARROW])]}, "the agent of h2 .* knows no rules with label"),
        ({"ports": [pb.Port(kinds={"window": "{}"})]}, "host h2 holds no state of kind window"),
    ],
    ids=["rules", "kind"],
)
def test_what_only_the_source_could_keep_is_refused_while_the_vm_moves(
    tmp_path: Path, change: dict, words: str
) -> None:
    """The destination would read rules as wider, or go without the kind, and nobody would have said so."""

    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        bench.cluster.store.catalog.hosts["h1"].kinds.update({"acl": 2, "window": 1})
        a.on = {}
        b.on = {"verdict": ["aborted"], "abort": ["aborted"]}
        report = await bench.begin_migration()
        await bench.phase(report.id, "pre-copy")
        known = (await bench.stub.Show(pb.Empty())).ports[0]
        wanted = pb.ApplyRequest(config=pb.Config(**change))
        for port in wanted.config.ports:
            port.MergeFrom(known)
        with pytest.raises(grpc.RpcError) as caught:
            await bench.stub.Apply(wanted)
        problem = received(caught.value, "coordinator")
        assert isinstance(problem, ConfigInvalid)
        assert re.search(words, str(problem)) and "wait for the end of it or abort it" in problem.hint
        assert "port" not in b.names()
        a.on = {"abort": ["rolled-back"]}
        await bench.stub.Abort(pb.MigrationRef(id=report.id))
        await bench.finished(report.id)
        async with asyncio.timeout(DEADLINE_S):
            while bench.cluster.migrations.migrating():
                await asyncio.sleep(0.01)
        assert (await bench.stub.Apply(wanted)).changed

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"policies": [pb.Policy(name="web", rules=[NARROW])]},
            "the agent of h2 knows no rules with label .policy web",
        ),
        ({"ports": [pb.Port(kinds={"window": "{}"})]}, f"host h2 holds no state of kind window .port {MAC}"),
    ],
    ids=["rules", "kind"],
)
def test_what_was_declared_just_before_counts_though_the_source_has_not_got_it_yet(
    tmp_path: Path, change: dict, words: str
) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        bench.cluster.store.catalog.hosts["h1"].kinds.update({"acl": 2, "window": 1})
        wanted = pb.ApplyRequest(config=pb.Config(**change))
        for port in wanted.config.ports:
            port.MergeFrom((await bench.stub.Show(pb.Empty())).ports[0])
        await bench.stub.Apply(wanted)
        with pytest.raises(grpc.RpcError) as caught:
            await bench.begin_migration()
        problem = received(caught.value, "coordinator")
        assert isinstance(problem, PreflightFailed)
        assert re.search(words, str(problem))
        assert "describe" not in a.names() and "prepare" not in b.names()
        bench.cluster.store.catalog.hosts["h2"].kinds.update({"acl": 2, "window": 1})
        await bench.begin_migration()
        assert await b.hear("prepare")

    run(tmp_path, scenario)


def test_an_agent_that_is_replaced_by_an_older_one_gets_no_rules_that_it_would_read_as_wider(tmp_path: Path) -> None:
    """Not when it attaches, nor with a change of what the rules name; its other ports it gets."""
    office = pb.AddressSet(name="office", prefixes=["198.51.100.0/24"])

    async def scenario(bench: Bench) -> None:
        first = source("h1")
        first.hello.kinds["acl"] = 2
        await bench.attach(first)
        wanted = configuration()
        wanted.policies[0].rules.append(NARROW)
        wanted.ports.add().CopyFrom(wanted.ports[0])
        wanted.ports[1].mac, wanted.ports[1].policy = "52:54:00:12:34:57", ""
        await bench.stub.Apply(pb.ApplyRequest(config=wanted))
        await first.hear("port", 2)
        older, newer = source("h1"), source("h1")
        older.hello.kinds["acl"], newer.hello.kinds["acl"] = 1, 2
        await bench.attach(older)
        assert [order.port.mac for order in older.last("sync").ports] == [wanted.ports[1].mac]
        await bench.stub.Apply(pb.ApplyRequest(config=pb.Config(address_sets=[office])))
        assert (await bench.stub.Hosts(pb.Empty())).hosts  # a round trip after the change
        assert "port" not in older.names()
        await bench.attach(newer)
        assert {order.port.mac for order in newer.last("sync").ports} == {port.mac for port in wanted.ports}

    run(tmp_path, scenario)


@pytest.mark.parametrize("named", ["newest", "older", "none"])
def test_an_opening_names_its_configuration_and_gets_what_is_newer(tmp_path: Path, named: str) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        first = a.last("port").revision
        report = await bench.begin_migration()
        await bench.phase(report.id, "switchover")
        office = pb.AddressSet(name="office", prefixes=["198.51.100.0/24"])
        await bench.stub.Apply(pb.ApplyRequest(config=pb.Config(address_sets=[office])))
        newest = (await b.hear("port")).revision
        assert newest > first
        b.progress("opened", a.migration, revision={"newest": newest, "older": first, "none": 0}[named])
        await bench.finished(report.id)
        assert (await bench.stub.Hosts(pb.Empty())).hosts
        if named == "newest":
            assert b.names().count("port") == 1
        else:
            again = await b.hear("port", 2)
            assert (again.epoch, again.revision, again.port.host) == (2, newest, "h2")
            assert b.names().count("port") == 2

    run(tmp_path, scenario)


def test_a_move_alone_is_no_change_of_the_configuration(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        a, b = await bench.two_hosts()
        revision = a.last("port").revision
        report = await bench.begin_migration()
        await a.hear("authorise")
        b.progress("opened", a.migration, revision=revision)
        assert (await bench.finished(report.id)).outcome == "complete"
        port = next(iter(bench.cluster.store.catalog.ports.values()))
        assert bench.cluster.store.catalog.order(port).revision == revision
        assert "port" not in b.names()

    run(tmp_path, scenario)


def test_what_found_a_hold_full_at_either_end_is_a_warning() -> None:
    """Each end has its own count, and the later word of one takes nothing from the other's."""
    report = pb.Migration()
    for frames in ({"dropped": 3}, {"dropped_at_destination": 4}, {"dropped_at_destination": 5}):
        merge(report, pb.Migration(frames=frames))
    close(report, "complete", "")
    assert report.outcome == "complete"
    assert list(report.warnings) == ["8 frames were dropped: more came than a hold has room for"]
