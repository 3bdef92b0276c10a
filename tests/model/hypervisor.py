"""The hypervisors of both hosts, libvirt's way: what they do with the guest, and what they say to their agents."""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Guest
from tests.model import destination_end, frames, source_end
from tests.model.model import Model
from tests.model.network import Possible
from tests.model.world import NOBODY, Move, World


def words(w: World) -> Possible:
    """What a hypervisor said comes to its agent."""
    for host in (0, 1):
        if w.heard[host] and w.is_alive(host):
            yield f"host {host} hears: {w.heard[host][0]}", lambda m, w, host=host: _hear(m, w, host)


def _hear(m: Model, w: World, host: int) -> None:
    """It concerns the newest instance here, and no other."""
    what = w.heard[host][0]
    w.set_heard(host, w.heard[host][1:])
    here = [mv for mv in w.moves if (mv.a >= 0 and mv.src == host) or (mv.b >= 0 and mv.dst == host)]
    newest = here[-1:] if m.keeps("every_instance_has_its_epoch") else here
    for mv in newest:
        if mv.src == host:
            source_end.post(m, w, mv, _SOURCE[what])
        elif what in _DESTINATION:
            destination_end.post(m, w, mv, _DESTINATION[what])


_SOURCE = {
    "running": aw.GuestResumed(),
    "paused": aw.GuestPaused(moving=False),
    "paused moving": aw.GuestPaused(moving=True),
    "gone": aw.GuestGone(moved=False),
    "gone moved": aw.GuestGone(moved=True),
    "failed": aw.Failed(""),
}
_DESTINATION = {"running": bw.GuestRunning(), "gone": bw.GuestGone()}


def moves(m: Model, w: World) -> Possible:
    """What the hypervisors do by themselves."""
    if m.budget.hypervisor and w.leaving != NOBODY and w.guest[0] == "s":
        if not m.budget.strict or _may_start(m, w):
            yield "the guest arrives", arrives
        else:
            yield "the guest may not start and returns", returns
        if any(mv.busy_a & {"cancel", "cancel-certain"} for mv in w.moves if mv.dst == w.leaving):
            yield "the move is cancelled late", returns
    if w.guest[0] == "r":
        yield from first_frame(w)


def first_frame(w: World) -> Possible:
    """The guest's first frame opens a committed port, and its agent is told."""
    for mv in w.moves:
        if w.guest == f"r{mv.dst}" and w.ports[mv.new][0] == "C" and w.ports[mv.new][1] != "!":
            yield "the guest's first frame", lambda m, w, new=mv.new: _first_frame(m, w, new)


def _first_frame(m: Model, w: World, instance: int) -> None:
    w.put(instance, "W+")
    w.hear(w.host_of(instance), "running")


def _may_start(m: Model, w: World) -> bool:
    """Strict: the agent's answer, or that of the mark which its commit takes away."""
    if not m.keeps("strict_waits_for_the_commit"):
        return True
    mv = w.moves[-1]
    if mv.b < 0:
        return False
    state = m.b.states[mv.b]
    if not w.is_alive(mv.dst):
        return not m.keeps("an_arrival_without_a_word_is_refused") or w.ports[mv.new][0] not in "NS"
    return bool(state.committed or state.guest)


def arrives(m: Model, w: World) -> None:
    there = w.leaving
    w.guest, w.leaving = f"r{there}", NOBODY
    w.hear(there, "running")
    w.hear(1 - there, "gone moved")
    if not w.is_alive(1 - there):
        frames.taps_close(w, 1 - there)


def returns(m: Model, w: World) -> None:
    """The move has failed after the stop: the guest runs where it was."""
    here = 1 - w.leaving
    w.guest, w.leaving = f"r{here}", NOBODY
    w.hear(here, "running")


def fails(m: Model, w: World) -> None:
    """The move has failed, and the guest never stopped."""
    here = 1 - w.leaving
    w.leaving = NOBODY
    w.hear(here, "failed")


def stops(m: Model, w: World) -> None:
    """The hypervisor stops the guest for the move before anybody asks it to."""
    host = int(w.guest[1])
    frames.stops(w, host, led=False)
    w.guest = f"s{host}"
    w.hear(host, "paused moving")


def suspends(m: Model, w: World) -> None:
    """Somebody suspends the guest and lets it go on: of a move they know nothing."""
    w.hear(int(w.guest[1]), "paused")
    w.hear(int(w.guest[1]), "running")


def dies(m: Model, w: World) -> None:
    w.hear(int(w.guest[1]), "gone")
    w.guest, w.leaving = "x", NOBODY
    w.frame = "lost" if w.frame else ""


def found(m: Model, w: World, mv: Move) -> Guest:
    """Where a source's agent that starts takes the guest to be."""
    if not m.budget.hypervisor:
        return Guest.PAUSED if m.a.states[mv.a].final else Guest.RUNNING
    if w.guest[1:] != str(mv.src):
        return Guest.GONE
    return Guest.RUNNING if w.guest[0] == "r" else Guest.PAUSED
