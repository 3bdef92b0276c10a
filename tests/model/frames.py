"""One frame as a token: where it waits, and that nothing held is lost.

`-`: not sent yet. hN: held for the guest at instance N. qN: in the guest's queue at host N. tN: taken out of that
queue by the source of instance N, kept in its file. fN: redirected, on its way to instance N. gN: the guest's own, held
at instance N. `ok`: there. `lost`: where a loss is told and not promised away (a guest that stopped by itself, a lease
that has passed, a VM that ended).
"""

# ruff: noqa: ARG001, ARG005, RUF100  (what can happen is functions of one shape)

from __future__ import annotations

from tests.model.model import Model, Violation
from tests.model.world import World


def held_goes(w: World, instance: int, to: str, *, only: str = "htg") -> None:
    """What waits at an instance goes on: the guest's own to the network, what is for the guest to `to`."""
    if w.frame and w.frame[0] in only and w.frame[1:] == str(instance):
        w.frame = "ok" if w.frame[0] == "g" else to


def purged(w: World, instance: int) -> None:
    if w.frame in {f"h{instance}", f"t{instance}", f"g{instance}"}:
        _lose(w, f"a frame that was held at instance {instance} is lost: it was purged")


def _lose(w: World, why: str) -> None:
    if w.guest != "x":
        raise Violation(why)
    w.frame = "lost"


def take(m: Model, w: World, instance: int, host: int) -> None:
    """The source takes what the guest left unread."""
    if w.frame == f"q{host}" and m.keeps("frames_left_in_the_guests_queue"):
        w.frame = f"t{instance}"


def comes(m: Model, w: World, instance: int) -> None:
    """A frame for the guest comes by the network to the host of an instance."""
    port = w.ports[instance]
    if port[0] == "O" or (port[0] in "HW" and port[1] == "!"):
        w.frame = f"q{w.host_of(instance)}"
    elif port[0] == "N":
        _lose(w, "a frame of a peer that does not know the new place yet is lost")
    elif port[1] == "!":
        w.frame = "lost"
    elif port[0] in "HWQ":
        if not m.keeps("frames_wait_at_the_source"):
            _lose(w, "a frame that came for the guest meanwhile is lost")
        w.frame = f"h{instance}"
    else:
        move = next(move for move in w.moves if move.old == instance)
        w.frame = f"f{move.new}"


def arrives(m: Model, w: World) -> None:
    """What was redirected is there."""
    instance = int(w.frame[1:])
    port = w.ports[instance]
    if port[0] in "OWH":
        w.frame = f"q{w.host_of(instance)}"
    elif port[0] == "Q":
        w.frame = f"h{instance}"
    elif port[0] in "RT" and port[1] != "!":
        move = next(move for move in w.moves if move.old == instance)
        w.frame = f"f{move.new}"
    elif port[1] == "!":
        w.frame = "lost"
    else:
        _lose(w, f"a frame that was held finds instance {instance} shut ({port[0]})")


def sends(m: Model, w: World, instance: int) -> None:
    """The guest sends one, where it runs. The first of a committed port opens it."""
    port = w.ports[instance]
    if port[0] in "OWH":
        w.frame = "ok"
    elif port[1] == "!":
        w.frame = "lost"
    elif port[0] in "SQR":
        if not m.keeps("the_guest_may_run_first"):
            _lose(w, "a frame that the guest sent before its port was open is lost")
        w.frame = f"g{instance}"
    else:
        w.frame = "lost"


def taps_close(w: World, host: int) -> None:
    """The guest is away and nobody keeps its device: what it left unread is gone, as the report says it may be."""
    if w.frame == f"q{host}" and w.guest != f"r{host}" and w.guest != f"s{host}":
        w.frame = "lost"


def keeper_dies(w: World, host: int) -> None:
    """The hold taps of a host are gone with its agent."""
    if w.frame[:1] in {"h", "g"} and w.host_of(int(w.frame[1:])) == host:
        _lose(w, "a frame that was held is lost with the agent")


def stops(w: World, host: int, *, led: bool) -> None:
    """The guest stops: what it has not read its hypervisor may swallow, unless the agent has seen to it."""
    if w.frame == f"q{host}" and led:
        raise Violation("the agent stopped a guest that had not taken what was in its queue")
