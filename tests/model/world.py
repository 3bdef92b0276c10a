"""What there is in the model: two hosts, one VM, at most two migrations of it, and how all of it is kept small.

A port instance is a letter and its lease. N: none. S: staged. C: staged and committed. W: active, and what comes by
itself waits for what the source held. O: active. H: active, and frames for the guest wait. Q: quiesced, they wait.
R: quiesced, redirects. T: a stub that redirects. Lease `-`: none, `+`: good, `!`: passed.
"""

from __future__ import annotations

import operator
from array import array
from dataclasses import dataclass, field, fields
from typing import Any

Words = tuple[str, ...]
NOBODY = -1
OPENED, UNOPENED = -3, -2  # an end that is over and forgotten but for this


@dataclass(frozen=True)
class Budget:
    """How often what may happen; everything that is under way besides happens in any order."""

    cuts: int = 0  # the stream between the agents breaks, with what is in flight
    crashes: int = 0  # of whom `dies` says; an agent returns at any time after
    dies: str = "ABC"  # agents by their place in the first migration, and the coordinator
    aborts: int = 0  # an operator aborts
    self_stops: int = 0  # the guest stops before its agent does it
    returns: int = 0  # the move fails, before or after the stop
    deaths: int = 0  # the VM ends
    detaches: int = 0  # an agent's stream to the coordinator breaks, with what is in flight
    losses: int = 0  # one message between agent and coordinator vanishes, those behind it do not
    copies: int = 0  # one arrives twice
    swaps: int = 0  # two change places
    lates: int = 0  # a deadline passes though something is under way
    fails: int = 0  # an action of an agent fails
    outruns: int = 0  # more changes than can be noted, just before the guest is stopped
    disks: int = 0  # a source's disk is full from here until its agent starts anew
    again: int = 0  # a second migration: back, or once more
    second: bool = False  # one has moved the VM straight, its redirect is about to end, and another begins
    frames: str = ""  # a token: `to` the guest, or `from` it
    plains: int = 0  # somebody suspends the guest, and lets it go on
    dry_run: bool = False
    hypervisor: bool = True  # False: the operator's order is the guest's move, the commit its resume
    strict: bool = False
    reduced: bool = True  # steps that commute with all others are taken at once

    def __str__(self) -> str:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        shown = {name: value for name, value in given.items() if value != getattr(Budget, name)}
        return ",".join(f"{name}={value}" for name, value in shown.items()) or "none"


COUNTED = tuple(item.name for item in fields(Budget) if item.type == "int")


@dataclass(slots=True, eq=False)
class World:
    """Everything but the migrations."""

    alive: int = 3  # bit a host: its agent
    attached: int = 3  # bit a host: its agent to the coordinator
    ended: tuple[int, int] = (NOBODY, NOBODY)  # a host: the highest instance that has ended there
    frame: str = ""  # see tests.model.frames
    guest: str = "r0"  # r0, r1: runs there; s0, s1: stopped there; x: it has ended
    heard: tuple[Words, Words] = ((), ())  # a host: words of its hypervisor that wait for its agent
    leaving: int = NOBODY  # where the hypervisor moves the guest to
    place: int = 0  # the instance where the coordinator has the VM
    ports: tuple[str, ...] = ("O-", "N-", "N-")
    spent: tuple[int, ...] = (0,) * len(COUNTED)
    moves: list[Move] = field(default_factory=list)

    def is_alive(self, host: int) -> bool:
        return bool(self.alive >> host & 1)

    def is_attached(self, host: int) -> bool:
        return bool(self.attached >> host & 1)

    def put(self, instance: int, port: str) -> None:
        self.ports = (*self.ports[:instance], port, *self.ports[instance + 1 :])

    def hear(self, host: int, what: str) -> None:
        """The hypervisor of `host` says something; an agent that is dead does not hear it."""
        if self.is_alive(host):
            self.set_heard(host, (*self.heard[host], what))

    def set_heard(self, host: int, words: Words) -> None:
        self.heard = (self.heard[0], words) if host else (words, self.heard[1])

    def spend(self, what: str) -> None:
        index = COUNTED.index(what)
        self.spent = (*self.spent[:index], self.spent[index] + 1, *self.spent[index + 1 :])

    def host_of(self, instance: int) -> int:
        """Where an instance is: what a migration makes is at its destination."""
        return 1 - self.moves[instance - 1].src if 0 < instance <= len(self.moves) else 0


@dataclass(slots=True, eq=False)
class Move:
    """One migration.

    `src` is a host; `old` and `new` are the instances at both ends, whose index is their epoch. `forth` and `back`: the
    stream, None when there is none; what it ends with is `eof`.
    """

    src: int
    old: int
    new: int
    c: int  # states of the machines, NOBODY where there is none
    a: int = NOBODY
    b: int = NOBODY
    do_a: Words = ()  # actions to be carried out, in order
    do_b: Words = ()
    busy_a: frozenset[str] = frozenset()  # what goes on beside them
    busy_b: frozenset[str] = frozenset()
    to_a: Words = ()  # messages from and to the coordinator
    to_b: Words = ()
    from_a: Words = ()
    from_b: Words = ()
    forth: Words | None = None
    back: Words | None = None
    answer: str = ""  # to Ask, on its way to the source
    asking: str = ""  # the order that the coordinator awaits an answer to
    said_a: str = ""  # the last word
    said_b: str = ""
    flaws: str = ""  # ends that have said "degraded"
    disk_a: int = NOBODY  # what the source's store has, when that is not `a`
    finished: int = 0
    filled: bool = False  # the destination had to open without all of the state, and has it now

    @property
    def dst(self) -> int:
        return 1 - self.src


_OF_WORLD = operator.attrgetter(*(item.name for item in fields(World) if item.name != "moves"))
_OF_MOVE = operator.attrgetter(*(item.name for item in fields(Move)))
BITS = 24


class Visited:
    """States by number, in the order in which they were reached. A state is kept as three small numbers in one.

    Its parts repeat: of a million states the migrations' and the hosts' parts are some ten thousand. About 400 bytes
    of memory a state.
    """

    def __init__(self) -> None:
        self._parts: list[Any] = [None]
        self._numbers: dict[Any, int] = {None: 0}
        self._index: dict[int, int] = {}
        self._keys: list[int] = []
        self._parents = array("i")
        self._labels = array("H")
        self._names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def _part(self, values: Any) -> int:
        found = self._numbers.get(values)
        if found is None:
            found = self._numbers[values] = len(self._parts)
            assert found < 1 << BITS, "more parts than a key has room for"
            self._parts.append(values)
        return found

    def add(self, world: World, parent: int, label: str) -> int:
        """The number of a state, which is new when it is the last one."""
        key = self._part(_OF_WORLD(world))
        for move in world.moves:
            key = key << BITS | self._part(_OF_MOVE(move))
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self._keys)
            self._keys.append(key)
            self._parents.append(parent)
            self._labels.append(self._names.setdefault(label, len(self._names)))
        return found

    def world(self, number: int) -> World:
        """A copy of a state, to be changed at will."""
        key = self._keys[number]
        moves = []
        while key >> BITS:
            moves.append(Move(*self._parts[key & (1 << BITS) - 1]))
            key >>= BITS
        return World(*self._parts[key], moves[::-1])

    def way(self, number: int) -> list[str]:
        """What led to a state, step by step."""
        steps, names = [], list(self._names)
        while number >= 0:
            steps.append(names[self._labels[number]])
            number = self._parents[number]
        return [step for step in reversed(steps) if step]
