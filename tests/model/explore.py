"""Breadth first through everything that can happen, to the end.

Two sorts of steps are left to their own time. *Deadlines* pass when nothing else is under way (`Budget.lates` has them
pass at any time). And with `Budget.reduced` an end's steps that only begin or say something are taken at once with the
step before: they touch nothing that another party or an invariant looks at, and whatever may happen between (the death
of their agent, the loss of the message, the break of its stream) may happen after them to the same effect. That is
checked by searching small budgets with and without.
"""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from migrator.lifecycle import coordinator as c
from tests.model import coordinator_end, destination_end, mishaps, source_end
from tests.model.agents import routine
from tests.model.frames import arrives
from tests.model.hypervisor import moves, words
from tests.model.invariants import check, good
from tests.model.model import Model, Violation
from tests.model.network import Possible, ask, deliveries
from tests.model.world import NOBODY, Move, Visited, World

STATES_MAX = 50_000_000  # and about 400 bytes each


@dataclass(frozen=True)
class Found:
    """What a search has seen. `views`: what parties and invariants can tell apart, for the check of the reduction."""

    states: int
    transitions: int
    ends: int
    views: frozenset[tuple[object, ...]]


class CounterExample(AssertionError):
    """`way`: the steps that lead to it, the shortest there is."""

    def __init__(self, why: str, way: list[str], states: int) -> None:
        super().__init__("\n".join([why, *way]))
        self.why, self.way, self.states = why, way, states


def first(m: Model) -> World:
    """Where a search begins."""
    return _second(m) if m.budget.second else _begun(m)


def _second(m: Model) -> World:
    """The shortest way to the end of a first migration, whose redirect is told to end; and a second begins."""
    w = _straight(m, _begun(m), c.Phase.CLOSED)
    mishaps.begin_again(m, w)
    return w


def _straight(m: Model, begin: World, phase: c.Phase) -> World:
    visited = Visited()
    visited.add(begin, NOBODY, "")
    at = 0
    while m.c.phases[(w := visited.world(at)).moves[-1].c] != phase:
        for label, change in possible(m, w):
            after = visited.world(at)
            change(m, after)
            visited.add(after, at, label)
        at += 1
    return w


def _begun(m: Model) -> World:
    world = World()
    state, actions = c.begin(dry_run=m.budget.dry_run)
    move = Move(src=0, old=0, new=1, c=m.c.number(state))
    world.moves.append(move)
    coordinator_end.send_all(world, move, actions)
    world.frame = "-" if m.budget.frames else ""
    return world


def possible(m: Model, w: World) -> Iterator[tuple[str, Callable[[Model, World], None]]]:
    """Everything that can happen in a state."""
    going = [*deliveries(w), *_own(m, w), *words(w), *moves(m, w), *routine(m, w), *_frames(w)]
    yield from going
    if not going or mishaps.early(m, w) or any(mv.b >= 0 and m.b.phases[mv.b] == "waiting" for mv in w.moves):
        yield from mishaps.deadlines(m, w, free=not going)
    yield from mishaps.mishaps(m, w)


def _own(m: Model, w: World) -> Possible:
    """Actions of agents, and what goes on beside them."""
    for i, mv in enumerate(w.moves):
        if mv.do_a:
            yield f"A: {mv.do_a[0]}", lambda m, w, i=i: source_end.carry_out(m, w, w.moves[i])
        if mv.do_b:
            yield f"B: {mv.do_b[0]}", lambda m, w, i=i: destination_end.carry_out(m, w, w.moves[i])
        for task in source_end.ready(m, w, mv):
            yield f"A: {task} done", lambda m, w, i=i, task=task: source_end.ends(m, w, w.moves[i], task)
        if "ask" in mv.busy_a and w.is_alive(mv.dst):
            yield "A asks B", lambda m, w, i=i: ask(m, w, w.moves[i])
        if mv.answer:
            yield f"B answers {mv.answer}", lambda m, w, i=i: source_end.said_by_peer(m, w, w.moves[i])


def _frames(w: World) -> Possible:
    if w.frame[:1] == "q" and w.guest == f"r{w.frame[1]}":
        yield "the guest takes the frame", lambda m, w: setattr(w, "frame", "ok")
    if w.frame[:1] == "f":
        yield "the redirected frame arrives", arrives


def explore(m: Model, *, views: bool = False) -> Found:
    """Visit every state. Raises CounterExample."""
    visited, seen = Visited(), set()
    edges, begins = array("i"), array("l")
    visited.add(first(m), -1, "")
    at = 0
    while at < len(visited):
        w = visited.world(at)
        begins.append(len(edges))
        if views:
            seen.add(_view(m, w))
        for label, change in possible(m, w):
            after = visited.world(at)
            try:
                change(m, after)
                check(m, after)
            except Violation as violation:
                raise CounterExample(str(violation), [*visited.way(at), label], len(visited)) from None
            number = visited.add(after, at, label)
            if number != at:
                edges.append(number)
        if begins[at] == len(edges) and (why := good(m, w)):
            raise CounterExample(f"a bad end: {why}", visited.way(at), len(visited))
        at += 1
        if at > STATES_MAX:
            raise AssertionError(f"more than {STATES_MAX} states")
    begins.append(len(edges))
    ends = _reach_an_end(visited, edges, begins)
    return Found(len(visited), len(edges), ends, frozenset(seen))


def _reach_an_end(visited: Visited, edges: array[int], begins: array[int]) -> int:
    """From every state some end can be reached. Returns how many ends there are."""
    states = len(visited)
    counts = array("l", bytes(8 * (states + 1)))
    for target in edges:
        counts[target + 1] += 1
    for k in range(states):
        counts[k + 1] += counts[k]
    before, fill = array("i", bytes(4 * len(edges))), array("l", counts)
    for source in range(states):
        for k in range(begins[source], begins[source + 1]):
            before[fill[edges[k]]] = source
            fill[edges[k]] += 1
    waiting = [k for k in range(states) if begins[k] == begins[k + 1]]
    ends, reached = len(waiting), bytearray(states)
    for k in waiting:
        reached[k] = 1
    while waiting:
        k = waiting.pop()
        for source in before[counts[k] : counts[k + 1]]:
            if not reached[source]:
                reached[source] = 1
                waiting.append(source)
    stuck = reached.find(0)
    if stuck >= 0:
        raise CounterExample("no end can be reached from here", visited.way(stuck), states)
    return ends


def _view(m: Model, w: World) -> tuple[object, ...]:
    ends = tuple((m.a.phases[mv.a] if mv.a >= 0 else "", m.b.phases[mv.b] if mv.b >= 0 else "") for mv in w.moves)
    return (w.guest, w.ports, w.frame, w.place, ends, tuple(m.c.phases[mv.c] for mv in w.moves))
