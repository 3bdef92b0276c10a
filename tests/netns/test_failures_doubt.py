# SPDX-License-Identifier: GPL-2.0-only
"""Nobody knows where the guest runs: no hypervisor speaks, and the destination is gone since it has committed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab.processes import wait_until

from .standing import StandingCluster
from .test_rules import instances
from .traffic import Conversations
from .world import NETWORKS, ClusterBox, World

PATIENT_S = 1.0  # the coordinator waits so long before it calls a switchover doubtful


class WordlessCluster(StandingCluster):
    """Its agents have no hypervisor to ask, and its coordinator is impatient."""

    def _agent_config(self, host: str) -> dict[str, Any]:
        return {**super()._agent_config(host), "guests": {"driver": "none"}}

    def _coordinator_config(self) -> dict[str, Any]:
        return {**super()._coordinator_config(), "coordinator.deadlines": {"switchover_s": PATIENT_S, "undo_s": 2.0}}


class WordlessBox(ClusterBox):
    def _made(self) -> StandingCluster:
        return WordlessCluster(networks=NETWORKS, migration_options={"redirect_idle_s": 1.0})


@pytest.fixture(scope="module")
def wordless() -> Iterator[WordlessBox]:
    box = WordlessBox()
    yield box
    box.close()


@pytest.fixture
def world(wordless: WordlessBox) -> Iterator[World]:
    made = World(wordless.get())
    wordless.dirty = True
    with made.cluster.scope():
        yield made
        if not made.failed:
            made.leave_nothing()
    wordless.dirty = made.failed


class Doubt:
    """A VM whose ports have been committed at h2 when that host's agent died and its wire was cut."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.expected.append(".*")  # every daemon tells of it
        self.vm, peer = world.vm("h1", behaviour={"memory_ms": 1e6, "downtime_ms": 50}), world.peer("h3")
        self.vm.order("migrate", to="h2")  # the operator moves the VM by other means: its taps are at both hosts
        self.talk = Conversations.begin(self.vm, peer, inbound=10, outbound=10, every_ms=100)
        self.migration = self._lose_destination()

    def _lose_destination(self) -> str:
        cluster, point = self.world.cluster, "destination.committed"
        with cluster.standing(point):
            reports = cluster.migration(self.vm, "h2")
            migration = next(reports).id
            cluster.wait_for(point)
            cluster.cut("h2")
            cluster.agents["h2"].kill()
        return migration

    def phase(self) -> str:
        known = self.world.cluster.coordinator_stub().Migrations(pb.Empty(), timeout=10).migrations
        return str(next(m.phase for m in known if m.id == self.migration))

    def outcome(self) -> str:
        known = self.world.cluster.coordinator_stub().Migrations(pb.Empty(), timeout=10).migrations
        return str(next(m.outcome for m in known if m.id == self.migration))

    def show(self) -> None:
        """The operator sees it, and what can be done."""
        wait_until("it is in doubt", lambda: self.phase() == "in-doubt", PATIENT_S + 20)
        for command in (["list"], ["show", self.migration[:8]]):
            shown = self.world.cluster.cli("migration", *command)
            assert "in-doubt" in shown.stdout, shown
            assert f"resolve {self.migration} --guest-at h1|h2" in shown.stderr, shown
        assert not self.world.cluster.is_open(self.vm, "h1")  # and nothing is guessed

    def resolve(self, host: str) -> None:
        done = self.world.cluster.cli("migration", "resolve", self.migration, "--guest-at", host)
        assert done.returncode == 0, done

    def bring_back(self) -> None:
        self.world.cluster.cut("h2", off=False)
        self.world.cluster.restart(self.world.cluster.agents["h2"])
        wait_until("its agent answers", self._back, 30.0)

    def _back(self) -> bool:
        with contextlib.suppress(grpc.RpcError):
            return bool(self.world.cluster.agent_stub("h2").Status(pb.Empty(), timeout=5).coordinator)
        return False

    def ends(self, outcomes: set[str], host: str, other: str) -> None:
        """One host has the VM, the other nothing of it, and no connection was lost."""
        cluster = self.world.cluster
        wait_until("it has an outcome", self.outcome, 60.0)
        assert self.outcome() in outcomes
        wait_until(f"the ports are open at {host}", lambda: cluster.is_open(self.vm, host))
        cluster.settled(self.vm, 30.0)
        assert not cluster.is_open(self.vm, other)
        self.talk.assert_whole()


@pytest.fixture
def doubt(world: World) -> Doubt:
    return Doubt(world)


def test_rule_doubt_ends_by_the_operators_word_for_the_source(doubt: Doubt) -> None:
    """It goes on there at once; the destination that comes back must not open what it has committed."""
    doubt.show()
    doubt.vm.order("cancel")
    doubt.resolve("h1")
    wait_until("the source is active", lambda: doubt.world.cluster.is_open(doubt.vm, "h1"))
    doubt.talk.assert_whole()
    doubt.bring_back()
    wait_until("the destination has purged", lambda: not instances(doubt.world, "h2", doubt.vm))
    doubt.ends({"aborted"}, "h1", "h2")


def test_rule_doubt_ends_by_the_operators_word_for_the_destination(doubt: Doubt) -> None:
    """Its agent opens when it is back, and the source, which has kept everything, redirects."""
    doubt.show()
    doubt.vm.order("suspend")
    doubt.vm.wait_for_place("h2")
    doubt.resolve("h2")
    assert not doubt.world.cluster.is_open(doubt.vm, "h1")
    doubt.bring_back()
    doubt.ends({"complete", "degraded"}, "h2", "h1")


def test_rule_doubt_ends_when_the_destination_comes_back(doubt: Doubt) -> None:
    doubt.show()
    doubt.vm.order("suspend")
    doubt.vm.wait_for_place("h2")
    doubt.bring_back()
    doubt.ends({"complete", "degraded"}, "h2", "h1")
