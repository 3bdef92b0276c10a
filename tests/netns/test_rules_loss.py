# SPDX-License-Identifier: GPL-2.0-only
"""What must not wait for a host that is dead."""

from __future__ import annotations

from migrator.lab.processes import wait_until

from .test_rules import instances
from .traffic import Conversations
from .world import NUMBERS, World


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
        20.0,
        0.002,
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
