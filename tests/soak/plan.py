# SPDX-License-Identifier: GPL-2.0-only
"""What is done, step by step: each step depends on the seed and its own number only, so any of them can be repeated.

A plan says nothing of what comes of it. Hosts of moves are relative (the next one, the one after), and daemons are
named by their part in a move, so that a step means something wherever the VMs are by then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.soak.scene import (
    ASK_PORT,
    CONTROL,
    HOSTS,
    MACHINES,
    PREFIXES,
    TCP_PORTS,
    UDP_PORTS,
    VISITORS,
    VMS,
)

SETS = ("near", "far")
DAEMONS = (*HOSTS, CONTROL)
Random = random.Random


@dataclass(frozen=True)
class Rule:
    """A rule of a policy. `remote`: prefixes or @set, () any; `ports`: first and last."""

    direction: str  # "to" the guest | "from" it
    priority: int
    protocol: str  # tcp | udp | any
    remote: tuple[str, ...]
    ports: tuple[int, int]
    action: str  # allow | drop | reject


@dataclass(frozen=True)
class Act:
    """One thing that is done `at_ms` after the step began.

    kind: move abort cancel order | policy set attach | visitor replug restore suspend | kill restart freeze cut
    """

    kind: str
    target: str  # VM, set, host, daemon; "source:VM", "destination:VM": the agent at that end of the VM's move
    at_ms: int = 0
    hops: tuple[int, ...] = ()  # of a move: how many hosts further, one after the other
    hypervisor: tuple[tuple[str, float | bool], ...] = ()  # how it behaves in the move (lab.virtual.Behaviour)
    for_ms: int = 0
    rules: tuple[Rule, ...] = ()
    names: tuple[str, ...] = ()  # of a set: prefixes; else what the kind needs


@dataclass(frozen=True)
class Try:
    """A newcomer: does it get through?"""

    client: str
    server: str
    network: str
    protocol: str
    port: int
    six: bool


@dataclass(frozen=True)
class Step:
    number: int
    what: str
    acts: tuple[Act, ...] = ()
    tries: tuple[Try, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"step {self.number}: {self.what}: " + "; ".join(_told(act) for act in self.acts)


def _told(act: Act) -> str:
    words = [f"{act.at_ms} ms {act.kind} {act.target}"]
    words += [f"hops {act.hops}"] if act.hops else []
    words += [f"{name}={value}" for name, value in act.hypervisor]
    words += [f"for {act.for_ms} ms"] if act.for_ms else []
    words += [" ".join(act.names)] if act.names else []
    words += [f"{len(act.rules)} rules"] if act.rules else []
    return " ".join(words)


def steps(seed: int) -> Iterator[Step]:
    """The plan of a seed, without end."""
    number = 0
    while True:
        number += 1
        yield step(seed, number)


def step(seed: int, number: int) -> Step:
    """One step of it. The first ones take each sort once, in an order that the seed gives."""
    rng = Random(f"{seed}:{number}")
    order = Random(f"{seed}").sample(KINDS, len(KINDS))
    weights = [weight for _, weight, _ in KINDS]
    name, _, make = order[number - 1] if number <= len(order) else rng.choices(KINDS, weights)[0]
    return Step(number, name, tuple(make(rng)), tuple(some_try(rng) for _ in range(6)))


# ---- parts ----


def some_try(rng: Random) -> Try:
    network = rng.choice(list(PREFIXES))
    client, server = rng.sample([m.name for m in MACHINES.values() if any(n.network == network for n in m.nics)], 2)
    protocol, port = rng.choice([*(("tcp", port) for port in TCP_PORTS), ("udp", ASK_PORT)])
    return Try(client, server, network, protocol, port, rng.random() < 0.4)


def rules(rng: Random) -> tuple[Rule, ...]:
    """A policy that lets most through."""
    made = [rule for way in ("to", "from") for rule in _refused(rng, way)]
    for way in ("to", "from"):
        for protocol, ports in (("tcp", TCP_PORTS), ("udp", UDP_PORTS), ("udp", (ASK_PORT, ASK_PORT))):
            dice = rng.random()
            remote: tuple[str, ...] = ()
            if dice < 0.15:
                ports = (rng.choice(ports),) * 2
            elif dice < 0.35:
                remote = _remote(rng)
            if dice < 0.9:
                made.append(Rule(way, 0, protocol, remote, (ports[0], ports[1]), "allow"))
    return tuple(Rule(r.direction, 10 * (n + 1), r.protocol, r.remote, r.ports, r.action) for n, r in enumerate(made))


def _refused(rng: Random, way: str) -> Iterator[Rule]:
    if rng.random() < 0.3:
        protocol, ports = rng.choice((("tcp", TCP_PORTS), ("udp", (UDP_PORTS[0], ASK_PORT))))
        yield Rule(way, 0, protocol, _remote(rng), (ports[0], ports[1]), rng.choice(("drop", "reject")))


def _remote(rng: Random) -> tuple[str, ...]:
    if rng.random() < 0.5:
        return (f"@{rng.choice(SETS)}",)
    return _addresses(rng, rng.randint(1, 3))


def _addresses(rng: Random, count: int) -> tuple[str, ...]:
    """Of some machines all; or a whole network."""
    if rng.random() < 0.2:
        return rng.choice(list(PREFIXES.values()))
    chosen = rng.sample(sorted(MACHINES), count)
    nics = [nic for name in chosen for nic in MACHINES[name].nics]
    return tuple(f"{address}/{length}" for nic in nics for address, length in ((nic.ip4, 32), (nic.ip6, 128)))


def _move(rng: Random, vm: str, hops: tuple[int, ...] = (), at_ms: int = 0, **hypervisor: float | bool) -> Act:
    behaviour = {"memory_ms": rng.choice((20, 100, 400)), "downtime_ms": rng.choice((0, 20, 200)), "swallow": False}
    return Act(
        "move", vm, at_ms, hops=hops or (rng.choice((1, 2)),), hypervisor=tuple({**behaviour, **hypervisor}.items())
    )


def _configuration(rng: Random, at_ms: int = 0) -> Act:
    dice = rng.random()
    if dice < 0.6:
        return Act("policy", rng.choice(VMS), at_ms, rules=rules(rng))
    if dice < 0.85:
        return Act("set", rng.choice(SETS), at_ms, names=_addresses(rng, rng.randint(1, 5)))
    return Act("attach", rng.choice(VMS), at_ms, names=(rng.choice(("own", "own", "open", "none")),))


def _fault(rng: Random, daemon: str, at_ms: int) -> Act:
    kind = rng.choice(("kill", "kill", "restart", "freeze"))
    return Act(kind, daemon, at_ms, for_ms=rng.choice((0, 500, 2000)) if kind != "freeze" else rng.choice(FREEZES_MS))


FREEZES_MS = (300, 1500, 10_000)  # the last one is longer than a lease here
CUTS_MS = (200, 1000, 3000)

# ---- sorts of steps ----


def _one(rng: Random) -> Iterator[Act]:
    yield _move(rng, rng.choice(VMS))


def _chain(rng: Random) -> Iterator[Act]:
    yield _move(rng, rng.choice(VMS), rng.choice(((1, -1), (1, 1), (2, 1, -1))), memory_ms=20)


def _several(rng: Random) -> Iterator[Act]:
    for vm in rng.sample(VMS, rng.randint(2, 4)):
        yield _move(rng, vm, at_ms=rng.choice((0, 0, 50, 300)))


def _aborted(rng: Random) -> Iterator[Act]:
    vm = rng.choice(VMS)
    yield _move(rng, vm, (1,), memory_ms=rng.choice((300, 1500)))
    yield Act("abort", vm, rng.choice((50, 300, 800, 1600)))


def _hypervisor(rng: Random) -> Iterator[Act]:
    """It refuses, is told to cancel, or fails when the guest has been stopped."""
    vm = rng.choice(VMS)
    sort = rng.choice(("refuse", "cancel", "fail"))
    if sort == "refuse":
        yield _move(rng, vm, (1,), refuse=True)
    elif sort == "fail":
        yield _move(rng, vm, (1,), fail_after_ms=rng.choice((0, 50, 300)))
    else:
        yield _move(rng, vm, (1,), memory_ms=1500)
        yield Act("cancel", vm, rng.choice((200, 800)))


def _following(rng: Random) -> Iterator[Act]:
    yield _move(rng, rng.choice(VMS), (rng.choice((1, 2)),), memory_ms=60_000, self_stop_ms=rng.choice((30, 300)))


def _wrong(rng: Random) -> Iterator[Act]:
    vm = rng.choice(VMS)
    yield Act("order", vm, names=(rng.choice(("same host", "unknown host", "unknown VM", "dry run", "twice")),))


def _changes(rng: Random) -> Iterator[Act]:
    for n in range(rng.choice((1, 1, 2))):
        yield _configuration(rng, 200 * n)


def _changes_moving(rng: Random) -> Iterator[Act]:
    for vm in rng.sample(VMS, 2):
        yield _move(rng, vm, memory_ms=rng.choice((300, 800)))
    yield _configuration(rng, rng.choice((50, 300, 600)))


def _visit(rng: Random) -> Iterator[Act]:
    yield Act("visitor", rng.choice(HOSTS), names=(rng.choice(list(VISITORS)),))
    yield _move(rng, rng.choice(VMS), at_ms=rng.choice((0, 200)))


def _replug(rng: Random) -> Iterator[Act]:
    yield Act("replug", rng.choice(VMS))


def _restore(rng: Random) -> Iterator[Act]:
    """At once; or when the policy is another since the file was written, and stays so."""
    yield Act("restore", rng.choice(VMS), rules=rng.choice(((), rules(rng))))


def _suspend(rng: Random) -> Iterator[Act]:
    yield Act("suspend", rng.choice(VMS), for_ms=rng.choice((50, 700)))


def _daemon(rng: Random) -> Iterator[Act]:
    yield _fault(rng, rng.choice(DAEMONS), 0)


def _daemon_moving(rng: Random) -> Iterator[Act]:
    vm = rng.choice(VMS)
    alone = {"memory_ms": 60_000, "self_stop_ms": rng.choice((100, 600))}  # the guest waits for nobody
    yield _move(rng, vm, (rng.choice((1, 2)),), **rng.choice((alone, {}, {"memory_ms": 600})))
    who = rng.choice((f"source:{vm}", f"destination:{vm}", CONTROL))
    yield _fault(rng, who, rng.randint(20, 1500))
    if rng.random() < 0.3:
        yield _move(rng, rng.choice([other for other in VMS if other != vm]), at_ms=rng.choice((0, 200)))


def _two_daemons(rng: Random) -> Iterator[Act]:
    vm = rng.choice(VMS)
    yield _move(rng, vm, (rng.choice((1, 2)),), memory_ms=rng.choice((20, 100, 600)))
    for who in rng.sample((f"source:{vm}", f"destination:{vm}", CONTROL), 2):
        yield _fault(rng, who, rng.randint(20, 1500))


def _daemon_changes(rng: Random) -> Iterator[Act]:
    yield _fault(rng, rng.choice(DAEMONS), rng.choice((0, 100)))
    yield _configuration(rng, rng.choice((50, 200)))


def _cut(rng: Random) -> Iterator[Act]:
    yield Act("cut", rng.choice(HOSTS), for_ms=rng.choice(CUTS_MS))


def _cut_moving(rng: Random) -> Iterator[Act]:
    vm = rng.choice(VMS)
    yield _move(rng, vm, (rng.choice((1, 2)),), memory_ms=rng.choice((20, 100, 600)))
    end = rng.choice(("source", "destination"))
    yield Act("cut", f"{end}:{vm}", rng.randint(20, 1200), for_ms=rng.choice(CUTS_MS))


def _newcomers(_: Random) -> Iterator[Act]:
    yield from ()


KINDS: list[tuple[str, int, Callable[[Random], Iterator[Act]]]] = [
    ("a move", 6, _one),
    ("a chain of moves", 6, _chain),
    ("several moves at once", 10, _several),
    ("a move that the operator aborts", 5, _aborted),
    ("a hypervisor that will not", 5, _hypervisor),
    ("a guest that stops by itself", 4, _following),
    ("an order that is refused", 3, _wrong),
    ("changes of the policy", 12, _changes),
    ("changes while VMs move", 12, _changes_moving),
    ("a visitor", 3, _visit),
    ("a port removed and added", 3, _replug),
    ("a restore from a file", 3, _restore),
    ("a plain suspend", 2, _suspend),
    ("a daemon fails", 5, _daemon),
    ("a daemon fails while a VM moves", 12, _daemon_moving),
    ("two daemons fail while a VM moves", 6, _two_daemons),
    ("a daemon fails while the policy changes", 4, _daemon_changes),
    ("a cut", 3, _cut),
    ("a cut while a VM moves", 7, _cut_moving),
    ("newcomers only", 2, _newcomers),
]
