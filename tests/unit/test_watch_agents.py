# SPDX-License-Identifier: GPL-2.0-only
"""A VM is watched while it moves, agents restart, watchers are slow: what is told adds up to what is there."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from datapath.registry import KINDS
from datapath.state.kind import Op, Table
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent import watchers, watching
from migrator.cli.following import Follower, Wanted, Ways
from migrator.coordinator.rpc import received
from migrator.errors import ConfigInvalid, Forbidden, ResourceExhausted
from migrator.inspect import rows
from migrator.lifecycle import destination_words as coming
from migrator.lifecycle import source_words as leaving
from migrator.security.settings import Tls
from migrator.security.transport import Transport
from migrator.watching.compare import joined, take
from migrator.watching.view import Change
from tests.contract.samples import sample
from tests.unit import pair
from tests.unit.pair import MACS, VM, World, connections, world

QUICK = 0.1
OTHER = "8d9e3c1a-1111-4c0e-9d5e-3f2b8a1c0d02"


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    await pair.eventually(condition, timeout_s)


class Heard:
    """What a follower of a VM has heard."""

    follower: Follower

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.warnings: list[str] = []
        self.failed: list[BaseException] = []

    def give(self, item: list[Change] | BaseException) -> None:
        if isinstance(item, BaseException):
            self.failed.append(item)
        else:
            self.changes += item

    def ops(self, kind: str = "conntrack") -> Counter[str]:
        return Counter(change.op for change in self.changes if change.kind == kind)

    def left_over(self, kind: str = "conntrack") -> set[tuple[str, int]]:
        """MAC and id of each record that was added and not removed; fails where one is added or removed twice."""
        there: set[tuple[str, int]] = set()
        for change in self.changes:
            if change.kind != kind:
                continue
            key = (change.mac, change.record["id"])
            if change.op == "added":
                assert key not in there, f"twice: {change}"
                there.add(key)
            elif change.op == "removed":
                there.remove(key)
        return there

    def current(self) -> bool:
        return any(change.op == "current" for change in self.changes)


@asynccontextmanager
async def following(w: World, ways: Ways | None = None, vm: str = VM, **request: Any) -> AsyncIterator[Heard]:
    heard = Heard()
    request = {"kinds": ["conntrack"], "interval_s": QUICK, **request}
    wanted = Wanted(pb.StateRequest(**request), vm=vm)
    ways = ways or Ways(Transport(w.tls("operator", "x")), coordinator=w.address)
    follower = heard.follower = Follower(wanted, ways, heard.give, heard.warnings.append)
    task = asyncio.create_task(follower.run())
    try:
        await eventually(heard.current)
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not heard.failed


def truth(w: World, host: str) -> set[tuple[str, int]]:
    found = set()
    for ref in w.active(host):
        for table in w.driver(host).dump(ref, "conntrack"):
            found |= {(ref.mac, number) for number in (table.columns or {})["id"].tolist()}
    return found


def run(tmp_path: Path, test: Callable[[World], Any], **settings: Any) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b", **settings) as w:
            await test(w)

    asyncio.run(scenario())


@pytest.mark.parametrize("tls", [False, True])
def test_a_vm_is_followed_there_and_back_without_gap_or_double(tmp_path: Path, tls: bool) -> None:
    async def test(w: World) -> None:
        w.fill("a", 100)
        async with following(w) as heard:
            assert heard.ops() == {"added": 200} and all(change.snapshot for change in heard.changes[:-1])
            there, number = "a", 1000
            for to in ("b", "a", "b"):
                for ref in w.active(there):  # begins just before the move
                    w.driver(there).load(ref, Table("conntrack", columns=connections(7, number)))
                number += 100
                assert (await w.finish(await w.migrate(to))).outcome == "complete"
                there = to
                for ref in w.active(there):  # and just behind it
                    w.driver(there).load(ref, Table("conntrack", columns=connections(5, number)))
                await eventually(lambda there=there: heard.left_over() == truth(w, there))
                for ref in w.active(there):
                    gone = {name: connections(3, number - 100)[name] for name in KEY}
                    w.driver(there).load(ref, Table("conntrack", Op.DELETE, columns=gone))
                number += 100
                await eventually(lambda there=there: heard.left_over() == truth(w, there))
            assert heard.ops() == {"added": 200 + 3 * 2 * 12, "removed": 3 * 2 * 3}
            assert [(c.op, c.host) for c in heard.changes if c.kind == "port" and c.mac == MACS[0]] == [
                ("arrived", host) for host in ("a", "b", "a", "b")
            ]
            assert not heard.warnings and not heard.ops("")["lost"]

    run(tmp_path, test, tls=tls)


KEY = ("laddr", "raddr", "lport", "rport", "proto", "type", "from")


def test_a_connection_between_the_same_ends_is_another_one(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        w.fill("a", 1)
        async with following(w) as heard:
            ref = w.active("a")[0]
            again = {**connections(1), "id": connections(1)["id"] + 77}
            w.driver("a").load(ref, Table("conntrack", columns=again))
            await eventually(lambda: heard.left_over() == truth(w, "a"))
            assert [c.op for c in heard.changes[-2:]] == ["removed", "added"]

    run(tmp_path, test)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "port"])
def test_every_kind_is_watched(tmp_path: Path, kind: str) -> None:
    async def test(w: World) -> None:
        async with following(w, kinds=[kind], macs=[MACS[0]]) as heard:
            ref, table = w.active("a")[0], joined(KINDS[kind], [sample(kind, 3)])
            before = len(heard.changes)
            w.driver("a").load(ref, table)
            await eventually(lambda: len(heard.changes) >= before + len(table))
            assert {change.op for change in heard.changes[before:]} <= {"added", "changed"}
            assert not heard.changes[-1].snapshot
            part, key = take(table, np.arange(1)), KINDS[kind].key
            columns = {name: part.columns[name] for name in key} if part.columns else None
            records = [{name: one[name] for name in key} for one in part.records or ()] if part.records else None
            w.driver("a").load(ref, Table(kind, Op.DELETE, columns=columns, records=records))
            await eventually(lambda: heard.ops(kind)["removed"] == 1)
            gone = next(change for change in heard.changes if change.op == "removed")
            shown = next(rows(part))
            assert {name: gone.record[name] for name in key} == {name: shown[name] for name in key}

    run(tmp_path, test)


def test_a_port_that_is_configured_otherwise_is_told(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        async with following(w, kinds=["port"]) as heard:
            port = pb.Port(vm=VM, mac=MACS[0], network="blue", host="a", device="tap1", policy="web", mtu=1400)
            w.cluster.apply(pb.ApplyRequest(config=pb.Config(ports=[port])))
            await eventually(lambda: heard.ops("port")["changed"] == 1)
            assert heard.changes[-1].record["mtu"] == 1400 and "mtu" in heard.changes[-1].was

    run(tmp_path, test)


def test_what_changes_is_told_with_what_it_was(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        w.fill("a", 2)
        async with following(w) as heard:
            ref = w.active("a")[0]
            columns = connections(2)
            columns["state"][1:] = 7
            columns["packets_to"][:] = 99  # only counted: no change of its own
            w.driver("a").load(ref, Table("conntrack", columns=columns))
            await eventually(lambda: heard.ops()["changed"] == 1)
            change = heard.changes[-1]
            assert (change.was, change.record["state"]) == ({"state": "ESTABLISHED"}, "TIME_WAIT")
            assert change.record["packets_to"] == 99 and not change.snapshot

    run(tmp_path, test)


def test_an_agent_that_restarts_is_heard_again_and_says_that_changes_may_be_missing(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        w.fill("a", 10)
        async with following(w) as heard:
            await w.outage()  # streams of agents go on without the coordinator
            ref = w.active("a")[0]
            w.driver("a").load(ref, Table("conntrack", columns=connections(3, 500)))
            await eventually(lambda: heard.left_over() == truth(w, "a"))
            await w.recover()
            before = len(heard.changes)
            await w.stop("a")
            await w.agent("a")
            w.driver("a").load(ref, Table("conntrack", columns=connections(4, 900)))
            await eventually(lambda: heard.left_over() == truth(w, "a"))
            assert Counter(c.op for c in heard.changes[before:]) == {"lost": 1, "added": 4}
            assert any("trying again" in line for line in heard.warnings)

    run(tmp_path, test)


def test_a_port_that_is_withdrawn_has_left(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        w.fill("a", 3)
        async with following(w) as heard:
            w.cluster.remove(pb.Removal(sort="port", name=f"{VM}/{MACS[0]}"))
            await eventually(lambda: heard.ops("port")["left"] == 1)
            assert heard.changes[-1].mac == MACS[0] and not heard.ops()["removed"]

    run(tmp_path, test)


def test_whatever_comes_to_the_cluster_is_watched(tmp_path: Path) -> None:
    """A VM that nobody knew, told by the coordinator and by its agent in whatever order."""
    other, mac = OTHER, "52:54:00:00:00:09"

    async def test(w: World) -> None:
        async with following(w, vm="") as heard:
            port = pb.Port(vm=other, mac=mac, network="blue", host="b", device="tap9", policy="web", name="new")
            w.cluster.apply(pb.ApplyRequest(config=pb.Config(ports=[port])))
            await eventually(lambda: heard.ops("port")["arrived"] == 3)
            change = heard.changes[-1]
            assert (change.op, change.vm, change.host, change.snapshot) == ("arrived", other, "b", False)
            w.cluster.remove(pb.Removal(sort="port", name=f"{other}/{mac}"))
            await eventually(lambda: heard.ops("port")["left"] == 1)
            early = pb.StateUpdate(what="here", vm=other, mac=mac, epoch=9)
            await heard.follower._update("a", early)
            await eventually(lambda: heard.changes[-1].op == "arrived")
            early.what = "gone"
            await heard.follower._update("a", early)
            await eventually(lambda: heard.changes[-1].op == "left")

    run(tmp_path, test, guests="none")


def test_a_host_that_nobody_can_reach_keeps_no_other_from_being_watched(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        await w.stop("b")
        port = pb.Port(vm=OTHER, mac="52:54:00:00:00:09", network="blue", host="b", device="tap9", policy="web")
        w.cluster.apply(pb.ApplyRequest(config=pb.Config(ports=[port])))
        async with following(w, vm="") as heard:
            assert heard.ops("port")["arrived"] == 2 and any("trying again" in line for line in heard.warnings)
            await w.agent("b")
            await eventually(lambda: heard.ops("port")["arrived"] == 3)
            assert not heard.changes[-1].snapshot and not heard.ops("")["lost"]

    run(tmp_path, test, guests="none")


def test_one_agent_by_itself_says_who_leaves(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        w.fill("a", 3)
        socket = Ways(Transport(Tls()), socket=str(w.directory / "a.sock"))
        async with following(w, socket) as heard:
            assert heard.ops() == {"added": 6}
            assert (await w.finish(await w.migrate("b"))).outcome == "complete"
            await eventually(lambda: heard.ops("port")["left"] == 2)
            assert (await w.finish(await w.migrate("a"))).outcome == "complete"
            await eventually(lambda: heard.ops() == {"added": 12})
            assert heard.ops("port") == {"arrived": 4, "left": 2}

    run(tmp_path, test)


def test_a_switchover_is_left_alone(tmp_path: Path) -> None:
    """While the guest is stopped, nobody looks at its ports: not where it was, not where it goes."""

    async def test(w: World) -> None:
        w.fill("a", 10)
        async with following(w) as heard:
            looks: list[bool] = []
            for host in ("a", "b"):
                driver = w.driver(host)
                dump = driver.dump
                driver.dump = lambda ref, kind, dump=dump: (  # type: ignore[method-assign,misc]
                    looks.append(w.hypervisor.running),
                    dump(ref, kind),
                )[1]
            w.hypervisor.downtime_s = 10 * QUICK
            assert (await w.finish(await w.migrate("b"))).outcome == "complete"
            await eventually(lambda: heard.ops("port")["arrived"] == 4)
            assert looks and all(looks)
            assert heard.left_over() == truth(w, "b")

    run(tmp_path, test)


CALM = {
    *(leaving.Phase.PROBING, leaving.Phase.CONNECTING, leaving.Phase.COPYING, leaving.Phase.CONVERGED),
    *(leaving.Phase.WATCHING, leaving.Phase.SETTLING, leaving.Phase.STUB, *leaving.OVER),
    *coming.OVER,
}
"""The guest runs, and no step of its switchover waits for the VM's lane."""


def test_who_has_its_switchover_in_hand_is_not_looked_at(tmp_path: Path) -> None:
    """Also not while its port is open still: it holds, or opens just now."""

    async def test(w: World) -> None:
        watching = w.agents["a"].watching
        phases: list[Any] = []
        watching._ends_of = lambda _: [SimpleNamespace(state=SimpleNamespace(phase=one)) for one in phases]
        stream = watching.watch(pb.StateRequest(kinds=["fdb"], interval_s=QUICK))
        assert (await anext(stream)).what == "here"
        for phase in (*leaving.Phase, *coming.Phase):
            phases[:] = [phase]
            assert watching._urgent(VM) == (phase not in CALM), phase
        phases[:] = [leaving.Phase.HOLDING]
        seen = watching._vms[VM]
        await eventually(lambda: seen.look is None)
        seen.due = 0.0
        await watching._turn()
        assert seen.look is None
        phases[:] = [leaving.Phase.COPYING]
        await watching._turn()
        await eventually(lambda: seen.due > 0)
        await stream.aclose()

    run(tmp_path, test)


# ---- the stream itself ----


def stub(w: World, host: str = "a") -> Any:
    channel = grpc.aio.insecure_channel(f"unix:{w.directory}/{host}.sock")
    w.stack.push_async_callback(channel.close)
    return rpc.StateStub(channel)


async def refusal(call: Any) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return received(caught.value, "it")


def test_what_cannot_be_watched_is_refused_by_name(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        for request, words in (
            ({"kinds": ["weather"]}, "'weather' is not held here"),
            ({"kinds": ["conntrack"], "matches": [pb.FieldMatch(field="colour", values=["red"])]}, "no field of kind"),
            ({"kinds": ["conntrack"], "matches": [pb.FieldMatch(field="age_ns", values=["1"])]}, "only counted"),
            ({"kinds": ["conntrack"], "matches": [pb.FieldMatch(field="proto", values=["tpc"])]}, "expected one of"),
            ({"interval_s": 0.01}, "interval: expected"),
            ({"interval_s": float("nan")}, "interval: expected"),
        ):
            error = await refusal(stub(w).Watch(pb.StateRequest(**request)))
            assert isinstance(error, ConfigInvalid) and words in str(error), error

    run(tmp_path, test)


def test_watches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "WATCHERS_MAX", 2)

    async def test(w: World) -> None:
        calls = [stub(w).Watch(pb.StateRequest(kinds=["fdb"])) for _ in range(2)]
        for call in calls:
            assert (await call.read()).what
        error = await refusal(stub(w).Watch(pb.StateRequest()))
        assert isinstance(error, ResourceExhausted), error
        calls[0].cancel()
        await eventually(lambda: len(w.agents["a"].watching) == 1)
        again = stub(w).Watch(pb.StateRequest(kinds=["fdb"]))
        assert (await again.read()).what
        calls[1].cancel()
        again.cancel()
        await eventually(lambda: len(w.agents["a"].watching) == 0)

    run(tmp_path, test)


def test_only_operators_watch_state_over_the_network(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        for role in ("viewer", "agent"):
            transport = Transport(w.tls(role, "b"))
            async with transport.to_agent(f"127.0.0.1:{w.port('a')}", "a", ()) as channel:
                error = await refusal(rpc.StateStub(channel).Watch(pb.StateRequest()))
                assert isinstance(error, Forbidden), error

    run(tmp_path, test, tls=True)


def test_a_slow_watcher_is_told_that_changes_were_lost_and_what_became_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers, "BACKLOG_MAX", 1000)

    async def test(w: World) -> None:
        agent = w.agents["a"].watching
        request = pb.StateRequest(kinds=["conntrack"], vms=[VM], macs=[MACS[0]], interval_s=QUICK)
        stream = agent.watch(request)
        first = [await anext(stream) for _ in range(3)]
        assert [update.what for update in first] == ["here", "whole", "current"]
        ref = w.active("a")[0]
        for number in range(4):  # nobody reads
            w.driver("a").load(ref, Table("conntrack", columns=connections(600, 10_000 * number)))
            await looked(w, ref.vm)
        async with asyncio.timeout(5):
            seen = [await anext(stream)]
            assert seen[0].what == "lost"
            while seen[-1].what != "current":
                seen.append(await anext(stream))
        assert [update.what for update in seen[:2]] == ["lost", "here"]
        assert {update.what for update in seen[2:-1]} <= {"whole", "now"}
        await stream.aclose()

    run(tmp_path, test)


async def looked(w: World, vm: str) -> None:
    """Wait until the agent has looked once more, from the beginning."""
    seen = w.agents["a"].watching._vms[vm]
    for _ in range(2):
        due = seen.due
        await eventually(lambda due=due: seen.due != due)


def test_a_filter_is_a_view_that_records_enter_and_leave(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        w.fill("a", 10)
        matches = [pb.FieldMatch(field="state", values=["established"]), pb.FieldMatch(field="rport", values=["3-5"])]
        async with following(w, matches=matches, macs=[MACS[0]]) as heard:
            assert sorted(c.record["rport"] for c in heard.changes if c.kind == "conntrack") == [3, 4, 5]
            ref, columns = w.active("a")[0], connections(10)
            columns["state"][3:7] = 4
            w.driver("a").load(ref, Table("conntrack", columns=columns))
            await eventually(lambda: heard.ops()["removed"] == 3)
            columns["state"][4] = 3
            w.driver("a").load(ref, Table("conntrack", columns=columns))
            await eventually(lambda: heard.ops()["added"] == 4)
            assert heard.changes[-1].record["rport"] == 4 and not heard.ops()["changed"]
            assert not [c for c in heard.changes if c.mac == MACS[1] and c.kind == "conntrack"]

    run(tmp_path, test)
