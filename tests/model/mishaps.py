"""What goes wrong, as often as the budget says; and deadlines, which pass when nothing else is under way."""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from collections.abc import Callable

from migrator.lifecycle import coordinator as c
from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Role
from tests.model import agents, coordinator_end, destination_end, frames, hypervisor, source_end
from tests.model.model import Model
from tests.model.network import Change, Possible
from tests.model.world import COUNTED, NOBODY, Move, World

_LATES = COUNTED.index("lates")


def early(m: Model, w: World) -> bool:
    """May a deadline pass though something is under way?"""
    return bool(w.spent[_LATES] < m.budget.lates)


def _spending(what: str, change: Change) -> Change:
    def spend(m: Model, w: World) -> None:
        w.spend(what)
        change(m, w)

    return spend


def mishaps(m: Model, w: World) -> Possible:
    for what, index, limit in m.mishaps:
        if w.spent[index] < limit:
            for label, change in _OFFERS[what](m, w):
                yield label, _spending(what, change)
    if m.budget.frames:
        yield from _frames(m, w)


# ---- deadlines ----


def deadlines(m: Model, w: World, *, free: bool) -> Possible:
    """`free`: nothing else is under way, so that they do not count."""
    for label, change in _deadlines(m, w):
        if free:
            yield label, change
        elif early(m, w):
            yield f"{label}, early", _spending("lates", change)
        elif label == "B: late (waiting)":  # a second, in which a source that cannot go on tries again and again
            yield label, change


def _deadlines(m: Model, w: World) -> Possible:
    for i, mv in enumerate(w.moves):
        if not m.c.states[mv.c].over:
            yield f"C: late ({m.c.phases[mv.c]})", lambda m, w, i=i: _coordinator_late(m, w, i)
        if mv.a >= 0 and w.is_alive(mv.src) and m.a.phases[mv.a] not in {"stub", *aw.OVER}:
            yield f"A: late ({m.a.phases[mv.a]})", lambda m, w, i=i: _source_late(m, w, i)
        if mv.b >= 0 and w.is_alive(mv.dst) and m.b.phases[mv.b] not in {"loading", *bw.OVER}:
            yield f"B: late ({m.b.phases[mv.b]})", lambda m, w, i=i: _destination_late(m, w, i)
        if "source-first" in mv.busy_b:
            yield "B has waited for the source", lambda m, w, i=i: destination_end.waited(m, w, w.moves[i])
        state = m.c.states[mv.c]
        looked_for = state.phase in c.UNDECIDED | c.UNDONE and Role.SOURCE not in state.ended and not state.gone
        if w.guest == "x" and looked_for and w.alive == w.attached == 3:
            yield "C finds it nowhere", lambda m, w, i=i: coordinator_end.post(m, w, w.moves[i], c.GuestsGone())
        if state.phase in c.MOVED and not state.over and not state.places_known:
            yield "all know the place", lambda m, w, i=i: coordinator_end.post(m, w, w.moves[i], c.PlacesKnown())
        if w.ports[mv.old][0] == "T" and w.is_attached(mv.src) and mv.a >= 0 and m.a.phases[mv.a] == "stub":
            yield "the redirect is idle", lambda m, w, i=i: _idle(m, w, i)


def _coordinator_late(m: Model, w: World, i: int) -> None:
    mv = w.moves[i]
    coordinator_end.post(m, w, mv, c.Timeout(m.c.states[mv.c].phase))


def _source_late(m: Model, w: World, i: int) -> None:
    mv = w.moves[i]
    source_end.post(m, w, mv, aw.Timeout(m.a.states[mv.a].phase))


def _destination_late(m: Model, w: World, i: int) -> None:
    mv = w.moves[i]
    destination_end.post(m, w, mv, bw.Timeout(m.b.states[mv.b].phase))


def _idle(m: Model, w: World, i: int) -> None:
    """A coordinator that has forgotten the migration has the redirect ended where the VM is not."""
    mv = w.moves[i]
    if m.c.states[mv.c].over:
        if w.place != mv.old:
            mv.to_a = (*mv.to_a, "end-redirect")
        return
    coordinator_end.post(m, w, mv, c.RedirectIdle())


# ---- mishaps ----


def _cuts(m: Model, w: World) -> Possible:
    for i, mv in enumerate(w.moves):
        if "stream" in mv.busy_a and (mv.forth, mv.back) != (("eof",), ("eof",)):
            yield "the stream breaks", lambda m, w, i=i: _cut(w, i, late=False)
            if mv.forth and mv.forth != ("eof",):
                yield "the stream breaks, its end is read late", lambda m, w, i=i: _cut(w, i, late=True)


def _cut(w: World, i: int, *, late: bool) -> None:
    mv = w.moves[i]
    mv.forth = (*(word for word in mv.forth or () if late and word != "eof"), "eof")
    mv.back = ("eof",)


def _crashes(m: Model, w: World) -> Possible:
    if "C" in m.budget.dies and not all(m.c.states[mv.c].over for mv in w.moves):
        yield "C dies", agents.coordinator_dies
    for host in (0, 1):
        if "AB"[host] in m.budget.dies and w.is_alive(host) and any(_in_hand(mv, host) for mv in w.moves):
            yield f"agent {host} dies", lambda m, w, host=host: agents.dies(m, w, host)


def _in_hand(mv: Move, host: int) -> bool:
    return bool((mv.src == host and mv.a != NOBODY) or (mv.dst == host and mv.b != NOBODY))


def _detaches(m: Model, w: World) -> Possible:
    for host in (0, 1):
        if w.is_attached(host):
            yield f"agent {host} is cut off", lambda m, w, host=host: coordinator_end.detached(m, w, host)


def _aborts(m: Model, w: World) -> Possible:
    mv = w.moves[-1]
    if not m.c.states[mv.c].over and m.c.states[mv.c].phase not in c.MOVED | c.UNDONE:
        yield "an operator aborts", lambda m, w: coordinator_end.post(m, w, w.moves[-1], c.AbortAsked(""))


def _self_stops(m: Model, w: World) -> Possible:
    if w.leaving != NOBODY and w.guest[0] == "r":
        yield "the guest stops by itself", hypervisor.stops


def _returns(m: Model, w: World) -> Possible:
    if w.leaving != NOBODY:
        stopped = w.guest[0] == "s"
        yield ("the guest returns", hypervisor.returns) if stopped else ("the move fails", hypervisor.fails)


def _deaths(m: Model, w: World) -> Possible:
    if w.guest != "x":
        yield "the VM ends", hypervisor.dies


def _plains(m: Model, w: World) -> Possible:
    if w.guest[0] == "r" and w.leaving == NOBODY:  # during a move libvirt lets nobody resume it
        yield "somebody suspends the guest for a moment", hypervisor.suspends


QUEUES = ("to_a", "to_b", "from_a", "from_b")


def _messages(
    what: str, at_least: int, change: Callable[[tuple[str, ...]], tuple[str, ...]]
) -> Callable[[Model, World], Possible]:
    def offers(m: Model, w: World) -> Possible:
        for i, mv in enumerate(w.moves):
            for queue in QUEUES:
                if len(waiting := getattr(mv, queue)) >= at_least:
                    yield (
                        f"{queue} {waiting[0]} {what}",
                        lambda m, w, i=i, queue=queue: setattr(w.moves[i], queue, change(getattr(w.moves[i], queue))),
                    )

    return offers


def _fails(m: Model, w: World) -> Possible:
    for i, mv in enumerate(w.moves):
        for task in mv.busy_a & {"probe", "copy", "hold", "suspend", "drain", "drain-follow"}:
            yield f"A: {task} fails", lambda m, w, i=i, task=task: _source_fails(m, w, i, task)
        if mv.do_b and mv.do_b[0].partition(" ")[0] in {"Stage", "Commit", "Open"}:
            yield f"B: {mv.do_b[0]} fails", lambda m, w, i=i: _destination_fails(m, w, i)
        if "stream" in mv.busy_b:
            yield "B cannot load", lambda m, w, i=i: destination_end.post(m, w, w.moves[i], bw.Failed(""))


def _source_fails(m: Model, w: World, i: int, task: str) -> None:
    mv = w.moves[i]
    mv.busy_a -= {task}
    source_end.post(m, w, mv, aw.Failed(""))


def _destination_fails(m: Model, w: World, i: int) -> None:
    mv = w.moves[i]
    mv.do_b = mv.do_b[1:]
    destination_end.post(m, w, mv, bw.Failed(""))


def _outruns(m: Model, w: World) -> Possible:
    for i, mv in enumerate(w.moves):
        if "idle" in source_end.ready(m, w, mv):
            yield "A: more has changed than could be noted", lambda m, w, i=i: source_end.outrun(m, w, w.moves[i])


def _disks(m: Model, w: World) -> Possible:
    mv = w.moves[-1]
    if mv.a >= 0 and mv.disk_a == NOBODY and w.is_alive(mv.src):
        yield "the source's disk is full", lambda m, w: setattr(w.moves[-1], "disk_a", w.moves[-1].a)


def _again(m: Model, w: World) -> Possible:
    """Another migration as soon as it is allowed: back, or once more."""
    state = m.c.states[w.moves[-1].c]
    if len(w.moves) == 1 and state.phase in {c.Phase.DONE, c.Phase.CLOSED, c.Phase.ABORTED} and w.attached == 3:
        yield "the operator moves it again", begin_again


def begin_again(m: Model, w: World) -> None:
    """A second migration, from where the coordinator has the VM to the other host."""
    state, actions = c.begin()
    move = Move(src=w.host_of(w.place), old=w.place, new=2, c=m.c.number(state))
    w.moves.append(move)
    coordinator_end.send_all(w, move, actions)


def _frames(m: Model, w: World) -> Possible:
    if w.frame != "-":
        return
    mv = w.moves[-1]
    if m.budget.frames == "to":
        sent_there = not m.c.states[mv.c].places_known and w.guest != "x"
        if w.ports[mv.old][0] != "N" or sent_there:
            yield f"a frame comes to instance {mv.old}", lambda m, w: frames.comes(m, w, w.moves[-1].old)
        if w.ports[mv.new][0] in "OW":
            yield f"a frame comes to instance {mv.new}", lambda m, w: frames.comes(m, w, w.moves[-1].new)
    elif w.guest[0] == "r":
        instance = mv.old if w.guest[1] == str(mv.src) else mv.new
        if w.ports[instance][0] != "C":
            yield "the guest sends a frame", lambda m, w, k=instance: frames.sends(m, w, k)


_OFFERS: dict[str, Callable[[Model, World], Possible]] = {
    "cuts": _cuts,
    "crashes": _crashes,
    "detaches": _detaches,
    "aborts": _aborts,
    "self_stops": _self_stops,
    "returns": _returns,
    "deaths": _deaths,
    "plains": _plains,
    "losses": _messages("is lost", 1, lambda queue: queue[1:]),
    "copies": _messages("comes twice", 1, lambda queue: (queue[0], *queue)),
    "swaps": _messages("is overtaken", 2, lambda queue: (queue[1], queue[0], *queue[2:])),
    "fails": _fails,
    "outruns": _outruns,
    "disks": _disks,
    "again": _again,
}
