"""What is under way: orders and words between coordinator and agents, the stream between the agents, questions."""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from collections.abc import Callable, Iterator

from migrator.lifecycle import destination as destination_machine
from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source as source_machine
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Role, Verdict
from tests.model import coordinator_end, destination_end, source_end, switch
from tests.model.coordinator_end import say
from tests.model.machines import VERDICTS
from tests.model.model import Model
from tests.model.world import NOBODY, OPENED, Move, World

Change = Callable[[Model, World], None]
Possible = Iterator[tuple[str, Change]]


def deliveries(w: World) -> Possible:
    for i, mv in enumerate(w.moves):
        who = f"{i + 1}: " if len(w.moves) > 1 else ""
        if mv.to_a and w.is_alive(mv.src):
            yield f"{who}C→A {mv.to_a[0]}", lambda m, w, i=i: _to_source(m, w, w.moves[i])
        if mv.to_b and w.is_alive(mv.dst):
            yield f"{who}C→B {mv.to_b[0]}", lambda m, w, i=i: _to_destination(m, w, w.moves[i])
        if mv.from_a:
            yield f"{who}A→C {mv.from_a[0]}", lambda m, w, i=i: _from_source(m, w, w.moves[i])
        if mv.from_b:
            yield f"{who}B→C {mv.from_b[0]}", lambda m, w, i=i: _from_destination(m, w, w.moves[i])
        if mv.forth and w.is_alive(mv.dst):
            yield f"{who}A→B {mv.forth[0]}", lambda m, w, i=i: _forth(m, w, w.moves[i])
        if mv.back and w.is_alive(mv.src) and "stream" in mv.busy_a:
            yield f"{who}B→A {mv.back[0]}", lambda m, w, i=i: _back(m, w, w.moves[i])


# ---- the coordinator and the agents ----


def _from_source(m: Model, w: World, mv: Move) -> None:
    what, mv.from_a = mv.from_a[0], mv.from_a[1:]
    coordinator_end.hears(m, w, mv, "a", what)


def _from_destination(m: Model, w: World, mv: Move) -> None:
    what, mv.from_b = mv.from_b[0], mv.from_b[1:]
    coordinator_end.hears(m, w, mv, "b", what)


def _to_source(m: Model, w: World, mv: Move) -> None:
    message, mv.to_a = mv.to_a[0], mv.to_a[1:]
    order_source(m, w, mv, message)


def order_source(m: Model, w: World, mv: Move, message: str) -> None:
    if message == "describe":
        _describe(m, w, mv)
    elif message == "start":
        _start(m, w, mv)
    elif message == "end-redirect":
        _end_redirect(m, w, mv)
    elif message.startswith("port "):
        _port(m, w, mv.src, int(message[5:]))
    elif message in VERDICTS:
        _verdict(m, w, mv, "a", VERDICTS[message])
    elif mv.a < 0:
        say(w, mv, "a", "aborted")
    else:
        source_end.post(m, w, mv, aw.Authorised() if message == "authorise" else aw.AbortAsked(""))


def _to_destination(m: Model, w: World, mv: Move) -> None:
    message, mv.to_b = mv.to_b[0], mv.to_b[1:]
    if message == "prepare":
        _prepare(m, w, mv)
    elif message.startswith("port "):
        _port(m, w, mv.dst, int(message[5:]))
    elif message in VERDICTS:
        _verdict(m, w, mv, "b", VERDICTS[message])
    elif mv.b < 0:
        if mv.b != OPENED and (mv.b == NOBODY or m.keeps("a_refusal_is_over_at_once")):
            say(w, mv, "b", "aborted")
    else:
        destination_end.post(m, w, mv, bw.AbortAsked(""))


def _moving_already(m: Model, w: World, mv: Move) -> bool:
    """Is the VM at the source of another migration there that has not left?"""
    others = (other for other in w.moves if other is not mv and other.a >= 0 and other.src == mv.src)
    return any(m.a.phases[other.a] not in aw.LEFT for other in others)


def _describe(m: Model, w: World, mv: Move) -> None:
    found = [k for k, port in enumerate(w.ports) if port[0] in switch.ACTIVE and w.host_of(k) == mv.src]
    if (m.keeps("never_two_moves_of_one_vm") and _moving_already(m, w, mv)) or not found:
        say(w, mv, "a", "cannot describe")
        return
    mv.old = found[-1]
    say(w, mv, "a", "did describe")


def _start(m: Model, w: World, mv: Move) -> None:
    if mv.a < 0:
        if m.keeps("never_two_moves_of_one_vm") and _moving_already(m, w, mv):
            say(w, mv, "a", "cannot start")
            return
        state, actions = source_machine.begin()
        mv.a, mv.do_a = m.a.number(state), (*mv.do_a, *(type(action).__name__ for action in actions))
    say(w, mv, "a", "did start")


def _prepare(m: Model, w: World, mv: Move) -> None:
    if mv.b != NOBODY:
        say(w, mv, "b", "did prepare" if mv.b >= 0 and m.b.phases[mv.b] == "staged" else "cannot prepare")
        return
    for older in w.moves:
        if older is not mv and older.src == mv.dst and older.a >= 0:
            source_end.post(m, w, older, Verdict(guest_at=Role.DESTINATION, committed=True, opened=True))
    state, actions = destination_machine.begin(strict=m.budget.strict)
    mv.b, mv.do_b = m.b.number(state), (*mv.do_b, *(type(action).__name__ for action in actions))


def _verdict(m: Model, w: World, mv: Move, end: str, verdict: Verdict) -> None:
    if end == "a" and mv.a >= 0:
        if verdict.gone and not (m.budget.hypervisor and w.guest[1:] == str(mv.src)):
            source_end.post(m, w, mv, aw.GuestGone(moved=False))
        source_end.post(m, w, mv, verdict)
    elif end == "b" and mv.b >= 0:
        destination_end.post(m, w, mv, verdict)
        if verdict.guest_at is None and not verdict.gone:
            not_elsewhere(m, w, mv)
    elif verdict.guest_at is not coordinator_end.ROLE[end] and (end == "a" or mv.b != OPENED):
        say(w, mv, end, "aborted")


def not_elsewhere(m: Model, w: World, mv: Move) -> None:
    if mv.b >= 0 and m.b.phases[mv.b] == bw.Phase.COMMITTED:
        destination_end.committed(m, w, mv)


def _end_redirect(m: Model, w: World, mv: Move) -> None:
    if mv.a >= 0:
        source_end.post(m, w, mv, aw.EndRedirect())
    elif w.ports[mv.old][0] == "T":
        switch.purge(w, mv.old)


def _port(m: Model, w: World, host: int, instance: int) -> None:
    """The configuration of a port, as a Sync has it."""
    in_hand = any((mv.a >= 0 and mv.src == host) or (mv.b >= 0 and mv.dst == host) for mv in w.moves)
    port = w.ports[instance]
    ended = m.keeps("every_instance_has_its_epoch") and instance <= w.ended[host]
    beside = any(p[0] not in "NT" for k, p in enumerate(w.ports) if k != instance and w.host_of(k) == host)
    if in_hand or (port[0] == "N" and (ended or beside)):
        return
    if port[0] in "NSC":
        w.put(instance, "O-")


# ---- the stream ----


def _forth(m: Model, w: World, mv: Move) -> None:
    assert mv.forth
    message, mv.forth = mv.forth[0], mv.forth[1:]
    if message == "begin":
        _begin(m, w, mv)
    elif message == "eof":
        mv.forth = None
        if mv.back is not None and "eof" not in mv.back:
            mv.back = (*mv.back, "eof")
        if "stream" in mv.busy_b:
            mv.busy_b -= {"stream"}
            destination_end.post(m, w, mv, bw.PeerLost())
    elif "stream" in mv.busy_b:
        if message == "final" and m.b.phases[mv.b] in destination_end.OPEN:
            return None
        if message == "late":
            return destination_end.filled(m, mv)
        if message == "settle-end":
            destination_end.has_all(m, mv)
        destination_end.post(m, w, mv, _FORTH[message])
    return None


_FORTH = {
    "final": bw.FinalReceived(),
    "redirecting": bw.Redirecting(),
    "settle-end": bw.SettleEnd(),
    "abort": bw.SourceAborted(),
}


def _begin(m: Model, w: World, mv: Move) -> None:
    if mv.b == OPENED:
        mv.forth, mv.back = None, ("ready", "opened", "settled", "eof")
    elif mv.b < 0:
        mv.forth, mv.back = None, ("eof",)
    else:
        mv.busy_b |= {"stream"}
        destination_end.post(m, w, mv, bw.Begun())


def _back(m: Model, w: World, mv: Move) -> None:
    assert mv.back
    message, mv.back = mv.back[0], mv.back[1:]
    if message == "eof":
        mv.back = None
        mv.busy_a -= {"stream"}
        if mv.forth is not None and "eof" not in mv.forth:
            mv.forth = (*mv.forth, "eof")
    source_end.post(m, w, mv, _BACK[message])


_BACK = {
    "ready": aw.Ready(),
    "committed": aw.PeerCommitted(),
    "opened": aw.PeerOpened(),
    "opened lacks": aw.PeerOpened(lacks=True),
    "settled": aw.PeerSettled(),
    "failed": aw.PeerFailed(""),
    "eof": aw.PeerLost(),
}


# ---- questions ----


def ask(m: Model, w: World, mv: Move) -> None:
    """The source's question has come to the destination."""
    mv.busy_a = frozenset(mv.busy_a - {"ask"} | {"asked"})
    if mv.b < 0:
        mv.answer = _found(m, w, mv)
        return
    destination_end.post(m, w, mv, bw.Asked())
    not_elsewhere(m, w, mv)


def _found(m: Model, w: World, mv: Move) -> str:
    """Of what nothing is remembered the switch tells."""
    if mv.b != NOBODY or not m.keeps("doubt_ends"):
        return destination_end.state(m, mv)
    lived = any(p[0] not in "NSC" for k, p in enumerate(w.ports) if k >= mv.new and w.host_of(k) == mv.dst)
    return "co" if lived else "--"
