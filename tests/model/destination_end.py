"""The destination's agent: what `migrator.agent.destination` makes of its machine's actions, one after the other."""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from collections.abc import Callable

from migrator.lifecycle import destination_words as bw
from migrator.lifecycle.machine import Event
from tests.model import switch
from tests.model.coordinator_end import said, say
from tests.model.model import Missing, Model, Violation
from tests.model.world import OPENED, Move, World

OPEN = frozenset({"opening", "open", "settled"})
SENDS = {
    "SendReady": "ready",
    "SendCommitted": "committed",
    "SendOpened": "opened",
    "SendSettled": "settled",
    "SendFailed": "failed",
}


def post(m: Model, w: World, mv: Move, event: Event) -> None:
    """Give the machine an event; its new state is stored before anything is done."""
    if mv.b < 0:
        return
    mv.b, actions = m.b.step(mv.b, event)
    mv.do_b += actions
    if m.budget.reduced:
        _begin(m, w, mv)


def _begin(m: Model, w: World, mv: Move) -> None:
    """Do at once what only says something: see tests.model.explore."""
    while mv.do_b and (mv.do_b[0] in SENDS or mv.do_b[0].partition(" ")[0] in {"Tell", "CloseAccounts", "Accept"}):
        carry_out(m, w, mv)


def carry_out(m: Model, w: World, mv: Move) -> None:
    """The next action."""
    action, mv.do_b = mv.do_b[0], mv.do_b[1:]
    name, _, what = action.partition(" ")
    if name in SENDS:
        _send(m, mv, SENDS[name])
    elif name == "Tell":
        said(m, w, mv, "b", what)
    else:
        try:
            _ACTIONS[name](m, w, mv, what)
        except Missing:
            post(m, w, mv, bw.Failed(""))
    if m.budget.reduced:
        _begin(m, w, mv)


def _send(m: Model, mv: Move, message: str) -> None:
    if "stream" not in mv.busy_b or mv.back is None or "eof" in mv.back:
        return
    lacks = m.b.states[mv.b].degraded and m.b.phases[mv.b] != "settled"
    opened = "opened lacks" if lacks else "opened"
    mv.back = (*mv.back, opened if message == "opened" else message)
    if message == "ready" and m.b.phases[mv.b] in {"open", "settled"}:
        mv.back = (*mv.back, opened)


def _stage(m: Model, w: World, mv: Move, _: str) -> None:
    switch.stage(m, w, mv.new)
    post(m, w, mv, bw.Staged())


def _accept(m: Model, w: World, mv: Move, _: str) -> None:
    say(w, mv, "b", "did prepare")


def _refuse(m: Model, w: World, mv: Move, _: str) -> None:
    say(w, mv, "b", "cannot prepare")


def _commit(m: Model, w: World, mv: Move, _: str) -> None:
    switch.commit(w, mv.new)
    post(m, w, mv, bw.CommitDone())
    committed(m, w, mv)


def committed(m: Model, w: World, mv: Move) -> None:
    """All state is here: a guest without a hypervisor runs here from now on."""
    if m.budget.hypervisor or w.guest == "x" or w.guest == f"r{mv.dst}":
        return
    if w.guest == f"r{mv.src}":
        raise Violation("the guest is started at the destination and runs at the source")
    w.guest = f"r{mv.dst}"
    w.hear(mv.dst, "running")


def _open(m: Model, w: World, mv: Move, what: str) -> None:
    degraded = bool(what)
    if degraded:
        switch.commit(w, mv.new)
    switch.open_port(w, mv.new, broadcast=degraded and "stream" not in mv.busy_b)
    mv.busy_b |= {"source-first"}
    post(m, w, mv, bw.Opened())


def _open_broadcast(m: Model, w: World, mv: Move, _: str) -> None:
    switch.source_done(w, mv.new)


def waited(m: Model, w: World, mv: Move) -> None:
    """What came by itself has waited for the source for long enough."""
    mv.busy_b -= {"source-first"}
    if m.b.phases[mv.b] in {"open", "settled"}:
        switch.source_done(w, mv.new)


def filled(m: Model, mv: Move) -> None:
    """What the ports had to open without is here: what the guest has made since stays, and other states take none."""
    if mv.b == OPENED:  # it has settled and forgotten it: nothing of this stream matters any more
        return
    if not m.b.states[mv.b].degraded or m.b.phases[mv.b] not in {"open", "settled"}:
        raise Violation("tables come late to a destination that has opened with all of them")
    mv.filled |= m.b.phases[mv.b] == "open"


def has_all(m: Model, mv: Move) -> None:
    """The source settles: there is no other moment at which it could give what was missing."""
    if mv.b >= 0 and m.b.states[mv.b].degraded and m.b.phases[mv.b] == "open" and not mv.filled:
        raise Violation("the guest goes on without its state, and the source that had it settles")


def _close_accounts(m: Model, w: World, mv: Move, _: str) -> None:
    """Touches nothing that is in the model."""


def _purge(m: Model, w: World, mv: Move, _: str) -> None:
    if w.guest == f"r{mv.dst}":
        raise Violation("the destination purges the port of a guest that runs there")
    switch.purge(w, mv.new)


def _answer(m: Model, w: World, mv: Move, _: str) -> None:
    if "asked" in mv.busy_a and m.b.phases[mv.b] != "opening":
        mv.answer = state(m, mv)


def state(m: Model, mv: Move) -> str:
    """What the destination says of itself: `c` committed, `o` opened."""
    if mv.b < 0:
        return "co" if mv.b == OPENED else "--"
    opened = m.b.phases[mv.b] in {"open", "settled"}
    return ("c" if m.b.states[mv.b].committed else "-") + ("o" if opened else "-")


_ACTIONS: dict[str, Callable[[Model, World, Move, str], None]] = {
    "Stage": _stage,
    "Accept": _accept,
    "Refuse": _refuse,
    "Commit": _commit,
    "Open": _open,
    "OpenBroadcast": _open_broadcast,
    "CloseAccounts": _close_accounts,
    "Purge": _purge,
    "Answer": _answer,
}
