# SPDX-License-Identifier: GPL-2.0-only
"""A move that fails without a death: the source goes on without a lost connection, and nothing is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import grpc
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until

from .traffic import Conversations, Streams
from .world import World

Failure = Callable[[World, Machine], None]
SLOW = {"memory_ms": 1500, "swallow": False}  # long enough to strike in pre-copy


def in_phase(world: World, vm: Machine, phase: str) -> Iterator[pb.Migration]:
    """Begin a move and give its reports from the first of a phase on."""
    reports = world.cluster.migration(vm, "h2")
    for report in reports:
        if report.phase == phase:
            yield report
            yield from reports
            return
    raise AssertionError(f"the move ended before {phase}: {report}")


def finish(reports: Iterator[pb.Migration]) -> pb.Migration:
    *_, last = reports
    return last


def refused_by_the_path(world: World, vm: Machine) -> None:
    """A switch between the hosts does not pass frames of full size."""
    fabric = world.cluster.name("fabric")
    netns.ip("link", "set", "h2", "mtu", "1400", namespace=fabric)
    try:
        report = world.cluster.migrate(vm, "h2")
    finally:
        netns.ip("link", "set", "h2", "mtu", "1600", namespace=fabric)
    assert report.outcome in ("refused", "aborted") and report.reason, report


def refused_by_the_hypervisor(world: World, vm: Machine) -> None:
    vm.order("behave", refuse=True)
    assert world.cluster.migrate(vm, "h2").outcome in ("refused", "aborted")


def aborted_by_the_operator(world: World, vm: Machine) -> None:
    reports = in_phase(world, vm, "pre-copy")
    first = next(reports)
    world.cluster.coordinator_stub().Abort(pb.MigrationRef(id=first.id), timeout=10)
    assert finish(reports).outcome == "aborted"


def cancelled_at_the_hypervisor(world: World, vm: Machine) -> None:
    reports = in_phase(world, vm, "pre-copy")
    next(reports)
    wait_until("the VM moves", lambda: vm.order("status")["migrating"])
    vm.order("cancel")
    assert finish(reports).outcome == "aborted"


def fails_after_the_commit(world: World, vm: Machine) -> None:
    """The guest runs at the source again when the destination has long committed."""
    vm.order("behave", memory_ms=50, swallow=False, fail_after_ms=150)
    report = world.cluster.migrate(vm, "h2")
    assert report.outcome == "aborted", report


def stream_breaks(world: World, vm: Machine) -> None:
    """The destination falls off the network in pre-copy and comes back later."""
    reports = in_phase(world, vm, "pre-copy")
    next(reports)
    world.cluster.cut("h2")
    try:
        wait_until("the source goes on alone", lambda: not _in_hand(world, "h1", vm), 30.0)
    finally:
        world.cluster.cut("h2", off=False)
    assert finish(reports).outcome == "aborted"


def outcome(world: World, migration: str, reports: Iterator[pb.Migration]) -> str:
    """How a migration ended, whether or not the stream of its reports did."""
    with contextlib.suppress(grpc.RpcError):
        finish(reports)
    return str(wait_until("the migration ends", lambda: _outcome(world, migration), 60.0))


def _outcome(world: World, migration: str) -> str:
    known = world.cluster.coordinator_stub().Migrations(pb.Empty(), timeout=10).migrations
    return next((m.outcome for m in known if m.id == migration and m.done), "")


def _in_hand(world: World, host: str, vm: Machine) -> bool:
    return any(p.instance.vm == vm.uuid and p.instance.migration for p in world.cluster.ports(host))


FAILURES: list[Failure] = [
    refused_by_the_path,
    refused_by_the_hypervisor,
    aborted_by_the_operator,
    cancelled_at_the_hypervisor,
    fails_after_the_commit,
    stream_breaks,
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.__name__.replace("_", " "))
def test_the_source_goes_on(world: World, failure: Failure) -> None:
    world.expected.append(".*")  # a failure is told of; how loud is each daemon's affair
    vm, peer = world.vm("h1", behaviour=SLOW), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=100)
    streams = Streams(vm, peer)
    failure(world, vm)
    wait_until("the guest runs at the source", lambda: vm.place() == "h1")
    world.cluster.settled(vm, 30.0)
    streams.run_on(100)
    streams.assert_perfect()
    talk.assert_whole()
    vm.order("behave", memory_ms=50, swallow=False)
    world.move(vm, "h2")  # nothing of the failure stands in the way of the next
    talk.assert_whole()
