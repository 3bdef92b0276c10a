"""What holds in every state, and how it may end."""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from migrator.lifecycle.coordinator import UNAUTHORISED
from migrator.lifecycle.machine import Guest
from migrator.lifecycle.source_words import Phase
from tests.model import switch
from tests.model.model import Model, Violation
from tests.model.world import Move, World


def check(m: Model, w: World) -> None:
    """Raises Violation."""
    latest = w.moves[-1]
    _check_watching(m, w, latest)
    degraded = latest.b >= 0 and m.b.states[latest.b].degraded
    unknown = m.c.states[latest.c].phase in UNAUTHORISED
    places = (latest.src, latest.old, latest.new)
    key = (w.ports, w.guest, w.alive, w.leaving, places, degraded, latest.finished, unknown)
    if key in m.sound:
        return
    switch.check_owned(w)
    if any(mv.finished > 1 for mv in w.moves):
        raise Violation("the outcome was told twice")
    _check_open(w, latest, degraded)
    if unknown and w.ports[latest.new][0] == "C":
        raise Violation("the destination has committed, and the coordinator's journal knows of no switchover")
    if w.guest == f"r{latest.dst}":
        if w.ports[latest.new] == "N-":
            raise Violation("the guest runs at the destination, and its port is purged")
        if m.budget.strict and w.ports[latest.new][0] == "S":
            raise Violation("strict: the guest runs at the destination without its state")
    m.sound.add(key)


def _check_watching(m: Model, w: World, mv: Move) -> None:
    """A source that waits until the guest fits does so for a guest that runs, and holds nothing of it."""
    if mv.a < 0 or m.a.phases[mv.a] != Phase.WATCHING or mv.do_a or not w.is_alive(mv.src):
        return
    if m.a.states[mv.a].guest is not Guest.RUNNING:
        raise Violation("the source waits for a guest to fit that has stopped")
    if w.ports[mv.old][0] not in "OW":
        raise Violation(f"the guest goes on for a while, and port {mv.old} holds ({w.ports[mv.old][0]})")
    if "watch" not in mv.busy_a:
        raise Violation("the source waits for a guest to fit, and does not look")


def _check_open(w: World, latest: Move, degraded: bool) -> None:
    active = [k for k, port in enumerate(w.ports) if port[0] in switch.ACTIVE]
    hosts = [w.host_of(k) for k in active]
    if len(set(hosts)) < len(hosts):
        raise Violation("two open ports on one host")
    for instance, host in zip(active, hosts, strict=True):
        if w.guest == f"r{1 - host}" and instance != latest.old:
            raise Violation(f"port {instance} is open, and the guest runs at the other host")
        if w.guest == f"s{1 - host}" and instance != latest.old:
            raise Violation(f"port {instance} is open, and the guest is on its way")
    if len(active) > 1 and not degraded:
        raise Violation("two open ports")
    if w.ports[latest.new][0] == "C" and w.ports[latest.old][0] in switch.ACTIVE and _elsewhere(w, latest):
        raise Violation("the destination has committed, the source's port is open and the guest may be elsewhere")


def _elsewhere(w: World, mv: Move) -> bool:
    return w.guest == f"r{mv.dst}" or (w.guest[0] == "s" and w.leaving == mv.dst)


def good(m: Model, w: World) -> str:
    """How it may end; else what is wrong with it."""
    ports = [(k, w.host_of(k), port[0]) for k, port in enumerate(w.ports) if port[0] != "N"]
    if w.guest == "x":
        # As if it had not been there, or as it was when it died.
        bad = [k for k, _, letter in ports if letter != "O"]
        return f"ports {bad} are left of a VM that has ended" if bad or len(ports) > 1 else ""
    if w.guest[0] != "r":
        return "the guest runs nowhere"
    here = [letter for _, host, letter in ports if str(host) == w.guest[1]]
    if len(ports) != 1 or here != ["O"]:
        return f"the guest runs at host {w.guest[1]}, and ports are {' '.join(w.ports)}"
    if w.frame and w.frame not in {"ok", "lost"}:
        return f"a frame waits for ever: {w.frame}"
    for mv in w.moves:
        if not m.c.states[mv.c].over:
            return f"the coordinator never comes to an end ({m.c.phases[mv.c]})"
    return ""
