# SPDX-License-Identifier: GPL-2.0-only
"""What the policy forbids stays forbidden: before, during and after a move, from the first packet."""

from __future__ import annotations

from migrator.lab.processes import wait_until

from .traffic import Streams
from .world import NUMBERS, World

FORBIDDEN = NUMBERS + 500


def test_forbidden_stays_forbidden(world: World, route: tuple[str, ...]) -> None:
    """A forbidden stream runs all along, each way, beside an allowed one; not one of its frames arrives."""
    vm, peer = world.vm("h1"), world.peer("h3")
    allowed = Streams(vm, peer)
    ends = {vm: peer, peer: vm}
    receivers = {machine: machine.worker("probe") for machine in ends}
    for machine, other in ends.items():
        receivers[machine].call("receive", address="0.0.0.0", port=FORBIDDEN)
        sender = machine.worker("probe")
        sender.call("send", flow=5, address=other.address, port=FORBIDDEN, every_ms=1)
    world.follow(vm, route)
    allowed.run_on(500)
    for machine, receiver in receivers.items():
        assert receiver.call("report")["flows"] == {}, f"forbidden numbers reached {machine.name}"
    allowed.assert_perfect()


def test_forbidden_by_a_change_under_way(world: World) -> None:
    """A rule that is taken away while the VM moves ends its connections at the destination, too."""
    world.cluster.apply(policies=[_policy("fleeting", allowed=True)])
    vm, peer = world.vm("h1", policy="fleeting", behaviour={"memory_ms": 700}), world.peer("h3")
    streams = Streams(vm, peer)
    changed = False
    for report in world.cluster.migration(vm, "h2"):
        if report.phase in ("pre-copy", "authorised") and not changed:
            world.cluster.apply(policies=[_policy("fleeting", allowed=False)])
            changed = True
    assert changed and report.outcome == "complete", report
    wait_until("the stream to the guest ends", lambda: _stalled(streams))


def _stalled(streams: Streams) -> bool:
    """No number arrived while a hundred were sent."""
    before, mark = streams.received(1), streams.sent(1)
    wait_until("a hundred are sent", lambda: streams.sent(1) >= mark + 100)
    return streams.received(1) == before


def _policy(name: str, *, allowed: bool) -> dict[str, object]:
    rule = {"direction": "to", "priority": 1, "protocol": "udp", "ports": [str(NUMBERS)], "action": "allow"}
    back = {"direction": "from", "priority": 1, "protocol": "udp", "ports": [str(NUMBERS)], "action": "allow"}
    return {"name": name, "rules": [rule, back] if allowed else [back]}
