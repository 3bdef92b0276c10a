"""The coordinator: its machine as `migrator.coordinator.execution` runs it, and what it hears."""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from migrator.lifecycle import coordinator as c
from migrator.lifecycle.machine import Action, Event, Role
from tests.model.machines import word
from tests.model.model import Model
from tests.model.world import Move, World

ROLES = {"source": "a", "destination": "b"}
ROLE = {"a": Role.SOURCE, "b": Role.DESTINATION}
ANSWERED = frozenset({"describe", "prepare", "start"})


def host(mv: Move, end: str) -> int:
    return mv.src if end == "a" else mv.dst


def post(m: Model, w: World, mv: Move, event: Event) -> None:
    """A step of a migration that is not over: journalled, then its actions at once."""
    if m.c.states[mv.c].over:
        return
    mv.c, actions = m.c.step(mv.c, event)
    unheard = [lost for action in actions if (lost := _act(w, mv, action))]
    for end in unheard:
        post(m, w, mv, c.Refused(ROLE[end], ""))


def send_all(w: World, mv: Move, actions: tuple[Action, ...]) -> None:
    """What a migration begins with."""
    for action in actions:
        _act(w, mv, word(action))


def _act(w: World, mv: Move, action: str) -> str:
    """Returns the end that an order which is to be answered did not reach."""
    name, _, what = action.partition(" ")
    if name == "Finish":
        mv.finished = min(mv.finished + 1, 2)
    elif name == "MovePlace":
        w.place = mv.new
    elif name in {"Send", "Verdict"}:
        role, _, message = what.partition(" ")
        return _send(w, mv, ROLES[role], message)
    return ""


def _send(w: World, mv: Move, end: str, message: str) -> str:
    asked = message in ANSWERED
    if not w.is_attached(host(mv, end)):
        return end if asked else ""
    if asked:
        mv.asking = message
    if end == "a":
        mv.to_a = (*mv.to_a, message)
    else:
        mv.to_b = (*mv.to_b, message)
    return ""


def said(m: Model, w: World, mv: Move, end: str, what: str) -> None:
    """An agent's Progress: its last word is repeated when it attaches again."""
    if end == "a":
        mv.said_a = what
    else:
        mv.said_b = what
    if what == "degraded" and end not in mv.flaws:
        mv.flaws = "".join(sorted(mv.flaws + end))
    say(w, mv, end, what)


def say(w: World, mv: Move, end: str, what: str) -> None:
    """What an agent says; lost when it is not attached. A later word takes the place of an equal one that waits."""
    if not w.is_attached(host(mv, end)):
        return
    if end == "a":
        mv.from_a = (*(word for word in mv.from_a if word != what), what)
    else:
        mv.from_b = (*(word for word in mv.from_b if word != what), what)


def hears(m: Model, w: World, mv: Move, end: str, what: str) -> None:
    """A message of an agent has come."""
    kind, _, order = what.partition(" ")
    if kind == "idle":
        post(m, w, mv, c.RedirectIdle())
    elif kind not in {"did", "cannot"}:
        post(m, w, mv, c.Said(ROLE[end], what))
    elif order == mv.asking:
        mv.asking = ""
        done = {"describe": c.Described(), "prepare": c.Prepared(), "start": c.Started()}[order]
        post(m, w, mv, done if kind == "did" else c.Refused(ROLE[end], ""))


def detached(m: Model, w: World, at: int) -> None:
    """The stream of an agent is gone, with what was in flight; who waits for an answer of it gets none."""
    w.attached &= ~(1 << at)
    for mv in w.moves:
        end = "a" if mv.src == at else "b"
        if end == "a":
            mv.to_a = mv.from_a = ()
        else:
            mv.to_b = mv.from_b = ()
        if mv.asking and (mv.asking == "prepare") == (end == "b"):
            mv.asking = ""
            post(m, w, mv, c.Refused(ROLE[end], ""))
