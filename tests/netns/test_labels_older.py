# SPDX-License-Identifier: GPL-2.0-only
"""A host whose agent is of before marks, labels and windows: what it would misread or go without is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from migrator.lab.machines import Machine
from migrator.lab.processes import Daemon

from .test_failures import finish, in_phase
from .test_labels_move import ENDLESS, GIVES, SHORT, declare, set_label
from .test_upgrade import hosts, replace
from .test_window import declare as declare_window
from .traffic import Conversations
from .versions import Edit, Version, make_version
from .world import POLICIES, World

__all__ = ["hosts"]

# What the release before brought neither: rules that speak of labels, the operator's command, kind `window`.
BEFORE = (
    Edit("datapath/state/acl.py", "    version=2,\n", "    version=1,\n"),
    Edit("datapath/registry.py", "    WINDOW,\n", ""),
    Edit("datapath/drivers/ebpf/configured.py", "    WindowTable,\n", ""),
    Edit("migrator/_pb/migrator_pb2_grpc.py", "'Relabel': grpc", "'Nothing': grpc"),
)
RULES = "the agent of h2 knows no rules with set_mark (policy narrow)"
WINDOW = "host h2 holds no state of kind window (port {mac})"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("versions"), "9.0.0", *BEFORE)


def said(world: World, vm: Machine, to: str) -> str:
    """Why `migrator migrate` refused; the VM stays and is as it was."""
    ran = world.cluster.cli("migrate", vm.name, "--to", to)
    assert ran.returncode != 0
    assert vm.place() == "h1" and world.cluster.is_open(vm, "h1")
    return ran.stdout + ran.stderr


def policy(world: World, name: str, rules: list[dict[str, Any]]) -> str:
    """What `migrator apply` says against a policy."""
    file = world.cluster.directory / f"{name}.yaml"
    file.write_text(json.dumps({"policies": [{"name": name, "rules": rules}]}))
    ran = world.cluster.cli("apply", "-f", str(file))
    assert ran.returncode != 0
    return ran.stderr


def test_it_is_refused_by_name_and_nothing_else_is(hosts: World, before: Version) -> None:
    world, older = hosts, before.applied(hosts.cluster.agents["h2"])
    plain: list[dict[str, Any]] = POLICIES[0]["rules"]
    declare(world, "narrow", GIVES)
    declare(world, "wide", plain)
    replace(world, "h2", older, Daemon.stop)
    world.expected.append(".*")  # what is refused is told of
    labelled, vm = world.vm("h1", policy="narrow"), world.vm("h1", policy="wide", behaviour=ENDLESS)
    peer = world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=10, outbound=10, every_ms=100)
    assert RULES in said(world, labelled, "h2")
    declare_window(world, vm, {"check": "strict"})
    assert WINDOW.format(mac=vm.ports[0].mac) in said(world, vm, "h2")
    declare_window(world, vm, None)
    moving = in_phase(world, vm, "pre-copy")
    next(moving)  # from here on the configuration goes to both hosts
    refusal = policy(world, "wide", GIVES)
    assert "the agent of h2 " in refusal and "knows no rules with set_mark" in refusal and "abort it" in refusal
    ran = world.cluster.cli("port", "set", f"{vm.uuid}/{vm.ports[0].mac}", "window", "{}")
    assert ran.returncode != 0 and "host h2 holds no state of kind window" in ran.stderr
    vm.order("behave", **SHORT)
    assert finish(moving).outcome == "complete"
    talk.assert_whole()
    assert "the agent of h2 " in policy(world, "wide", GIVES)
    ran = set_label(world, vm, "h2", "--all", "--mark", "1")
    assert ran.returncode != 0 and "does not know this call" in ran.stderr and "upgrade" in ran.stderr
    vm.order("behave", **SHORT)
    world.move(vm, "h1")
    talk.assert_whole()
