"""The three machines together with a hypervisor and a network that loses, explored breadth first.

Every interleaving within the budgets: a stream that breaks, an agent or the coordinator that dies and comes back, an
operator who aborts, a guest that stops by itself or comes back late. Checked in every state and at every end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from migrator.lifecycle import coordinator as c
from migrator.lifecycle import destination as b
from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source as a
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Action, Event, Guest, Role, Verdict

STATES_MAX = 400_000
Messages = tuple[Any, ...]


@dataclass(frozen=True)
class World:
    """`guest`: "A", "B", "-" while it is on its way, "X" once it has ended. Queues are in order; `None`: no stream."""

    c: c.State = field(default_factory=c.State)
    a: a.State | None = None
    b: b.State | None = None
    port_a: str = "active"
    port_b: str = "none"
    guest: str = "A"
    moving: bool = False
    to_a: Messages = ()  # from the coordinator
    to_b: Messages = ()
    from_a: Messages = ()  # to the coordinator
    from_b: Messages = ()
    forth: Messages | None = None  # the stream from A to B
    back: Messages | None = None
    in_a: Messages = ()  # events of A's own making
    in_b: Messages = ()
    guest_a: Messages = ()  # events of the hypervisor
    guest_b: Messages = ()
    cancelling: bool | None = None  # a Cancel is under way, and whether it is certain
    said_a: str = ""
    said_b: str = ""
    finished: int = 0
    breaks: int = 0
    crashes: int = 0
    aborts: int = 0
    self_stops: int = 0
    returns: int = 0
    deaths: int = 0


@dataclass
class Budget:
    breaks: int = 0
    crashes: int = 0
    aborts: int = 0
    self_stops: int = 0
    returns: int = 0
    deaths: int = 0
    dry_run: bool = False
    hypervisor: bool = True  # False: the operator's word is the guest's move, the commit its resume
    strict: bool = False

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value != getattr(Budget, name)}
        return ",".join(f"{name}={value}" for name, value in given.items()) or "none"


class Model:
    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def first(self) -> World:
        state, actions = c.begin(dry_run=self.budget.dry_run)
        return self.coordinate(replace(World(), c=state), actions)

    # ---- actions ----

    def coordinate(self, w: World, actions: tuple[Action, ...]) -> World:
        for action in actions:
            if isinstance(action, c.Send | c.Tell):
                to = "to_a" if action.role is Role.SOURCE else "to_b"
                w = replace(w, **{to: (*getattr(w, to), action)})
            elif isinstance(action, c.Finish):
                w = replace(w, finished=w.finished + 1)
        return w

    def at_c(self, w: World, event: Event) -> World:
        state, actions = c.step(w.c, event)
        return self.coordinate(replace(w, c=state), actions)

    def at_a(self, w: World, event: Event) -> World:
        if w.a is None:
            return w
        state, actions = a.step(w.a, event)
        w = replace(w, a=state)
        for action in actions:
            w = self.act_a(w, action)
        if state.phase in aw.OVER:
            w = replace(w, in_a=(), cancelling=None)
        return w

    def act_a(self, w: World, action: Action) -> World:  # noqa: C901
        match action:
            case aw.Probe():
                return replace(w, in_a=(*w.in_a, aw.Probed()))
            case aw.Connect():
                return replace(w, forth=("begin",), back=())
            case aw.Copy() if w.guest == "X":
                return replace(w, in_a=(*w.in_a, aw.Failed("")))
            case aw.Copy():
                return replace(w, moving=self.budget.hypervisor, in_a=(*w.in_a, aw.Converged()))
            case aw.Watch():
                return replace(w, in_a=(*w.in_a, aw.GuestFits()))
            case aw.Hold():
                return replace(w, port_a="held", in_a=(*w.in_a, aw.Held()))
            case aw.Suspend():
                return self.stop(w) if w.guest == "A" else replace(w, in_a=(*w.in_a, aw.Failed("")))
            case aw.Wake():
                if w.guest == "-" and not w.moving:
                    return replace(w, guest="A", guest_a=(*w.guest_a, aw.GuestResumed()))
                return replace(w, in_a=(*w.in_a, aw.Failed("")))
            case aw.Shut():
                return replace(w, port_a="shut") if w.port_a in {"active", "held"} else w
            case aw.Drain():
                return replace(w, port_a="shut", in_a=(*w.in_a, aw.Drained()))
            case aw.SendFinal():
                return self.send(w, "final")
            case aw.Ask():
                return self.ask(w)
            case aw.Cancel():
                return replace(w, cancelling=action.certain)
            case aw.Resume():
                return replace(w, port_a="active")
            case aw.SendAbort():
                return self.send(w, "abort")
            case aw.Redirect():
                return replace(w, port_a="redirect", in_a=(*w.in_a, aw.Redirected()))
            case aw.Settle():
                return self.send(self.send(w, "redirecting"), "settle-end")
            case aw.Purge():
                return replace(w, port_a="stub" if action.keep_redirect else "gone")
            case aw.Tell():
                return self.tell_a(replace(w, said_a=action.what))
        raise AssertionError(action)

    def stop(self, w: World) -> World:
        moving = w.moving or not self.budget.hypervisor
        return replace(w, guest="-", guest_a=(*w.guest_a, aw.GuestPaused(moving=moving)))

    def send(self, w: World, what: str) -> World:
        return replace(w, forth=(*w.forth, what)) if w.forth is not None else w

    def tell_a(self, w: World) -> World:
        return replace(w, from_a=(*w.from_a, c.Said(Role.SOURCE, w.said_a))) if w.said_a else w

    def tell_b(self, w: World) -> World:
        return replace(w, from_b=(*w.from_b, c.Said(Role.DESTINATION, w.said_b))) if w.said_b else w

    def ask(self, w: World) -> World:
        if w.b is None or w.b.phase is bw.Phase.ABORTED:
            return replace(w, in_a=(*w.in_a, aw.PeerSaid(committed=False, opened=False)))
        return self.at_b(w, bw.Asked())

    def at_b(self, w: World, event: Event) -> World:
        if w.b is None:
            return w
        state, actions = b.step(w.b, event)
        w = replace(w, b=state)
        for action in actions:
            w = self.act_b(w, action)
        if not self.budget.hypervisor and commits(state, event):
            assert w.guest != "A", "runs at both"
            w = replace(w, guest="B", guest_b=(*w.guest_b, bw.GuestRunning()))
        return w

    def act_b(self, w: World, action: Action) -> World:  # noqa: C901
        match action:
            case bw.Stage():
                return replace(w, port_b="staged", in_b=(*w.in_b, bw.Staged()))
            case bw.Accept():
                return replace(w, from_b=(*w.from_b, c.Prepared()))
            case bw.Refuse():
                return replace(w, from_b=(*w.from_b, c.Refused(Role.DESTINATION, "")))
            case bw.Commit():
                return replace(w, port_b="committed", in_b=(*w.in_b, bw.CommitDone()))
            case bw.Open():
                return replace(w, port_b="open", in_b=(*w.in_b, bw.Opened()))
            case bw.Purge():
                return replace(w, port_b="none")
            case bw.Answer():
                assert w.b is not None
                opened = w.b.phase in {bw.Phase.OPENING, bw.Phase.OPEN, bw.Phase.SETTLED}
                return replace(w, in_a=(*w.in_a, aw.PeerSaid(committed=w.b.committed, opened=opened)))
            case bw.SendReady():
                return self.reply(w, aw.Ready())
            case bw.SendCommitted():
                return self.reply(w, aw.PeerCommitted())
            case bw.SendOpened():
                return self.reply(w, aw.PeerOpened())
            case bw.SendSettled():
                return self.reply(w, aw.PeerSettled())
            case bw.SendFailed():
                return self.reply(w, aw.PeerFailed(""))
            case bw.Tell():
                return self.tell_b(replace(w, said_b=action.what))
            case bw.OpenBroadcast() | bw.CloseAccounts():
                return w
        raise AssertionError(action)

    def reply(self, w: World, event: Event) -> World:
        return replace(w, back=(*w.back, event)) if w.back is not None else w

    # ---- what can happen next ----

    def next(self, w: World) -> list[tuple[str, World]]:
        """Everything that is under way; only when nothing is, deadlines pass."""
        going = [*self.deliveries(w), *self.hypervisor(w)]
        return [*(going or self.deadlines(w)), *self.mishaps(w)]

    def deliveries(self, w: World) -> Iterator[tuple[str, World]]:
        if w.to_a:
            yield "C→A", self.order_a(replace(w, to_a=w.to_a[1:]), w.to_a[0])
        if w.to_b:
            yield "C→B", self.order_b(replace(w, to_b=w.to_b[1:]), w.to_b[0])
        if w.from_a:
            yield "A→C", self.at_c(replace(w, from_a=w.from_a[1:]), w.from_a[0])
        if w.from_b:
            yield "B→C", self.at_c(replace(w, from_b=w.from_b[1:]), w.from_b[0])
        if w.forth:
            yield f"A→B {w.forth[0]}", self.from_source(replace(w, forth=w.forth[1:]), w.forth[0])
        if w.back:
            yield f"B→A {type(w.back[0]).__name__}", self.at_a(replace(w, back=w.back[1:]), w.back[0])
        for queue, at in (("in_a", self.at_a), ("in_b", self.at_b), ("guest_a", self.at_a), ("guest_b", self.at_b)):
            waiting = getattr(w, queue)
            if waiting:
                yield f"{queue} {type(waiting[0]).__name__}", at(replace(w, **{queue: waiting[1:]}), waiting[0])

    def order_a(self, w: World, message: c.Send | c.Tell) -> World:
        if isinstance(message, c.Tell):
            if message.verdict.gone and w.guest == "X":
                w = self.at_a(w, aw.GuestGone(moved=False))
            return self.at_a(w, message.verdict) if w.a else self.nothing_at(w, Role.SOURCE)
        match message.order:
            case c.Order.DESCRIBE:
                return replace(w, from_a=(*w.from_a, c.Described()))
            case c.Order.START:
                state, actions = a.begin()
                w = replace(w, a=state, from_a=(*w.from_a, c.Started()))
                for action in actions:
                    w = self.act_a(w, action)
                return w
            case c.Order.AUTHORISE:
                return self.at_a(w, aw.Authorised())
            case c.Order.END_REDIRECT:
                return self.at_a(w, aw.EndRedirect())
        return self.at_a(w, aw.AbortAsked("")) if w.a else self.nothing_at(w, Role.SOURCE)

    def order_b(self, w: World, message: c.Send | c.Tell) -> World:
        if isinstance(message, c.Tell):
            return self.at_b(w, message.verdict) if w.b else self.nothing_at(w, Role.DESTINATION)
        if message.order is c.Order.PREPARE:
            state, actions = b.begin(strict=self.budget.strict)
            w = replace(w, b=state)
            for action in actions:
                w = self.act_b(w, action)
            return w
        return self.at_b(w, bw.AbortAsked("")) if w.b else self.nothing_at(w, Role.DESTINATION)

    def nothing_at(self, w: World, role: Role) -> World:
        queue = "from_a" if role is Role.SOURCE else "from_b"
        return replace(w, **{queue: (*getattr(w, queue), c.Said(role, "aborted"))})

    def from_source(self, w: World, message: str) -> World:
        if message == "begin" and (w.b is None or w.b.phase is bw.Phase.ABORTED):
            return self.cut(w)
        events = {
            "begin": bw.Begun(),
            "final": bw.FinalReceived(),
            "redirecting": bw.Redirecting(),
            "settle-end": bw.SettleEnd(),
            "abort": bw.SourceAborted(),
        }
        return self.at_b(w, events[message])

    def hypervisor(self, w: World) -> Iterator[tuple[str, World]]:
        if w.cancelling is not None:
            yield from self.cancel(replace(w, cancelling=None), w.cancelling)
        if w.moving and w.guest == "-":
            there = replace(w, guest="B", moving=False, guest_b=(*w.guest_b, bw.GuestRunning()))
            yield "guest arrives", replace(there, guest_a=(*w.guest_a, aw.GuestGone(moved=True)))
            if w.returns < self.budget.returns:
                back = replace(w, guest="A", moving=False, returns=w.returns + 1)
                yield "guest returns", replace(back, guest_a=(*w.guest_a, aw.GuestResumed()))

    def cancel(self, w: World, certain: bool) -> Iterator[tuple[str, World]]:
        if not self.budget.hypervisor:
            assert not (certain and w.guest == "B"), "runs at both"
            back = replace(w, guest="A", in_a=(*w.in_a, aw.GuestResumed()))
            yield "none", back if certain else replace(w, in_a=(*w.in_a, aw.CancelFailed()))
        elif w.guest == "A":
            yield "cancelled", replace(w, moving=False, in_a=(*w.in_a, aw.GuestResumed()))
        elif w.guest == "-" and w.moving:
            back = replace(w, guest="A", moving=False, guest_a=(*w.guest_a, aw.GuestResumed()))
            yield "cancelled late", back
            yield "not cancelled", replace(w, in_a=(*w.in_a, aw.CancelFailed()))
        else:
            yield "left already", replace(w, in_a=(*w.in_a, aw.CancelFailed()))

    def deadlines(self, w: World) -> Iterator[tuple[str, World]]:
        yield "C late", self.at_c(w, c.Timeout(w.c.phase))
        if w.a:
            yield "A late", self.at_a(w, aw.Timeout(w.a.phase))
        if w.b:
            yield "B late", self.at_b(w, bw.Timeout(w.b.phase))
        if w.guest == "X":
            yield "C finds it nowhere", self.at_c(w, c.GuestsGone())
        yield "places known", self.at_c(w, c.PlacesKnown())
        if w.a and w.a.phase is aw.Phase.STUB:
            yield "redirect idle", self.at_c(w, c.RedirectIdle())

    def mishaps(self, w: World) -> Iterator[tuple[str, World]]:
        if w.breaks < self.budget.breaks and w.forth is not None:
            yield "stream breaks", self.cut(replace(w, breaks=w.breaks + 1))
        if w.crashes < self.budget.crashes:
            w1 = replace(w, crashes=w.crashes + 1)
            yield "C dies", self.crash_c(w1)
            yield "A dies", self.crash_a(w1)
            yield "B dies", self.crash_b(w1)
        if w.aborts < self.budget.aborts:
            yield "operator aborts", self.at_c(replace(w, aborts=w.aborts + 1), c.AbortAsked(""))
        if w.deaths < self.budget.deaths and w.guest != "X":
            yield "VM dies", self.die(replace(w, deaths=w.deaths + 1))
        if w.self_stops < self.budget.self_stops and w.moving and w.guest == "A":
            yield "guest stops", self.stop(replace(w, self_stops=w.self_stops + 1))

    def die(self, w: World) -> World:
        if w.guest == "B":
            w = replace(w, guest_b=(*w.guest_b, bw.GuestGone()))
        else:
            w = replace(w, guest_a=(*w.guest_a, aw.GuestGone(moved=False)))
        return replace(w, guest="X", moving=False)

    def cut(self, w: World) -> World:
        return replace(
            w,
            forth=None,
            back=None,
            in_a=(*w.in_a, aw.PeerLost()) if w.a else w.in_a,
            in_b=(*w.in_b, bw.PeerLost()) if w.b else w.in_b,
        )

    def crash_a(self, w: World) -> World:
        w = replace(w, to_a=(), from_a=(), in_a=(), guest_a=(), cancelling=None)
        if w.forth is not None:
            w = replace(w, forth=None, back=None, in_b=(*w.in_b, bw.PeerLost()))
        guest = {"A": Guest.RUNNING, "-": Guest.PAUSED}.get(w.guest, Guest.GONE)
        if not self.budget.hypervisor and w.a:  # nobody to ask: what was promised to the destination decides
            guest = Guest.PAUSED if w.a.final else Guest.RUNNING
            assert w.a.final or w.guest != "B", "runs at both"
            w = w if w.a.final else replace(w, guest="A")
        w = self.at_a(w, aw.Restarted(guest))
        return self.at_c(w, c.Back(Role.SOURCE))

    def crash_b(self, w: World) -> World:
        w = replace(w, to_b=(), from_b=(), in_b=(), guest_b=())
        if w.forth is not None:
            w = replace(w, forth=None, back=None, in_a=(*w.in_a, aw.PeerLost()))
        committed = w.port_b in {"committed", "open"}
        runs = w.guest == "B" if self.budget.hypervisor else w.port_b == "open"
        if runs:
            assert w.guest != "A", "runs at both"
            w = replace(w, guest="B")
        w = self.at_b(w, bw.Restarted(guest=runs, committed=committed))
        if w.b and w.b.asked:
            w = replace(w, b=replace(w.b, asked=False))
        return self.at_c(w, c.Back(Role.DESTINATION))

    def crash_c(self, w: World) -> World:
        w = replace(w, to_a=(), to_b=(), from_a=(), from_b=())
        w = self.at_c(w, c.Restarted())
        w = self.at_c(self.at_c(w, c.Back(Role.SOURCE)), c.Back(Role.DESTINATION))
        return self.tell_b(self.tell_a(w))


def commits(state: b.State, event: Event) -> bool:
    """Does a guest without a hypervisor run at the destination from this event on?"""
    elsewhere = isinstance(event, Verdict) and (event.guest_at is not None or event.gone)
    asked = isinstance(event, bw.Asked | Verdict) and state.phase is bw.Phase.COMMITTED and not elsewhere
    return isinstance(event, bw.CommitDone) or asked


def check(w: World) -> None:
    """What holds at any time."""
    assert w.finished <= 1
    if w.port_b == "open":
        assert w.guest in {"B", "X"}, "open without its guest"
        assert w.b is not None
        if not w.b.degraded:
            assert w.port_a not in {"active", "held"}, "two open ports"
    if w.port_b == "committed" and w.port_a == "active":
        assert w.guest in {"A", "X"} or (w.guest == "-" and not w.moving), (
            "the source is active and the guest may be elsewhere"
        )
    if w.port_a in {"stub", "gone"} and w.guest != "X":
        assert w.port_b == "open", "purged what nobody has"
    if w.guest == "B":
        assert w.port_b != "none", "purged under a guest that is on its way"


def good(w: World, strict: bool) -> bool:
    """How it may end."""
    if w.guest == "X":  # as if it had not been there, or as it was when it died
        moved = w.port_b == "open" and w.port_a not in {"active", "held"}
        return moved or (w.port_a in {"active", "gone"} and w.port_b == "none")
    if w.guest == "A":
        return w.port_a == "active" and w.port_b == "none"
    if strict and w.port_b in {"staged", "committed"}:
        return w.port_a not in {"active", "held"}
    return w.guest == "B" and w.port_b == "open" and w.port_a not in {"active", "held"}


def explore(budget: Budget) -> dict[str, int]:
    """Visit every state; raise with the way to a bad one. Returns how many states there were, and ends by port."""
    model = Model(budget)
    first = model.first()
    came: dict[World, tuple[World | None, str]] = {first: (None, "")}
    edges: dict[World, list[World]] = {}
    waiting = deque([first])
    while waiting:
        w = waiting.popleft()
        try:
            check(w)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{_way(came, w)}") from error
        edges[w] = []
        for what, after in model.next(w):
            if after == w:
                continue
            edges[w].append(after)
            if after not in came:
                came[after] = (w, what)
                waiting.append(after)
        assert len(came) < STATES_MAX, "the model is too large"
    _all_reach_a_good_end(came, edges, budget.strict)
    return {"states": len(came), "ends": sum(not after for after in edges.values())}


def _all_reach_a_good_end(
    came: dict[World, tuple[World | None, str]], edges: dict[World, list[World]], strict: bool
) -> None:
    for w, after in edges.items():
        assert after or good(w, strict), f"a bad end\n{_way(came, w)}"
    before: dict[World, list[World]] = {}
    for w, after in edges.items():
        for following in after:
            before.setdefault(following, []).append(w)
    reached = {w for w, after in edges.items() if not after}
    waiting = deque(reached)
    while waiting:
        for earlier in before.get(waiting.popleft(), ()):
            if earlier not in reached:
                reached.add(earlier)
                waiting.append(earlier)
    lost = next((w for w in edges if w not in reached), None)
    assert lost is None, f"no end can be reached\n{_way(came, lost)}" if lost else ""


def _way(came: dict[World, tuple[World | None, str]], w: World | None) -> str:
    lines = []
    last = w
    while w is not None:
        w, what = came[w]
        if what:
            lines.append(what)
    return "\n".join([*reversed(lines), repr(last)])


@pytest.mark.parametrize(
    "budget",
    [
        Budget(),
        Budget(dry_run=True),
        Budget(returns=1),
        Budget(self_stops=1, returns=1),
        Budget(aborts=1, returns=1),
        Budget(breaks=1, returns=1),
        pytest.param(Budget(breaks=1, self_stops=1), marks=pytest.mark.slow),
        Budget(crashes=1),
        Budget(deaths=1),
        Budget(deaths=1, aborts=1),
        pytest.param(Budget(deaths=1, breaks=1), marks=pytest.mark.slow),
        pytest.param(Budget(deaths=1, crashes=1), marks=pytest.mark.slow),
        Budget(hypervisor=False, aborts=1, breaks=1),
        Budget(hypervisor=False, crashes=1),
        pytest.param(Budget(crashes=1, self_stops=1), marks=pytest.mark.slow),
        pytest.param(Budget(crashes=1, returns=1), marks=pytest.mark.slow),
        pytest.param(Budget(hypervisor=False, crashes=1, breaks=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_interleaving(budget: Budget) -> None:
    found = explore(budget)
    assert found["ends"] > 0
