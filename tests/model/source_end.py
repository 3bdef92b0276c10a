"""The source's agent: what `migrator.agent.source` makes of its machine's actions, and what comes of them.

Actions are carried out in order; what takes long goes on beside them (`busy_a`) and ends in any order.
"""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from collections.abc import Callable

from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Event, Guest
from tests.model import frames, switch
from tests.model.coordinator_end import said
from tests.model.destination_end import OPEN
from tests.model.model import Missing, Model, Violation
from tests.model.world import NOBODY, OPENED, Move, World

BESIDE = {
    "Probe": "probe",
    "Connect": "connect",
    "Watch": "watch",
    "Hold": "hold",
    "Suspend": "suspend",
    "Drain": "drain",
    "Drain follow": "drain-follow",
    "SendFinal": "final",
    "Ask": "ask",
    "Cancel": "cancel",
    "Cancel certain": "cancel-certain",
    "Settle": "settle",
    "Settle late": "settle-late",
}
"""Actions that only begin something."""
STEPS = frozenset({"probe", "connect", "watch", "hold", "idle", "ask", "asked", "drain", "drain-follow", "final"})
"""What the guest's return, or its arrival at the destination, puts an end to."""


def post(m: Model, w: World, mv: Move, event: Event) -> None:
    """Give the machine an event; its new state is stored before anything is done."""
    if mv.a < 0:
        return
    after, actions = m.a.step(mv.a, event)
    promises = m.a.states[after].final and not m.a.states[mv.a].final
    if promises and mv.disk_a != NOBODY and m.keeps("what_is_not_journalled_is_not_promised"):
        post(m, w, mv, aw.Failed(""))
        return
    mv.a = after
    mv.do_a += actions
    if m.budget.reduced:
        _begin(m, w, mv)


def _begin(m: Model, w: World, mv: Move) -> None:
    """Do at once what only begins something, or only says something: see tests.model.explore."""
    while mv.do_a and (mv.do_a[0] in BESIDE or mv.do_a[0].startswith("Tell")):
        carry_out(m, w, mv)


def carry_out(m: Model, w: World, mv: Move) -> None:
    """The next action."""
    action, mv.do_a = mv.do_a[0], mv.do_a[1:]
    name, _, what = action.partition(" ")
    if action in BESIDE:
        _beside(mv, BESIDE[action])
    elif name == "Tell":
        said(m, w, mv, "a", what)
    else:
        try:
            _ACTIONS[name](m, w, mv, what)
        except Missing:
            post(m, w, mv, aw.Failed(""))
    if m.budget.reduced:
        _begin(m, w, mv)


def _beside(mv: Move, task: str) -> None:
    kind = task.partition("-")[0]
    mv.busy_a = frozenset({other for other in mv.busy_a if other.partition("-")[0] != kind} | {task})
    if task == "ask":
        mv.answer = ""
        mv.busy_a -= {"asked"}


def _copy(m: Model, w: World, mv: Move, _: str) -> None:
    if m.budget.hypervisor and w.leaving == NOBODY:
        if w.guest[0] == "x" or w.guest[1] != str(mv.src):
            raise Missing
        w.leaving = mv.dst
    mv.busy_a |= {"copy", "moves"}


def _wake(m: Model, w: World, mv: Move, _: str) -> None:
    if w.guest != f"s{mv.src}" or w.leaving != NOBODY:
        raise Missing
    w.guest = f"r{mv.src}"
    w.hear(mv.src, "running")


def _shut(m: Model, w: World, mv: Move, _: str) -> None:
    switch.shut(m, w, mv.old)


def _resume(m: Model, w: World, mv: Move, _: str) -> None:
    over = STEPS if m.keeps("a_rollback_ends_the_hold") else STEPS - {"hold", "idle"}
    mv.busy_a = frozenset(mv.busy_a - over - {"copy", "cancel", "cancel-certain"})
    switch.resume(m, w, mv.old)
    mv.busy_a -= set() if m.budget.hypervisor else {"suspend"}
    runs = m.a.states[mv.a].guest is Guest.RUNNING
    if "moves" in mv.busy_a and runs and m.budget.hypervisor and w.guest == f"r{mv.src}" and w.leaving == mv.dst:
        w.leaving = NOBODY
        w.hear(mv.src, "failed")
    mv.busy_a -= {"moves"}
    if m.a.states[mv.a].suspended and m.budget.hypervisor and m.keeps("who_stopped_the_guest_starts_it"):
        mv.busy_a |= {"wake"}


def _let_go(m: Model, w: World, mv: Move, _: str) -> None:
    if w.ports[mv.old][0] == "H":
        switch.resume(m, w, mv.old)


def _send_abort(m: Model, w: World, mv: Move, _: str) -> None:
    if "stream" in mv.busy_a:
        write(mv, "abort")
        if mv.forth is not None and "eof" not in mv.forth:
            mv.forth = (*mv.forth, "eof")
        mv.back = None
        mv.busy_a -= {"stream"}


def _redirect(m: Model, w: World, mv: Move, _: str) -> None:
    mv.busy_a = frozenset(mv.busy_a - STEPS - {"copy"})
    frames.take(m, w, mv.old, mv.src)
    switch.redirect(m, w, mv.old, mv.new)
    post(m, w, mv, aw.Redirected())


def _purge(m: Model, w: World, mv: Move, what: str) -> None:
    mv.busy_a -= {"settle", "settle-late"}
    moved_on = any(later.old == mv.new for later in w.moves)
    opens = m.b.phases[mv.b] in OPEN if mv.b >= 0 else mv.b == OPENED
    if w.guest != "x" and not moved_on and not opens and w.ports[mv.new][0] in "NSC":
        raise Violation("the source purges what the destination has not opened")
    switch.purge(w, mv.old, keep_redirect=bool(what))
    if not m.keeps("every_instance_has_its_epoch"):
        for other in range(len(w.ports)):
            if other != mv.old and w.host_of(other) == mv.src:
                switch.purge(w, other)
    if "stream" in mv.busy_a:
        mv.busy_a -= {"stream"}
        mv.forth, mv.back = ("eof",), None


_ACTIONS: dict[str, Callable[[Model, World, Move, str], None]] = {
    "Copy": _copy,
    "Wake": _wake,
    "LetGo": _let_go,
    "Shut": _shut,
    "Resume": _resume,
    "SendAbort": _send_abort,
    "Redirect": _redirect,
    "Purge": _purge,
}


def write(mv: Move, *messages: str) -> bool:
    """Send on the stream; False when it has broken."""
    if "stream" not in mv.busy_a or mv.forth is None or "eof" in mv.forth:
        return False
    mv.forth = (*mv.forth, *messages)
    return True


# ---- what goes on beside ----


def ends(m: Model, w: World, mv: Move, task: str) -> None:
    """A work beside the actions comes to its end."""
    _TASKS[task](m, w, mv)


def ready(m: Model, w: World, mv: Move) -> frozenset[str]:
    """What can come to its end now.

    What the hypervisor said before the move is heard before memory is copied. And a source that is refused when it
    comes back to settle tries again until its deadline: that changes nothing, and is left out.
    """
    waits = {"stream", "moves", "asked", "ask"}
    if "suspend" in mv.busy_a:
        waits.add("wake")
    if not m.budget.hypervisor and "suspend" in mv.busy_a:  # who has no hypervisor stops it in one go
        waits |= {"cancel", "cancel-certain"}
    if w.frame == f"q{mv.src}" and w.guest == f"r{mv.src}" and m.keeps("the_agent_leads"):
        waits.add("idle")  # until the guest has taken what is in its queue
    if {"paused", "running"} & set(w.heard[mv.src]):
        waits.add("copy")
    if mv.b < 0 and mv.b != OPENED and "connect" in mv.busy_a and m.a.phases[mv.a] == aw.Phase.SETTLING:
        waits.add("connect")
    return mv.busy_a - waits


def _done(mv: Move, task: str) -> None:
    mv.busy_a -= {task}


def _probe(m: Model, w: World, mv: Move) -> None:
    _done(mv, "probe")
    post(m, w, mv, aw.Probed())


def _connect(m: Model, w: World, mv: Move) -> None:
    """What the far end makes of `begin` it says when it reads it: see tests.model.network."""
    _done(mv, "connect")
    if w.is_alive(mv.dst):
        mv.busy_a |= {"stream"}
        mv.forth, mv.back = ("begin",), ()
    else:
        post(m, w, mv, aw.PeerLost())


def _copied(m: Model, w: World, mv: Move) -> None:
    _done(mv, "copy")
    post(m, w, mv, aw.Converged())


def _watch(m: Model, w: World, mv: Move) -> None:
    _done(mv, "watch")
    if w.guest == f"r{mv.src}":
        post(m, w, mv, aw.GuestFits())
    elif m.a.phases[mv.a] == aw.Phase.WATCHING:
        post(m, w, mv, aw.Failed(""))


def _hold(m: Model, w: World, mv: Move) -> None:
    _done(mv, "hold")
    try:
        switch.hold(m, w, mv.old)
    except Missing:
        return post(m, w, mv, aw.Failed(""))
    mv.busy_a |= {"idle"}
    return None


def _idle(m: Model, w: World, mv: Move) -> None:
    _done(mv, "idle")
    post(m, w, mv, aw.Held())


def outrun(m: Model, w: World, mv: Move) -> None:
    """The queue is empty, and the copy has to begin again."""
    _done(mv, "idle")
    post(m, w, mv, aw.Outrun())


def _suspend(m: Model, w: World, mv: Move) -> None:
    _done(mv, "suspend")
    if w.guest == f"r{mv.src}":
        frames.stops(w, mv.src, led=m.a.phases[mv.a] == aw.Phase.SUSPENDING)
        w.guest = f"s{mv.src}"
        w.hear(mv.src, "paused" if m.budget.hypervisor and w.leaving == NOBODY else "paused moving")
    elif m.a.phases[mv.a] != aw.Phase.SUSPENDING:
        return
    elif w.guest == f"s{mv.src}":
        post(m, w, mv, aw.GuestPaused(moving=True))
    else:
        post(m, w, mv, aw.Failed(""))


def _woken(m: Model, w: World, mv: Move) -> None:
    """Rolled back, and our own stop of the guest may have come after it was seen to run: it is made to run."""
    _done(mv, "wake")
    if w.guest == f"s{mv.src}":
        w.guest, w.leaving = f"r{mv.src}", NOBODY
        w.hear(mv.src, "running")


def _drain(m: Model, w: World, mv: Move, *, follow: bool = False) -> None:
    _done(mv, "drain-follow" if follow else "drain")
    mv.busy_a = frozenset(mv.busy_a - {"copy", "watch"})
    try:
        switch.shut(m, w, mv.old)
    except Missing:
        return post(m, w, mv, aw.Failed(""))
    if follow:
        frames.take(m, w, mv.old, mv.src)
    return post(m, w, mv, aw.Drained() if write(mv) else aw.Failed(""))


def _final(m: Model, w: World, mv: Move) -> None:
    _done(mv, "final")
    if not write(mv, "final"):
        post(m, w, mv, aw.Failed(""))


def _settle(m: Model, w: World, mv: Move, *, late: bool = False) -> None:
    _done(mv, "settle-late" if late else "settle")
    if not write(mv, "redirecting", *(("late",) if late else ()), "settle-end"):
        post(m, w, mv, aw.PeerLost())


def _cancelled(m: Model, w: World, mv: Move, *, certain: bool = False) -> None:
    """What the hypervisor makes of it; when it is still moving a stopped guest, see tests.model.hypervisor."""
    _done(mv, "cancel-certain" if certain else "cancel")
    here = w.guest[1:] == str(mv.src)
    if not m.budget.hypervisor:
        if certain and w.guest != "x":
            if w.guest == f"r{mv.dst}":
                raise Violation("the guest is started at the source and runs at the destination")
            w.guest = f"r{mv.src}"
        post(m, w, mv, aw.GuestResumed() if certain else aw.CancelFailed())
        return
    if here and w.guest[0] == "r":
        if w.leaving == mv.dst:
            w.leaving = NOBODY
            w.hear(mv.src, "failed")
        post(m, w, mv, aw.GuestResumed())
    elif here and certain and w.leaving == NOBODY:
        w.guest = f"r{mv.src}"
        w.hear(mv.src, "running")
        post(m, w, mv, aw.GuestResumed())
    else:
        post(m, w, mv, aw.CancelFailed())


def said_by_peer(m: Model, w: World, mv: Move) -> None:
    """The answer to Ask is here."""
    committed, opened = mv.answer[0] == "c", mv.answer[1] == "o"
    mv.answer = ""
    mv.busy_a -= {"asked"}
    post(m, w, mv, aw.PeerSaid(committed=committed, opened=opened))


_TASKS: dict[str, Callable[[Model, World, Move], None]] = {
    "probe": _probe,
    "connect": _connect,
    "copy": _copied,
    "watch": _watch,
    "hold": _hold,
    "idle": _idle,
    "suspend": _suspend,
    "wake": _woken,
    "drain": _drain,
    "drain-follow": lambda m, w, mv: _drain(m, w, mv, follow=True),
    "final": _final,
    "settle": _settle,
    "settle-late": lambda m, w, mv: _settle(m, w, mv, late=True),
    "cancel": _cancelled,
    "cancel-certain": lambda m, w, mv: _cancelled(m, w, mv, certain=True),
}
