# SPDX-License-Identifier: GPL-2.0-only
"""The reference model: what must be so, may be so and must not be so after each step. No line of the product is in it.

It knows the configuration (all versions that held during a step), where VMs are, which connections exist, and what was
broken meanwhile. What is allowed by what was done:

| done in the step | frames may be missing | late | moves may end |
|---|---|---|---|
| moves, aborts, failures of the hypervisor, suspends | none | none | as ordered; an abort may be too late |
| the coordinator fails | none | none | complete or not at all; degraded [1] |
| a guest stops by itself | as many as the report says, to that guest; from it [2] | none | complete |
| an agent fails, none of its VMs moves | none | none | |
| an agent fails at an end of a move | those of the VM that moves | too | degraded too [1] |
| a host is cut off | those of machines that were there, or came | too | degraded too |
| a port is removed, or restored | those of its VM | none | |

[1] A guest that stops by itself does not wait for the agent of its source, nor for the coordinator to allow it to send
the last of the state. When one of them is dead then, and the move is told to be degraded, its connections may end.
[2] Nor for the switch of its destination to see its device there (docs/protocol.md, what is not promised): on a starved
machine the first that it sends there go to a device that nobody looks after, one after the other.

Never: a datagram twice, one that no versions of the policy at its two ends allowed, an answer with a wrong byte; a
connection that every version allowed and whose ports stayed is never lost, one that the last version forbids never
lives on.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from tests.soak.plan import Act, Rule, Step, Try
from tests.soak.scene import ASK_PORT, CONTROL, EVERYBODY, HOSTS, MACHINES, TCP_PORTS, UDP_PORTS, VMS, Flow, Group

OPEN, OWN, NONE = "open", "own", "none"
AGENT_FAULTS = ("kill", "restart", "freeze")
FAULTS = (*AGENT_FAULTS, "cut")
UNATTENDED = 50  # datagrams, a second of them: so long an agent may have no CPU
CHANGES = ("policy", "set", "attach")
WHOLE = tuple(
    Rule(way, 100 * one + n, protocol, (), ports, "allow")
    for one, way in enumerate(("to", "from"), 1)
    for n, (protocol, ports) in enumerate((("tcp", TCP_PORTS), ("udp", UDP_PORTS), ("udp", (ASK_PORT, ASK_PORT))))
)


@dataclass(frozen=True)
class Config:
    """One version of what the operator declared."""

    rules: Mapping[str, tuple[Rule, ...]]  # by VM: of its own policy
    sets: Mapping[str, tuple[str, ...]]
    attached: Mapping[str, str]  # by VM: OPEN, OWN or NONE

    def changed(self, act: Act) -> Config:
        if act.rules:  # a policy, also of a restore: what a file says of the policy does not hold
            return replace(self, rules={**self.rules, act.target: act.rules})
        if act.kind == "set":
            return replace(self, sets={**self.sets, act.target: act.names})
        return replace(self, attached={**self.attached, act.target: act.names[0]})

    def prefixes(self, remote: Iterable[str]) -> tuple[str, ...]:
        """A rule's remote with the sets that it names resolved."""
        return tuple(prefix for item in remote for prefix in (self.sets[item[1:]] if item.startswith("@") else (item,)))

    def applied(self, vm: str) -> tuple[Rule, ...]:
        """Rules that hold for a VM, sets resolved."""
        if self.attached[vm] != OWN:
            return ()
        return tuple(replace(rule, remote=self.prefixes(rule.remote)) for rule in self.rules[vm])

    def judge(self, machine: str, way: str, protocol: str, remote: str, port: int) -> tuple[str, int]:
        """allow, drop or reject, and the priority of the rule that says so (0: none does)."""
        if machine not in VMS or self.attached[machine] == OPEN:
            return "allow", 0
        for rule in sorted(self.applied(machine), key=lambda r: r.priority):
            named = (rule.direction, rule.protocol) == (way, protocol) and rule.ports[0] <= port <= rule.ports[1]
            if named and (not rule.remote or _within(remote, rule.remote)):
                return rule.action, rule.priority
        return "drop", 0

    def verdict(self, client: str, server: str, network: str, protocol: str, port: int, *, six: bool) -> str:
        """What becomes of the first packet of a connection: the client's port judges it, then the server's."""
        return next((word for word, _ in self._judged(client, server, network, protocol, port, six) if word), "allow")

    def _judged(
        self, client: str, server: str, network: str, protocol: str, port: int, six: bool
    ) -> Iterator[tuple[str, tuple[str, str, int]]]:
        for machine, way, other in ((client, "from", server), (server, "to", client)):
            remote = EVERYBODY[other].address(network, six=six)
            word, priority = self.judge(machine, way, protocol, remote, port)
            yield ("" if word == "allow" else word), (machine, network, priority)
            if word != "allow":
                return

    def hits(self, item: Try) -> list[tuple[str, str, int]]:
        """Rules that allow this newcomer: (VM, network, priority), each once."""
        judged = self._judged(item.client, item.server, item.network, item.protocol, item.port, item.six)
        return [whose for word, whose in judged if not word and whose[2]]


@dataclass(frozen=True)
class Frames:
    """What may become of a flow's datagrams in a step. `missing`: at most so many, None: any number.

    `at_once`: those that are missing follow each other.
    """

    missing: int | None = 0
    late: bool = False
    at_once: bool = False


class Model:
    """The state of everything after the last step, and what the present one may do to it."""

    def __init__(self) -> None:
        self.config = Config(
            rules=dict.fromkeys(VMS, WHOLE),
            sets=dict.fromkeys(("near", "far"), ("10.0.0.0/8", "fd00::/16")),
            attached=dict.fromkeys(VMS, OWN),
        )
        self.places = {name: machine.host for name, machine in MACHINES.items()}
        self.begin(Step(0, "the beginning"))

    def begin(self, step: Step) -> None:
        """Take note of all that a step will do. What is asked from now on is of this step."""
        self.step = step
        self.started = dict(self.places)
        self.visited = {name: {place} for name, place in self.places.items()}  # hosts that a machine may have been at
        self.may_be_lost = dict.fromkeys(VMS, 0)  # what reports of moves named
        self.stateless: set[str] = set()  # VMs that left while nobody could send their state
        self.versions = [self.config]
        for act in step.acts:
            if act.kind in CHANGES or act.rules:
                self.config = self.config.changed(act)
                self.versions.append(self.config)

    # ---- what is done ----

    def daemon(self, act: Act) -> str:
        """The daemon, or the host, that an act is for."""
        end, _, vm = act.target.rpartition(":")
        if not end:
            return act.target
        source = self.started[vm]
        move = next(other for other in self.step.acts if other.kind == "move" and other.target == vm)
        return source if end == "source" else further(source, move.hops[0])

    def struck(self, *kinds: str) -> set[str]:
        """Daemons, or hosts, that acts of these kinds are for."""
        return {self.daemon(act) for act in self.step.acts if act.kind in kinds}

    def about(self, *kinds: str) -> set[str]:
        """What acts of these kinds are for, by name."""
        return {act.target for act in self.step.acts if act.kind in kinds}

    @property
    def plain(self) -> bool:
        """Nothing fails in this step, so no daemon has a reason to complain."""
        odd = {"refuse", "fail_after_ms", "self_stop_ms"}
        named = {name for act in self.step.acts for name, _ in act.hypervisor}
        return not named & odd and {act.kind for act in self.step.acts} <= {"move", *CHANGES, "visitor", "suspend"}

    @property
    def counted(self) -> bool:
        """Hits of rules are exact: no connection is judged again or begins anew, and nothing that counts is lost."""
        return len(self.versions) == 1 and {act.kind for act in self.step.acts} <= {"move", "visitor", "suspend"}

    # ---- what may come of it ----

    def outcomes(self, move: Act, source: str, destination: str) -> set[str]:
        """How a move may end; "": it may not have begun."""
        behaviour = dict(move.hypervisor)
        may = {"aborted"} if "fail_after_ms" in behaviour else {"complete"}
        if behaviour.get("refuse"):
            may = {"refused", "aborted"}
        if move.target in self.about("abort", "cancel"):
            may |= {"aborted"}
        if CONTROL in self.struck(*AGENT_FAULTS):
            may |= {"aborted", "refused", "", *({"degraded"} if "self_stop_ms" in behaviour else ())}
        if {source, destination} & self.struck(*FAULTS):
            may |= {"aborted", "refused", "degraded", ""}
        return may

    def moved(self, vm: str, source: str, destination: str, outcome: str, may_be_lost: int) -> None:
        """A move has ended so."""
        self.visited[vm] |= {source, destination}
        self.may_be_lost[vm] += may_be_lost
        self.places[vm] = destination if outcome in MOVED else source
        alone = any(act.target == vm and "self_stop_ms" in dict(act.hypervisor) for act in self.step.acts)
        if outcome == "degraded" and alone and {source, CONTROL} & self.struck(*AGENT_FAULTS):
            self.stateless.add(vm)

    def fate(self, group: Group) -> str:
        """Of connections that were there: lives, cut, or either."""
        words = [
            c.verdict(group.client, group.server, group.network, "tcp", group.port, six=group.six)
            for c in self.versions
        ]
        if words[-1] != "allow" or {group.client, group.server} & self.about("replug"):
            return "cut"
        lives = set(words) == {"allow"} and not {group.client, group.server} & self.stateless
        return "lives" if lives else "either"

    def admitted(self, item: Try) -> str:
        """What becomes of a newcomer now: allow, drop or reject."""
        return self.config.verdict(item.client, item.server, item.network, item.protocol, item.port, six=item.six)

    def allowed(self, flow: Flow) -> str:
        """Datagrams of a flow: always, never, or it changed in this step."""
        passes = {
            (sends.judge(flow.sender, "from", "udp", self._address(flow.receiver, flow), flow.port)[0] == "allow")
            and (takes.judge(flow.receiver, "to", "udp", self._address(flow.sender, flow), flow.port)[0] == "allow")
            for sends, takes in itertools.product(self.versions, repeat=2)  # each host changes when it hears of it
        }
        return "changed" if len(passes) > 1 else "always" if passes == {True} else "never"

    @staticmethod
    def _address(machine: str, flow: Flow) -> str:
        return EVERYBODY[machine].address(flow.network, six=False)

    def flows_now(self, flow: Flow) -> bool:
        return self.config.verdict(flow.sender, flow.receiver, flow.network, "udp", flow.port, six=False) == "allow"

    def frames(self, flow: Flow) -> Frames:
        """What this step may do to a flow that every version allowed."""
        ends = {flow.sender, flow.receiver}
        moving = ends & self.about("move")
        cut, failed = self.struck("cut"), self.struck(*AGENT_FAULTS)
        if any(self.visited[end] & cut for end in ends) or any(self.visited[vm] & failed for vm in moving):
            return Frames(None, late=True)
        if ends & self.about("replug", "restore"):
            return Frames(None)
        alone = {act.target for act in self.step.acts if "self_stop_ms" in dict(act.hypervisor)}
        lost = self.may_be_lost.get(flow.receiver, 0)
        return Frames(lost + UNATTENDED, at_once=not lost) if flow.sender in alone else Frames(lost)


MOVED = {"complete", "degraded"}


def further(host: str, hops: int) -> str:
    """The host so many further on."""
    return HOSTS[(HOSTS.index(host) + hops) % len(HOSTS)]


def _within(address: str, prefixes: Iterable[str]) -> bool:
    one = ipaddress.ip_address(address)
    return any(one in ipaddress.ip_network(prefix, strict=False) for prefix in prefixes)
