# SPDX-License-Identifier: GPL-2.0-only
"""Ways a move can go, so that the crash matrix comes to every point: most need that something went wrong before."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from migrator._pb import migrator_pb2 as pb

from .matrix import Going, Move, Stage, asked, ended, go_on, known, record, recorded, stands
from .matrix_faults import Roles, bad, pass_time
from .world import POLICIES

QUICK: Mapping[str, Any] = {"memory_ms": 50, "swallow": False, "downtime_ms": 100}
LONG_MS = 20_000  # the guest's memory does not converge in this test
Act = Callable[[Roles, Move], None]


@dataclass(frozen=True)
class Scenario:
    """`behaviour` of the hypervisor; at `first`, a point before all others that it is for, `act` is done."""

    name: str
    behaviour: Mapping[str, Any] = field(default_factory=lambda: QUICK)
    first: str = ""
    act: Act | None = None

    def begin(self, stage: Stage, point: str) -> tuple[Roles, Going]:
        """Begin the move. Whoever comes to `point` (after `first`) will stand; RECORD: nobody will."""
        here = stage.vm.place()
        roles = Roles(stage, here, stage.other(here))
        stage.vm.order("behave", **self.behaviour)
        stage.cluster.fault_file.write_text(self.first or point)
        move = Move(stage, roles.there)
        if self.first:
            assert stands(stage, move) is not None, f"nobody came to {self.first}"
            stage.cluster.fault_file.write_text(point)
            if self.act is not None:
                self.act(roles, move)
            else:
                go_on(stage)
        return roles, move


def _late(seconds: float) -> Act:
    """The source says its last word late: the guest is at the destination before."""

    def act(roles: Roles, _: Move) -> None:
        roles.stage.vm.wait_for_place(roles.there)
        pass_time(seconds)
        os.kill(roles.daemon("A").pid, signal.SIGCONT)

    return act


def _severed(roles: Roles, move: Move) -> None:
    bad("AB", "cut").strike(roles, move)


def _recoordinated(roles: Roles, move: Move) -> None:
    bad("CA", "cut").strike(roles, move)
    bad("CB", "cut").strike(roles, move)


def _aborted(roles: Roles, move: Move) -> None:
    go_on(roles.stage)
    if move.last is not None:
        with contextlib.suppress(grpc.RpcError):
            roles.stage.cluster.coordinator_stub().Abort(pb.MigrationRef(id=move.last.id), timeout=5)


def _changed(roles: Roles, _: Move) -> None:
    """Configuration changes while the tables are copied, and a port of another VM goes."""
    cluster = roles.stage.cluster
    go_on(roles.stage)
    rule = {"direction": "to", "priority": 90, "protocol": "udp", "ports": ["5"], "action": "allow"}
    wider = [{**one, "rules": [*one["rules"], rule]} if one["name"] == "server" else one for one in POLICIES]
    port = {"vm": OTHER, "mac": "02:00:00:00:00:77", "network": "blue", "host": roles.here, "device": "none0"}
    removal = pb.Removal(sort="port", name=f"{OTHER}/{port['mac']}")
    roles.stage.change(
        lambda: cluster.apply(policies=wider),
        lambda: cluster.apply(ports=[port]),
        lambda: cluster.coordinator_stub().Remove(removal, timeout=10),
        lambda: cluster.apply(policies=POLICIES),
    )


def _unauthorised(roles: Roles, _: Move) -> None:
    pass_time(0.6)  # the guest stops by itself meanwhile
    os.kill(roles.daemon("C").pid, signal.SIGCONT)


OTHER = "7b1a3f0c-3d0e-4c8e-9d5c-000000000077"
SCENARIOS: list[Scenario] = [
    Scenario("plain"),
    Scenario("stops by itself", {**QUICK, "memory_ms": LONG_MS, "self_stop_ms": 400}),
    Scenario("fails late", {**QUICK, "fail_after_ms": 150, "downtime_ms": 5_000}),
    Scenario("refused", {**QUICK, "refuse": True}),
    Scenario("aborted", {**QUICK, "memory_ms": 3_000}, "source.converged", _aborted),
    Scenario("severed", {**QUICK, "downtime_ms": 600}, "source.suspending", _severed),
    Scenario("severed early", {**QUICK, "memory_ms": 3_000}, "source.copying", _severed),
    Scenario(
        "unauthorised", {**QUICK, "memory_ms": 20_000, "self_stop_ms": 200}, "coordinator.pre-copy", _unauthorised
    ),
    Scenario("late", QUICK, "source.final", _late(0.2)),
    Scenario("too late", QUICK, "source.final", _late(1.5)),
    Scenario("changed", {**QUICK, "memory_ms": 1_000}, "source.copying", _changed),
    Scenario("attached anew", {**QUICK, "memory_ms": 4_000}, "source.copying", _recoordinated),
    Scenario("slow", {**QUICK, "downtime_ms": 4_500}),
]
RESTARTING = "unit/test_agent_failures::test_rule_more_changes_than_can_be_noted_begin_the_copy_again"
UNLOADABLE = "unit/test_agent_failures::test_a_destination_that_cannot_load_gives_the_guest_back"
RESERVED = "reserved: nothing sends it"
UNREACHED = {
    "source.send.restart": RESTARTING,
    "destination.got.restart": RESTARTING,
    "destination.send.failed": UNLOADABLE,
    "source.got.failed": UNLOADABLE,
    "source.send.judged": RESERVED,
    "destination.got.judged": RESERVED,
    "agent.send.instance": RESERVED,
    "coordinator.got.instance": RESERVED,
}
"""Points that no scenario comes to: the test that does, or why none can."""


class Played(Protocol):
    """What a case needs of a scenario."""

    @property
    def name(self) -> str: ...

    def begin(self, stage: Stage, point: str) -> tuple[Roles, Going]: ...


def trace(stage: Stage, scenario: Played) -> list[str]:
    """Points that the scenario comes to, in order; those before `first` are not among them."""
    before = known(stage)
    recorded(stage)
    with asked(stage, ""):
        record(stage)
        _, move = scenario.begin(stage, "?")
        move.join(60.0)
        stage.rest()
        found = recorded(stage)
    assert ended(stage, before) is not None
    return found
