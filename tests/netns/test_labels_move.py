# SPDX-License-Identifier: GPL-2.0-only
"""Marks and labels on whole hosts: given by rules, changed by the operator's command at any moment of a move, judged by
where the VM has gone."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from datapath.errors import NotReady, PortNotFound
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.rpc import received
from migrator.lab import oracle
from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until

from .test_failures import finish, in_phase
from .traffic import Conversations
from .world import SERVICE, World

TCP: dict[str, Any] = {"protocol": "tcp", "ports": [str(SERVICE)], "priority": 20}
GIVES = [
    {"direction": "to", "action": "allow", **TCP, "set_label": "0x1/0x1", "set_mark": "0x7"},
    {"direction": "from", "action": "allow", **TCP, "set_mark": "0x70/0xf0"},
]
ASKS = [
    {"direction": "from", "action": "reject", "protocol": "any", "priority": 10, "mark": "0x500/0x500"},
    {"direction": "from", "action": "allow", **TCP},
    {"direction": "to", "action": "allow", **TCP, "label": "0x200/0x200"},
]
COUNT = 25
ENDLESS, SHORT = {"memory_ms": 600_000, "swallow": False}, {"memory_ms": 1, "swallow": False}
INBOUND, OUTBOUND = "flags=INBOUND", "flags!=INBOUND"
Words = dict[tuple[int, int], tuple[int, int]]
"""Port of the guest, port of the peer -> mark, label."""


def declare(world: World, name: str, rules: list[dict[str, Any]]) -> None:
    file = world.cluster.directory / f"{name}.yaml"
    file.write_text(json.dumps({"policies": [{"name": name, "rules": rules}]}))
    ran = world.cluster.cli("apply", "-f", str(file))
    assert ran.returncode == 0, ran.stdout + ran.stderr


def set_label(world: World, vm: Machine, host: str, *words: str) -> subprocess.CompletedProcess[str]:
    return world.cluster.cli("conntrack", "set-label", vm.name, *words, host=host)


def changes(world: World, vm: Machine, host: str, *words: str) -> None:
    """The operator's command changes half of the connections."""
    ran = set_label(world, vm, host, *words)
    assert (ran.returncode, ran.stdout) == (0, f"{COUNT} of {COUNT} connections changed\n"), ran.stderr


def refused(world: World, vm: Machine, host: str, *words: str) -> None:
    ran = set_label(world, vm, host, "--all", "--mark", "0xbad")
    assert ran.returncode != 0 and not ran.stdout
    assert all(word in ran.stderr for word in words), ran.stderr


def shown(world: World, vm: Machine, host: str) -> Words:
    """As `migrator conntrack` has it."""
    ran = world.cluster.cli("--json", "conntrack", "list", vm.name, host=host)
    assert ran.returncode == 0, ran.stderr
    return words([json.loads(line) for line in ran.stdout.splitlines()])


def saved(world: World, vm: Machine, host: str) -> Words:
    """As a snapshot has it."""
    file = str(world.cluster.directory / f"{vm.name}.mgs")
    for command in (("checkpoint", vm.name, "-o", file), ("inspect", file, "--records", "--json")):
        ran = world.cluster.cli(*command, host=host)
        assert ran.returncode == 0, ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    return words([one["record"] for one in told if one.get("kind") == "conntrack"])


def words(records: list[dict[str, Any]]) -> Words:
    return {
        (one["lport"], one["rport"]): (one["mark"], int(one.get("label", "0x0"), 16))
        for one in records
        if one["type"] == 0 and one["proto"] == "tcp"
    }


def changed(before: Words, *, inbound: tuple[int, int] = (0, 0), outbound: tuple[int, int] = (0, 0)) -> Words:
    """With these bits of mark and label as well."""
    return {
        key: (mark | more[0], label | more[1])
        for key, (mark, label) in before.items()
        for more in [inbound if key[0] == SERVICE else outbound]
    }


def test_the_operators_word_at_any_moment_of_a_move(world: World) -> None:
    """Before, in the first copy and after it is carried out; while the guest stands it is refused."""
    declare(world, "labelled", GIVES)
    vm, peer = world.vm("h1", policy="labelled", behaviour=ENDLESS), world.peer("h3")
    trusted = Conversations.begin(vm, peer, inbound=COUNT, outbound=0, every_ms=100)
    others = Conversations.begin(vm, peer, inbound=0, outbound=COUNT, every_ms=100)
    given = shown(world, vm, "h1")
    assert sorted(given.values()) == [(7, 1)] * COUNT + [(0x70, 0)] * COUNT
    changes(world, vm, "h1", "--match", "label=0x1/0x1", "--label", "0x100/0x100")
    with world.cluster.standing("destination.committing"):
        reports = in_phase(world, vm, "pre-copy")
        next(reports)
        changes(world, vm, "h1", "--match", OUTBOUND, "--mark", "0x500/0xf00")
        refused(world, vm, "h2", "is staged here", "on the host where it is then")
        vm.order("behave", **SHORT)  # its memory is at the destination from now on
        world.cluster.wait_for("destination.committing")
        refused(world, vm, "h1", "is quiesced here", "on the host where it is then")
    assert finish(reports).outcome == "complete"
    expected = changed(given, inbound=(0, 0x100), outbound=(0x500, 0))
    assert shown(world, vm, "h2") == expected
    refused(world, vm, "h1", "has no port on h1", "migrator vm show")
    changes(world, vm, "h2", "--match", INBOUND, "--match", "mark=7", "--label", "0x200/0x200", "--mark", "0x8/0x8")
    world.move(vm, "h1")
    expected = changed(expected, inbound=(8, 0x200))
    assert shown(world, vm, "h1") == expected == saved(world, vm, "h1")
    for talk in (trusted, others):
        talk.assert_whole()
    judged(world, vm, trusted, others)


def judged(world: World, vm: Machine, trusted: Conversations, others: Conversations) -> None:
    """At the host to which the VM has moved: rules that ask for marks and labels see those that came along."""
    declare(world, "labelled", ASKS)
    wait_until("all that the new rules end have ended", lambda: others.check(timeout_s=0.5)["lost"] == COUNT)
    trusted.assert_whole()
    assert set(shown(world, vm, "h1").values()) == {(15, 0x301)}
    assert set_label(world, vm, "h1", "--all", "--label", "0/0x200").returncode == 0
    assert trusted.check(timeout_s=1.0)["lost"] == COUNT, "what the operator took away"


class Marker:
    """Somebody who gives all connections of a VM another mark, again and again, at both hosts."""

    def __init__(self, world: World, vm: Machine) -> None:
        self._stubs = [world.cluster.agent_stub(host) for host in ("h1", "h2")]
        self._vm, self._stop = vm, threading.Event()
        self.last = self.done = 0
        self.refusals: list[Exception] = []

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.002):
            number += 1
            for stub in self._stubs:
                self._mark(stub, number)

    def _mark(self, stub: Any, number: int) -> None:
        try:
            reply = stub.Relabel(pb.RelabelRequest(vm=self._vm.uuid, mark=str(number)), timeout=20)
        except grpc.RpcError as error:
            self.refusals.append(received(error, "agent"))
        else:
            assert reply.changed == reply.matched
            self.last, self.done = number, self.done + 1


@pytest.mark.parametrize("way", ["there and back", "fails late"])
def test_no_word_is_lost_and_none_comes_twice(world: World, way: str) -> None:
    """Marks change all along. What was answered as done is what the VM has in the end; the rest was refused by name."""
    vm, peer = world.vm("h1", policy="server"), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=10)
    marker = Marker(world, vm)
    with marker.marking():
        wait_until("marks change", lambda: marker.done > 20)
        if way == "fails late":
            world.expected.append(".*")
            vm.order("behave", swallow=False, fail_after_ms=150)
            assert world.cluster.migrate(vm, "h2").outcome == "aborted"
            world.cluster.settled(vm)
        else:
            world.follow(vm, ("h2", "h1"), within_s=20.0)
        done = marker.done
        wait_until("marks change again", lambda: marker.done > done + 20)
    assert {type(error) for error in marker.refusals} == {NotReady, PortNotFound}
    columns = oracle.columns(world.cluster, "h1", vm)
    assert set(columns["mark"].tolist()) == {marker.last} and len(columns["mark"]) == talk.total
    talk.assert_whole()
