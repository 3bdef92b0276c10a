"""The maps of both hosts' switches: words, gates and leases, which outlive agents. Letters: tests.model.world."""

from __future__ import annotations

from tests.model.frames import held_goes, purged
from tests.model.model import Missing, Model, Violation
from tests.model.world import World

ACTIVE = "OWH"
LEASED = "SCHQRT"
"""Port states that must not outlive who answers for them."""


def lease(m: Model) -> str:
    return "+" if m.keeps("leases") else "-"


def stage(m: Model, w: World, instance: int) -> None:
    if w.ports[instance] != "N-":
        raise Missing
    w.put(instance, "S" + lease(m))


def hold(m: Model, w: World, instance: int) -> None:
    """Hold, with a lease."""
    if w.ports[instance][0] not in "OWHQ":
        raise Missing
    if w.ports[instance][0] in "OW":
        w.put(instance, "H" + lease(m))


def shut(m: Model, w: World, instance: int) -> None:
    """Hold and quiesce, with a lease: what is so already stays so."""
    port = w.ports[instance]
    if port == "N-":
        raise Missing
    if port[0] in ACTIVE:
        w.put(instance, "Q" + lease(m))


def redirect(m: Model, w: World, instance: int, to: int) -> None:
    shut(m, w, instance)
    if w.ports[instance][0] == "Q":
        w.put(instance, "R" + w.ports[instance][1])
    held_goes(w, instance, f"f{to}")


def resume(m: Model, w: World, instance: int) -> None:
    """Active, without a lease; what is held goes to the guest."""
    if w.ports[instance][0] not in "OWHQ":
        raise Missing
    w.put(instance, "O-")
    if m.keeps("rollback_gives_held_frames_back_in_order"):
        held_goes(w, instance, f"q{w.host_of(instance)}")


def purge(w: World, instance: int, *, keep_redirect: bool = False) -> None:
    port = w.ports[instance]
    if keep_redirect and port[0] in "RT":
        w.put(instance, "T" + port[1])
        return
    if port != "N-":
        purged(w, instance)
        w.put(instance, "N-")


def commit(w: World, instance: int) -> None:
    port = w.ports[instance]
    if port[0] in "SC":
        w.put(instance, "C" + port[1])
    elif port[0] not in ACTIVE:
        raise Missing


def open_port(w: World, instance: int, *, broadcast: bool) -> None:
    """The guest runs here. Its lease is that of the wait for the source."""
    port = w.ports[instance]
    if port[0] not in "CWOH":
        raise Missing
    if port[0] in "CW":
        w.put(instance, "O-" if broadcast else "W+")
    held_goes(w, instance, f"q{w.host_of(instance)}", only="g")


def source_done(w: World, instance: int) -> None:
    """What waited for the source goes to the guest."""
    if w.ports[instance][0] == "W":
        w.put(instance, "O-")
        held_goes(w, instance, f"q{w.host_of(instance)}")


def renew(w: World, instance: int) -> None:
    w.put(instance, w.ports[instance][0] + "+")


def lease_passes(m: Model, w: World, instance: int) -> None:
    letter = w.ports[instance][0]
    if letter == "Q" and not m.keeps("leases_never_open_a_quiesced_source"):
        w.put(instance, "O-")
        return
    w.put(instance, letter + "!")


def check_owned(w: World) -> None:
    """Nothing acts for ever that nobody answers for: where the agent is dead there is a lease."""
    for instance, port in enumerate(w.ports):
        if port[0] in LEASED and port[1] == "-" and not w.is_alive(w.host_of(instance)):
            raise Violation(f"port {instance} ({port[0]}) acts for ever, and its agent is dead")
