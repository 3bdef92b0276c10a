"""The vNIC's machine, with surroundings that only note what they are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from migrator.lab.virtual import RARP_MS, Behaviour, Machine


class Notes:
    """Surroundings without frames: a list of what was asked, and timers that run when told."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def appear(self, host: str) -> None:
        self.asked.append(("appear", host))

    def vanish(self, host: str) -> None:
        self.asked.append(("vanish", host))

    def run(self, host: str, *, came_back: bool) -> None:
        self.asked.append(("run", host, came_back))

    def halt(self, host: str, *, swallow: bool) -> None:
        self.asked.append(("halt", host, swallow))

    def announce(self, host: str) -> None:
        self.asked.append(("announce", host))

    def tell(self, host: str, event: dict[str, Any]) -> None:
        self.asked.append(("tell", host, event["event"], event["reason"]))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.timers.append((seconds, action))

    def pass_time(self) -> None:
        """Run the timers that are set now, the nearest first."""
        due, self.timers = sorted(self.timers, key=lambda timer: timer[0]), []
        for _, action in due:
            action()

    def forget(self) -> None:
        self.asked.clear()
        self.timers.clear()


def booted(**behaviour: Any) -> tuple[Machine, Notes]:
    notes = Notes()
    machine = Machine("uuid", "a", Behaviour(**behaviour), notes)
    machine.boot()
    notes.forget()
    return machine, notes


def test_a_stop_in_a_move_leads_to_the_destination() -> None:
    machine, notes = booted()
    assert machine.serve("a", {"op": "migrate", "to": "b"}) == {}
    assert (machine.state_at("a"), machine.state_at("b")) == ("running", "incoming")
    machine.serve("a", {"op": "suspend"})
    notes.pass_time()
    assert notes.asked == [
        ("appear", "b"),
        ("halt", "a", True),
        ("tell", "a", "paused", "migrated"),
        ("run", "b", False),
        ("tell", "b", "resumed", "migrated"),
    ]
    notes.asked.clear()
    notes.pass_time()
    assert notes.asked.count(("announce", "b")) == len(RARP_MS)
    assert notes.asked[-3:].count(("vanish", "a")) <= 1
    assert ("tell", "a", "stopped", "migrated") in notes.asked


def test_a_move_that_fails_late_ends_where_it_began() -> None:
    machine, notes = booted(fail_after_ms=10)
    machine.serve("a", {"op": "migrate", "to": "b"})
    machine.serve("a", {"op": "suspend"})
    notes.pass_time()
    assert (machine.place, machine.running, machine.state_at("b")) == ("a", True, "absent")
    assert notes.asked[3:] == [
        ("vanish", "b"),
        ("tell", "b", "stopped", "failed"),
        ("tell", "a", "migration-failed", "failed"),
        ("run", "a", True),
        ("tell", "a", "resumed", "failed"),
    ]


def test_a_timer_of_a_cancelled_move_does_nothing() -> None:
    machine, notes = booted(self_stop_ms=5)
    machine.serve("a", {"op": "migrate", "to": "b"})
    machine.serve("a", {"op": "cancel"})
    notes.pass_time()
    assert (machine.place, machine.running) == ("a", True)


def test_coming_back_keeps_the_tap() -> None:
    """The first move's lingering source is the second move's destination: its tap must stay."""
    machine, notes = booted()
    machine.serve("a", {"op": "migrate", "to": "b"})
    machine.serve("a", {"op": "suspend"})
    notes.pass_time()
    lingering = notes.timers
    notes.timers = []
    machine.serve("b", {"op": "migrate", "to": "a"})
    notes.asked.clear()
    notes.timers = lingering
    notes.pass_time()
    assert ("vanish", "a") not in notes.asked


def test_only_the_host_that_has_it_may_ask() -> None:
    machine, _ = booted()
    assert "error" in machine.serve("b", {"op": "suspend"})
    assert machine.running
    assert "error" in machine.serve("a", {"op": "somersault"})
