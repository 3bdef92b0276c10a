# SPDX-License-Identifier: GPL-2.0-only
"""A short soak; the long one is `make soak`. SOAK_MINUTES: how long, SEED: another plan."""

from __future__ import annotations

import ast
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from tests.soak import reference
from tests.soak.plan import KINDS, Act, Rule, Step, Try, steps
from tests.soak.reference import OWN, UNATTENDED, WHOLE, Config, Model
from tests.soak.run import chosen, run, say
from tests.soak.scene import FLOWS

MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))  # beside what takes as long in `make test`
SEED = int(os.environ.get("SEED", "1"))


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 400)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")
def test_a_short_soak() -> None:
    """Each sort of step at least once, if there is time; nothing that the reference model does not allow."""
    say(f"seed {SEED}")
    say(run(SEED, chosen(SEED, None, ""), MINUTES))


def test_a_plan_depends_on_its_seed_and_nothing_else() -> None:
    plan = list(islice(steps(7), 60))
    assert plan == list(islice(steps(7), 60))
    assert plan != list(islice(steps(8), 60))
    assert {step.what for step in plan[: len(KINDS)]} == {what for what, _, _ in KINDS}
    assert list(chosen(7, None, "3,5")) == [plan[2], plan[4]]


def test_the_reference_has_no_line_of_the_product() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not [name for name in imported if name.startswith(("migrator", "datapath"))]


@pytest.mark.parametrize(("first", "second", "word"), [("v2", "v1", "never"), ("v1", "v2", "changed")])
def test_what_two_hosts_let_through_while_they_hear_of_a_change(first: str, second: str, word: str) -> None:
    """Neither version lets v1's datagrams to v2: one end forbids them before, the other one afterwards."""
    flow = next(flow for flow in FLOWS if (flow.sender, flow.receiver) == ("v1", "v2"))
    model = Model()
    whole, shut = model.config.rules["v1"], ()
    before = replace(model.config, rules={**model.config.rules, "v1": whole, "v2": shut})
    after = replace(before, rules={**before.rules, first: shut, second: whole})
    model.config, model.versions = after, [before, after]
    assert model.allowed(flow) == word


def test_what_a_guest_that_stops_by_itself_may_lose() -> None:
    """The first that it sends where nobody looks after its device yet, and what its report names."""
    flow = next(flow for flow in FLOWS if (flow.sender, flow.receiver) == ("v1", "v2"))
    model = Model()
    for guest, missing in (("v1", UNATTENDED), ("v2", 2), ("v3", 0)):
        model.begin(Step(1, "alone", (Act("move", guest, hops=(1,), hypervisor=(("self_stop_ms", 30.0),)),)))
        model.moved(guest, model.places[guest], "h3", "complete", 2)
        assert model.frames(flow).missing == missing
        assert model.frames(flow).at_once == (guest == "v1")


@pytest.mark.parametrize(("alone", "may"), [(True, True), (False, False)])
def test_a_coordinator_that_stands_costs_only_a_guest_that_waits_for_nobody(alone: bool, may: bool) -> None:
    behaviour = (("self_stop_ms", 100.0),) if alone else ()
    move = Act("move", "v1", hops=(1,), hypervisor=behaviour)
    model = Model()
    model.begin(Step(1, "", (move, Act("freeze", "coordinator", for_ms=10_000))))
    assert ("degraded" in model.outcomes(move, "h1", "h2")) == may


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        (WHOLE, "allow"),
        ((), "drop"),
        ((Rule("to", 5, "tcp", ("10.1.0.1/32",), (7000, 7001), "reject"), *WHOLE), "reject"),
        ((Rule("to", 5, "tcp", ("@near",), (7000, 7000), "drop"), *WHOLE), "drop"),
        ((Rule("to", 5, "tcp", ("@far",), (7000, 7000), "drop"), *WHOLE), "allow"),
        ((Rule("from", 5, "tcp", (), (7000, 7001), "drop"), *WHOLE), "allow"),
        ((Rule("to", 5, "udp", (), (7000, 7001), "drop"), *WHOLE), "allow"),
        ((*WHOLE, Rule("to", 999, "tcp", (), (7000, 7001), "drop")), "allow"),
    ],
)
def test_what_the_reference_says_of_a_newcomer(rules: tuple[Rule, ...], word: str) -> None:
    model = Model()
    policies = {**model.config.rules, "v2": rules}
    model.config = Config(policies, {"near": ("10.1.0.0/24",), "far": ("10.2.0.0/24",)}, model.config.attached)
    assert model.config.attached["v2"] == OWN
    assert model.admitted(Try("v1", "v2", "blue", "tcp", 7000, six=False)) == word
