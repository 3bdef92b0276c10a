# SPDX-License-Identifier: GPL-2.0-only
"""What must not wait for a host that is dead."""

from __future__ import annotations

from migrator.lab import oracle
from migrator.lab.processes import wait_until

from .test_failures import outcome
from .test_rules import instances
from .traffic import Conversations
from .world import NUMBERS, World


def test_rule_a_guest_that_had_to_begin_without_its_state_gets_it_afterwards(world: World) -> None:
    """It stopped by itself before its tables were copied, and its source's agent is dead: no connection is lost when
    that one comes back."""
    world.expected.append(".*")
    alone = {"memory_ms": 60_000, "self_stop_ms": 500, "swallow": False}
    vm, peer = world.vm("h1", behaviour=alone), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=10, outbound=10, every_ms=100)
    source = world.cluster.agents["h1"]
    with world.cluster.standing("source.send.section"):
        reports = world.cluster.migration(vm, "h2", deadline_s=60.0)
        migration = next(reports).id
        world.cluster.wait_for("source.send.section")
        vm.wait_for_place("h2")
        source.kill()
    wait_until("its port is open", lambda: world.cluster.is_open(vm, "h2"))
    assert not oracle.connections(world.cluster, "h2", vm), "its state came after all"
    world.cluster.restart(source)
    assert outcome(world, migration, reports) == "degraded"
    talk.assert_whole()
    world.cluster.settled(vm, 30.0)
    assert not world.cluster.is_open(vm, "h1")


def test_rule_a_dead_source_keeps_nothing_waiting(world: World) -> None:
    """The source's agent dies when the destination has committed: connections and broadcast go on without it."""
    world.expected.append(".*")
    vm, peer = world.vm("h1", behaviour={"memory_ms": 50, "swallow": False, "downtime_ms": 500}), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=5, outbound=5, every_ms=50)
    receiver, sender = vm.worker("probe"), peer.worker("probe")
    receiver.call("receive", address="0.0.0.0", port=NUMBERS)
    sender.call("send", flow=3, address="10.1.255.255", port=NUMBERS, every_ms=5)

    def came() -> int:
        return int(receiver.call("report")["flows"].get("3", {}).get("received", 0))

    wait_until("broadcasts arrive", lambda: came() > 20)
    reports = world.cluster.migration(vm, "h2")
    next(reports)
    wait_until(
        "the destination has committed",
        lambda: any(committed for _, committed, _ in instances(world, "h2", vm)),
        interval_s=0.002,
    )
    source = world.cluster.agents["h1"]
    source.kill()
    vm.wait_for_place("h2")
    mark = came()
    wait_until("broadcasts arrive at the destination", lambda: came() > mark + 50, 8.0)
    talk.assert_whole()
    world.cluster.restart(source)
    world.cluster.settled(vm, 30.0)
    assert world.cluster.is_open(vm, "h2") and not world.cluster.is_open(vm, "h1")
