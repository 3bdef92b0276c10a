"""The agents' and the coordinator's own lives: death, what they find when they start, and how they meet again."""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from dataclasses import replace

from migrator.agent.destination import LEASED as ARRIVING
from migrator.agent.source_times import LEASED as LEAVING
from migrator.lifecycle import coordinator as c
from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Guest
from tests.model import coordinator_end, destination_end, frames, hypervisor, source_end, switch
from tests.model.coordinator_end import ROLE, say
from tests.model.machines import journalled, missed
from tests.model.model import Model, Violation
from tests.model.network import Possible
from tests.model.world import NOBODY, OPENED, UNOPENED, Move, World


def dies(m: Model, w: World, host: int) -> None:
    """Of an agent the store and the switch stay."""
    w.alive &= ~(1 << host)
    w.set_heard(host, ())
    frames.taps_close(w, host)
    if not m.keeps("held_frames_survive_a_restart"):
        frames.keeper_dies(w, host)
    coordinator_end.detached(m, w, host)
    for mv in w.moves:
        if mv.src == host:
            mv.do_a, mv.busy_a, mv.answer = (), frozenset(), ""
            if mv.forth is not None or "stream" in mv.busy_b:  # what it has sent may still be read
                mv.forth, mv.back = (*(word for word in mv.forth or () if word != "eof"), "eof"), None
            if mv.disk_a != NOBODY:
                mv.a, mv.disk_a = mv.disk_a, NOBODY
        else:
            mv.do_b, mv.busy_b, mv.answer = (), frozenset(), ""
            mv.b = NOBODY if mv.b < 0 else mv.b
            mv.forth = None
            if "stream" in mv.busy_a:
                mv.back = ("eof",)
            if "asked" in mv.busy_a:
                mv.busy_a = frozenset(mv.busy_a - {"asked"} | {"ask"})


def returns(m: Model, w: World, host: int) -> None:
    w.alive |= 1 << host
    for mv in w.moves:
        if mv.src == host and mv.a >= 0:
            _take_up_source(m, w, mv)
        if mv.dst == host and mv.b >= 0:
            _take_up_destination(m, w, mv)


def _take_up_source(m: Model, w: World, mv: Move) -> None:
    mv.said_a, mv.flaws = "", mv.flaws.replace("a", "")
    guest = hypervisor.found(m, w, mv)
    if not m.budget.hypervisor and guest is Guest.RUNNING and m.a.states[mv.a].phase not in aw.LEFT:
        if w.guest == f"r{mv.dst}":
            raise Violation("the guest is taken to be at the source and runs at the destination")
        w.guest = f"r{mv.src}" if w.guest[0] == "s" else w.guest
    source_end.post(m, w, mv, aw.Restarted(guest))


def _take_up_destination(m: Model, w: World, mv: Move) -> None:
    mv.said_b, mv.flaws = "", mv.flaws.replace("b", "")
    port = w.ports[mv.new][0]
    opened, is_committed = port in switch.ACTIVE, port in "CWOH"
    runs = m.budget.hypervisor and w.guest == f"r{mv.dst}"
    if not m.budget.hypervisor and is_committed and not opened:
        state = replace(m.b.states[mv.b], phase=bw.Phase.COMMITTED, guest=False)
        mv.b = m.b.number(state)
    destination_end.post(m, w, mv, bw.Restarted(guest=opened or runs, committed=is_committed))


_SWITCHING = {c.Phase.AUTHORISED, c.Phase.SWITCHOVER, c.Phase.COMMITTED}


def coordinator_dies(m: Model, w: World) -> None:
    """And is started at once: agents attach when they do. The journal has what it was told."""
    for host in (0, 1):
        w.attached &= ~(1 << host)
    for mv in w.moves:
        mv.to_a = mv.to_b = mv.from_a = mv.from_b = ()
        mv.asking = ""
        mv.c = m.c.number(journalled(m.c.states[mv.c]))
        if not m.keeps("final_is_never_sent_before_it_is_authorised") and m.c.phases[mv.c] in _SWITCHING:
            mv.c = m.c.number(replace(m.c.states[mv.c], phase=c.Phase.PRE_COPY))
        coordinator_end.post(m, w, mv, c.Restarted())


def attaches(m: Model, w: World, host: int) -> None:
    """Hello, what it tells by itself; the coordinator's Sync; and the agent's last words."""
    w.attached |= 1 << host
    for mv in w.moves:
        end = "a" if mv.src == host else "b"
        instance = mv.old if end == "a" else mv.new
        for what in missed(ROLE[end], w.ports[instance][0]):
            coordinator_end.post(m, w, mv, c.Said(ROLE[end], what))
        coordinator_end.post(m, w, mv, c.Back(ROLE[end]))
        last = mv.said_a if end == "a" else mv.said_b
        if end in mv.flaws and last != "degraded":
            say(w, mv, end, "degraded")
        if last:
            say(w, mv, end, last)
    _sync(w, host)


def _sync(w: World, host: int) -> None:
    if w.host_of(w.place) != host:
        return
    mv, message = w.moves[-1], f"port {w.place}"
    if mv.src == host:
        mv.to_a = (message, *mv.to_a)
    else:
        mv.to_b = (message, *mv.to_b)


def routine(m: Model, w: World) -> Possible:
    """What agents do at any time: attach, forget what is over, renew leases; and what leases do where one is dead."""
    for host in (0, 1):
        if not w.is_alive(host):
            yield f"agent {host} returns", lambda m, w, host=host: returns(m, w, host)
        elif not w.is_attached(host):
            yield f"agent {host} attaches", lambda m, w, host=host: attaches(m, w, host)
    for i, mv in enumerate(w.moves):
        if (
            mv.a >= 0
            and m.a.states[mv.a].phase in aw.OVER
            and not mv.do_a
            and w.is_attached(mv.src)
            and not mv.busy_a & {"wake"}
        ):
            yield "A forgets it", lambda m, w, i=i: _forget_source(m, w, w.moves[i])
        if mv.b >= 0 and m.b.states[mv.b].phase in bw.OVER and not mv.do_b and w.is_attached(mv.dst):
            yield "B forgets it", lambda m, w, i=i: _forget_destination(m, w, w.moves[i])
    yield from _leases(m, w)


def _forget_source(m: Model, w: World, mv: Move) -> None:
    if m.a.phases[mv.a] == aw.Phase.RELEASED:
        _note_ended(w, mv.src, mv.old)
    mv.a, mv.disk_a, mv.busy_a, mv.said_a = NOBODY, NOBODY, frozenset(), ""
    mv.forth, mv.back, mv.answer = (None if mv.forth is None else ("eof",)), None, ""


def _forget_destination(m: Model, w: World, mv: Move) -> None:
    aborted = m.b.phases[mv.b] == bw.Phase.ABORTED
    if aborted:
        _note_ended(w, mv.dst, mv.new)
    mv.b, mv.said_b = UNOPENED if aborted else OPENED, ""


def _note_ended(w: World, host: int, instance: int) -> None:
    first, second = w.ended
    w.ended = (max(first, instance), second) if host == 0 else (first, max(second, instance))


def _leases(m: Model, w: World) -> Possible:
    for instance, port in enumerate(w.ports):
        host = w.host_of(instance)
        if port[1] == "+" and not w.is_alive(host):
            yield f"lease {instance} passes", lambda m, w, k=instance: switch.lease_passes(m, w, k)
        elif port[0] in switch.LEASED and port[1] != "+" and w.is_alive(host) and _leased(m, w, instance):
            yield f"lease {instance} is renewed", lambda m, w, k=instance: switch.renew(w, k)


def _leased(m: Model, w: World, instance: int) -> bool:
    """Is it in a phase in which its agent renews its lease?"""
    return any(
        (mv.old == instance and mv.a >= 0 and m.a.states[mv.a].phase in LEAVING)
        or (mv.new == instance and mv.b >= 0 and m.b.states[mv.b].phase in ARRIVING)
        for mv in w.moves
    )
