# SPDX-License-Identifier: GPL-2.0-only
"""What is really so after a step, against the model: places, rules, connections, numbers, newcomers, counters."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import grpc

from migrator._pb import migrator_pb2 as pb
from migrator.lab import oracle
from migrator.lab.errors import LabError
from migrator.lab.processes import wait_until
from tests.soak.actions import Wrong
from tests.soak.lab import SoakLab
from tests.soak.plan import Rule, Try
from tests.soak.reference import NONE, OWN, Model
from tests.soak.scene import FLOWS, GROUPS, HOSTS, MACHINES, VMS, Flow, Group

QUIET_S = 90.0  # until nothing of a step is under way
LIVES_S = 30.0  # for a message over a connection, TCP's own repetition after an outage included
CUT_S = 8.0  # until a connection that must be cut is silent
SILENT_S = 1.0  # no answer for so long is silence
PATIENCE_S = {"allow": 15.0, "drop": 1.2, "reject": 8.0}
TCP = 6

Key = tuple[str, int, str, int]  # the guest's address and port, the other's


class Checks:
    """`totals` counts what was looked at, for the report."""

    def __init__(self, lab: SoakLab, model: Model) -> None:
        self.lab, self.model, self.cluster = lab, model, lab.cluster
        self.open: dict[str, list[int]] = {}  # group -> own ports of its connections
        self.former: set[tuple[str, Key]] = set()  # connections that were there once, by VM
        self.ids: dict[tuple[str, Key], int] = {}
        self.first: dict[int, int] = {}  # flow -> number that the next window begins with
        self.doubled: dict[int, int] = {}
        self.late: dict[int, int] = {}
        self.hits: dict[tuple[str, str, int], int] = {}  # VM, network, priority of the rule
        self.owed: dict[tuple[str, str, int], int] = {}  # that the step must have added
        self.totals = dict.fromkeys(("newcomers", "datagrams", "connections cut", "connections opened"), 0)
        self._tried = 0

    # ---- places ----

    def quiet(self) -> None:
        """Until all is where it belongs and nothing of a migration is left."""
        self.lab.wait_attached()
        found: list[str] = []

        def look() -> bool:
            try:
                found[:] = self._unquiet()
            except grpc.RpcError as error:
                found[:] = [f"{error.code()}: {error.details()}"]
            return not found

        try:
            wait_until("all is quiet", look, QUIET_S, 0.1)
        except LabError:
            raise Wrong(f"not quiet within {QUIET_S} s: {found}") from None

    def _unquiet(self) -> list[str]:
        seen: dict[str, list[str]] = {name: [] for name in MACHINES}
        problems: list[str] = []
        for host in HOSTS:
            for port in self.cluster.ports(host):
                name = self.lab.by_uuid[port.instance.vm]
                seen[name].append(host)
                idle = not (port.instance.migration or port.held_to or port.held_from)
                if port.instance.state != "active" or port.gate != "local" or not idle:
                    problems.append(f"{name} at {host}: {port.instance}, gate {port.gate}")
        for name, hosts in seen.items():
            wanted = [self.model.places[name]] * len(MACHINES[name].nics)
            if hosts != wanted:
                problems.append(f"{name} has ports at {hosts}, not {wanted}")
        problems += [f"{vm} does not run at {self.model.places[vm]}" for vm in VMS if not self._runs(vm)]
        declared = self.cluster.coordinator_stub().Show(pb.Empty(), timeout=10).ports
        problems += [
            f"the coordinator has {self.lab.by_uuid[port.vm]} at {port.host}"
            for port in declared
            if port.host != self.model.places[self.lab.by_uuid[port.vm]]
        ]
        return problems + [f"unfinished: {m.id} {m.phase}" for m in self.lab.migrations().values() if not m.done]

    def _runs(self, vm: str) -> bool:
        return self.lab.runs_at(vm) == self.model.places[vm]

    def rules(self) -> None:
        """Each host applies the newest rules, address sets resolved."""
        for vm in VMS:
            wanted = sorted(_rule(rule) for rule in self.model.config.applied(vm))
            if self.model.config.attached[vm] not in (OWN, NONE):
                continue
            found: list[Any] = []

            def look(vm: str = vm, wanted: list[Any] = wanted, found: list[Any] = found) -> bool:
                records = self.lab.rules(vm, self.model.places[vm])
                by_mac = [[r for (m, n), r in records.items() if m == nic.mac and n] for nic in MACHINES[vm].nics]
                found[:] = [sorted(_record(r) for r in rules if "priority" in r) for rules in by_mac]
                return all(rules == wanted for rules in found)

            try:
                wait_until("rules", look, 20.0, 0.1)
            except LabError:
                raise Wrong(f"{vm} at {self.model.places[vm]} has rules {found}, not {wanted}") from None

    # ---- connections ----

    def connections(self) -> None:
        """Those that must live do, those that must not are silent; what may be again is opened."""
        fates = {group.name: self.model.fate(group) for group in GROUPS if group.name in self.open}
        self._ask()
        self._wait_whole([group for group in GROUPS if fates.get(group.name) == "lives"])
        self._wait_cut([group for group in GROUPS if fates.get(group.name) == "cut"])
        for group in GROUPS:
            if fates.get(group.name) in ("cut", "either"):
                self._drop(group)
        self._tables()
        for group in GROUPS:
            if group.name not in self.open and self._allowed(group):
                self._open(group)

    def _ask(self) -> None:
        for talker in self.lab.talkers.values():
            talker.call("ask")

    def _verdicts(self, groups: Iterable[Group]) -> dict[str, dict[str, str]]:
        """By group and own port of a connection."""
        clients = {group.client for group in groups}
        answers = {name: self.lab.talkers[name].call("verdicts") for name in clients}
        return {group.name: answers[group.client][group.name] for group in groups}

    def _wait_whole(self, groups: list[Group]) -> None:
        found: dict[str, dict[str, str]] = {}

        def whole() -> bool:
            found.update(self._verdicts(groups))
            return all(word == "whole" for words in found.values() for word in words.values())

        try:
            wait_until("connections live", whole, LIVES_S, 0.1)
        except LabError:
            lost = {name: {p: w for p, w in words.items() if w != "whole"} for name, words in found.items()}
            raise Wrong(f"connections lost: { {name: words for name, words in lost.items() if words} }") from None

    def _wait_cut(self, groups: list[Group]) -> None:
        deadline = time.monotonic() + CUT_S
        while groups:
            self._ask()
            wait_until("silence has lasted", partial(_passed, time.monotonic() + SILENT_S))
            living = {
                name: ports
                for name, words in self._verdicts(groups).items()
                if (ports := [port for port, word in words.items() if word == "whole"])
            }
            if not living:
                break
            if time.monotonic() > deadline:
                raise Wrong(f"connections that the policy forbids still live: {living}")
        self.totals["connections cut"] += sum(group.count for group in groups)

    def _allowed(self, group: Group) -> bool:
        return self.model.admitted(_as_try(group)) == "allow"

    def _open(self, group: Group) -> None:
        client = self.lab.talkers[group.client]
        address = MACHINES[group.server].address(group.network, six=group.six)
        order = {"group": group.name, "address": address, "port": group.port, "count": group.count}
        client.ask("open", **order, timeout_s=15)
        answer = client.answer("open", 30.0)
        if answer["failed"]:
            raise Wrong(f"{group.name}: {answer} although the policy allows them")
        client.call("flow", group=group.name, every_ms=300, size=100)
        self.open[group.name] = [int(port) for port in self._verdicts([group])[group.name]]
        self.former |= set(self.keys(group))
        self._owe(_as_try(group), group.count)
        self.totals["connections opened"] += group.count

    def _drop(self, group: Group) -> None:
        self.lab.talkers[group.client].call("drop", group=group.name)
        for key in self.keys(group):
            self.ids.pop(key, None)
        del self.open[group.name]

    def keys(self, group: Group) -> Iterator[tuple[str, Key]]:
        """Of a group's connections, at both VMs."""
        here = MACHINES[group.client].address(group.network, six=group.six)
        there = MACHINES[group.server].address(group.network, six=group.six)
        for port in self.open[group.name]:
            yield group.client, (here, port, there, group.port)
            yield group.server, (there, group.port, here, port)

    def _tables(self) -> None:
        """Every connection that lives is in the tables of its VMs, under the id that it had; and no unknown one is."""
        living = {key for group in GROUPS if group.name in self.open for key in self.keys(group)}
        for vm in VMS:
            rows = oracle.connections(self.cluster, self.model.places[vm], self.lab.by_name[vm])
            found = {(vm, (r.local, r.local_port, r.remote, r.remote_port)): r for r in rows if r.protocol == TCP}
            for key in (key for key in living if key[0] == vm):
                row = found.get(key)
                if row is None or row.state != "ESTABLISHED" or self.ids.setdefault(key, row.id) != row.id:
                    raise Wrong(f"{key} is {row} in the table at {self.model.places[vm]}, was {self.ids.get(key)}")
            strange = [k for k, row in found.items() if row.state == "ESTABLISHED" and k not in self.former]
            if strange:
                raise Wrong(f"connections that nobody opened: {strange}")

    # ---- numbers ----

    def start_flows(self) -> None:
        for flow in FLOWS:
            receiver = MACHINES[flow.receiver].address(flow.network, six=False)
            order = {"flow": flow.number, "address": receiver, "port": flow.port, "every_ms": 20}
            self.lab.talkers[flow.sender].ask("send", **order, source_port=flow.source_port)
            self.lab.talkers[flow.sender].answer("send")
            self.first[flow.number] = self.doubled[flow.number] = self.late[flow.number] = 0

    def flows(self) -> None:
        """The numbers of this step, all of which were sent while its versions of the policy held."""
        for flow in FLOWS:
            first, below = self.first[flow.number], self._sent(flow)
            came = self._came(flow, first, below)
            self._judge(flow, came, below - first)
            self.first[flow.number] = self._sent(flow)
            self.doubled[flow.number], self.late[flow.number] = came["doubled"], came["overtaken"]
            self.totals["datagrams"] += below - first

    def _sent(self, flow: Flow) -> int:
        return int(self.lab.talkers[flow.sender].call("sending", flow=flow.number)["sent"])

    def _came(self, flow: Flow, first: int, below: int) -> dict[str, Any]:
        """What came of a window, once later numbers have come as well."""
        goal = below if self.model.flows_now(flow) else 0
        answer: dict[str, Any] = {}

        def whole() -> bool:
            answer.update(self.lab.talkers[flow.receiver].call("window", flow=flow.number, first=first, below=below))
            return bool(answer["newest"] >= goal)

        try:
            wait_until("numbers arrive", whole, 30.0, 0.05)
        except LabError:
            raise Wrong(f"{flow}: nothing after number {answer['newest']} came, {goal} was sent") from None
        return answer

    def _judge(self, flow: Flow, came: dict[str, Any], sent: int) -> None:
        allowed, may = self.model.allowed(flow), self.model.frames(flow)
        late = came["overtaken"] - self.late[flow.number]
        wrong = []
        if came["doubled"] != self.doubled[flow.number]:
            wrong.append(f"{came['doubled'] - self.doubled[flow.number]} doubled")
        if late and not may.late:
            wrong.append(f"{late} overtaken")
        if allowed == "always" and may.missing is not None and came["count"] > may.missing:
            wrong.append(f"{came['count']} missing of {sent}, {may.missing} may be: {came['missing']}")
        if allowed == "always" and may.at_once and not _in_a_row(came["missing"]):
            wrong.append(f"missing here and there of {sent}: {came['missing']}")
        if allowed == "never" and came["count"] != sent:
            wrong.append(f"{sent - came['count']} arrived although the policy forbids them")
        if wrong:
            raise Wrong(f"{flow}: {'; '.join(wrong)}")

    # ---- newcomers and what is counted ----

    def tries(self, tries: Iterable[Try]) -> None:
        """Each newcomer is let in, dropped or rejected as the rules say that hold now."""
        by_client: dict[str, list[tuple[int, Try, str]]] = {}
        for item in tries:
            self._tried += 1
            by_client.setdefault(item.client, []).append((self._tried, item, self.model.admitted(item)))
        for client, items in by_client.items():
            wanted = [
                (number, t.protocol, MACHINES[t.server].address(t.network, six=t.six), t.port, PATIENCE_S[word])
                for number, t, word in items
            ]
            self.lab.talkers[client].ask("try", tries=wanted)
        for client, items in by_client.items():
            answer = self.lab.talkers[client].answer("try", 40.0)
            for number, item, word in items:
                self._admitted(item, word, answer[str(number)])

    def _admitted(self, item: Try, wanted: str, found: str) -> None:
        word = {"answered": "allow", "silent": "drop"}.get(found, "reject")
        if word != wanted:
            raise Wrong(f"{item} should be {wanted}: {found}")
        self._owe(item, 1)
        self.totals["newcomers"] += 1

    def _owe(self, item: Try, count: int) -> None:
        for whose in self.model.config.hits(item):
            self.owed[whose] = self.owed.get(whose, 0) + count

    def counters(self) -> None:
        """Hits of the rules that allowed newcomers, over all hosts that a VM was at."""
        found: dict[tuple[str, str, int], int] = {}

        def exact() -> bool:
            found.clear()
            found.update(self._read_hits())
            return all(found.get(w, 0) == self.hits.get(w, 0) + more for w, more in self.owed.items())

        if self.model.counted:
            with contextlib.suppress(LabError):
                wait_until("hits are exact", exact, 15.0, 0.2)
            wrong = {w: (self.hits.get(w, 0), more, found.get(w, 0)) for w, more in self.owed.items()}
            wrong = {w: numbers for w, numbers in wrong.items() if numbers[0] + numbers[1] != numbers[2]}
            if wrong:
                raise Wrong(f"hits before, owed, after: {wrong}")
        self.hits, self.owed = self._read_hits(), {}

    def _read_hits(self) -> dict[tuple[str, str, int], int]:
        networks = {nic.mac: nic.network for vm in VMS for nic in MACHINES[vm].nics}
        return {
            (vm, networks[mac], record["priority"]): record["hits"]
            for vm in VMS
            for (mac, _), record in self.lab.rules(vm, self.model.places[vm]).items()
            if "priority" in record
        }


def _in_a_row(numbers: list[int]) -> bool:
    return not numbers or numbers[-1] - numbers[0] == len(numbers) - 1


def _passed(moment: float) -> bool:
    return time.monotonic() > moment


def _as_try(group: Group) -> Try:
    return Try(group.client, group.server, group.network, "tcp", group.port, group.six)


def _rule(rule: Rule) -> tuple[Any, ...]:
    remote = sorted({str(ipaddress.ip_network(prefix, strict=False)) for prefix in rule.remote})
    return rule.priority, rule.direction, rule.protocol, remote, [list(rule.ports)], rule.action


def _record(record: dict[str, Any]) -> tuple[Any, ...]:
    remote = sorted({str(ipaddress.ip_network(prefix, strict=False)) for prefix in record["remote"]})
    ports = [list(span) for span in record["ports"]]
    return record["priority"], record["direction"], record["protocol"], remote, ports, record["action"]
