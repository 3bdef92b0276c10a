# SPDX-License-Identifier: GPL-2.0-only
"""What the operator's command says, against the model: ports, hosts, migrations, rules, connections."""

from __future__ import annotations

import json
from typing import Any

from tests.soak.actions import Wrong
from tests.soak.checks import Checks
from tests.soak.lab import SoakLab
from tests.soak.reference import OWN, Model
from tests.soak.scene import GROUPS, HOSTS, MACHINES, VMS


def look(lab: SoakLab, model: Model, checks: Checks) -> None:
    """Of all, and of one VM in turn what its host's agent says. Raises Wrong."""
    vm = VMS[model.step.number % len(VMS)]
    ports = {port["mac"]: port["host"] for port in _said(lab, "control", "port", "list")}
    wanted = {nic.mac: model.places[name] for name, m in MACHINES.items() for nic in m.nics}
    hosts = {host["name"]: host["connected"] for host in _said(lab, "control", "host", "list")}
    running = _said(lab, "control", "migration", "list", "--running")
    if (ports, hosts, running) != (wanted, dict.fromkeys(HOSTS, True), []):
        raise Wrong(f"the operator sees ports {ports}, hosts {hosts}, migrations {running}")
    _rules(lab, model, vm)
    _connections(lab, model, checks, vm)


def _rules(lab: SoakLab, model: Model, vm: str) -> None:
    rules = _said(lab, model.places[vm], "acl", "show", lab.by_name[vm].uuid)
    shown = sorted({(rule["priority"], rule["action"]) for rule in rules if "priority" in rule})
    wanted = sorted((rule.priority, rule.action) for rule in model.config.applied(vm))
    if model.config.attached[vm] == OWN and shown != wanted:
        raise Wrong(f"the operator sees rules {shown} of {vm}, not {wanted}")


def _connections(lab: SoakLab, model: Model, checks: Checks, vm: str) -> None:
    """Those that the model knows are there, with the arrow the right way."""
    shown = {
        (row["laddr"], row["lport"], row["raddr"], row["rport"]): "INBOUND" in row["flags"]
        for row in _said(lab, model.places[vm], "conntrack", "list", lab.by_name[vm].uuid)
        if row["proto"] == "tcp" and row["state"] == "ESTABLISHED"
    }
    for group in GROUPS:
        for name, key in checks.keys(group) if group.name in checks.open else ():
            if name == vm and shown.get(key) is not (vm == group.server):
                raise Wrong(f"the operator sees {key} of {vm} inbound {shown.get(key)}, not {vm == group.server}")


def _said(lab: SoakLab, where: str, *words: str) -> list[dict[str, Any]]:
    """Data that a command prints on a host: one JSON document, or one a line."""
    done = lab.cluster.cli("--json", *words, host="" if where == "control" else where)
    if done.returncode:
        raise Wrong(f"migrator {' '.join(words)}: {done.stdout}{done.stderr}")
    if words[0] == "conntrack":
        return [json.loads(line) for line in done.stdout.splitlines()]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
