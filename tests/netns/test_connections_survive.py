# SPDX-License-Identifier: GPL-2.0-only
"""The promise: no established connection is lost under a default-drop stateful policy."""

from __future__ import annotations

from migrator.lab import oracle

from .traffic import Conversations
from .world import World

SHORT_MS = 2_000  # the real expiry, with timeouts so short that they pass several times in a test


def test_a_thousand_connections(world: World, route: tuple[str, ...]) -> None:
    """Data flows on 1,000 connections, admitted only by state, and every byte agrees."""
    vm, peer = world.vm("h1"), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=500, outbound=500)
    reports = world.follow(vm, route)
    assert all(report.moved["conntrack"] >= 1000 for report in reports)
    talk.assert_whole()
    world.cluster.settled(vm)  # the source has cleaned up
    talk.assert_whole()


def test_connections_outlive_timeouts_that_pass(world: World, route: tuple[str, ...]) -> None:
    """What talks lives, what is silent ends, at the destination as at the source."""
    vm = world.vm("h1", timeouts_ms={"tcp_established": SHORT_MS})
    peer = world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=SHORT_MS / 8)
    silent = Conversations.begin(vm, peer, inbound=0, outbound=5, ipv6=True, every_ms=0)
    world.follow(vm, route)
    rate = talk.total * 64 * 8 / (SHORT_MS / 1e3)  # bytes a second that the flows carry
    talk.flow_on(int(rate * 3 * SHORT_MS / 1e3))
    talk.assert_whole()
    assert len(oracle.connections(world.cluster, route[-1], vm)) == talk.total
    assert silent.check(timeout_s=1.0)["lost"] == silent.total


def test_without_state_connections_are_lost(world: World) -> None:
    """Proof that the tests above can fail: the same move, without the tables."""
    vm, peer = world.vm("h1"), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=100)
    report = world.cluster.migrate(vm, "h2", without_state=True)
    assert report.outcome in ("complete", "degraded")
    assert talk.check(timeout_s=3.0)["lost"] == talk.total
