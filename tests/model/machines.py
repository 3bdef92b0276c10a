"""The three machines as `migrator.lifecycle` has them, with numbers for states and words for actions.

Each step is worked out once and remembered: an exploration takes the same ones millions of times. What is only text
(the reasons that people read) is left out of states and actions, for no machine decides by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator import orders
from migrator.coordinator.running import Agreed, Running, decode
from migrator.lifecycle import coordinator as c
from migrator.lifecycle.machine import Action, Event, Role, Verdict

Step = Callable[[Any, Event], tuple[Any, tuple[Action, ...]]]

VERDICTS: dict[str, Verdict] = {}
"""Word of a coordinator's Tell -> what it says."""


def word(action: Action) -> str:
    """`Drain follow`, `Tell paused`, `Send source start`, `Verdict source …`: the action and what matters of it."""
    name = type(action).__name__
    if isinstance(action, c.Tell):
        verdict = action.verdict
        what = f"at-{verdict.guest_at or 'unknown'}{'-opened' * verdict.opened}{'-gone' * verdict.gone}"
        VERDICTS[what] = verdict
        return f"Verdict {action.role} {what}"
    values = [(field.name, getattr(action, field.name)) for field in fields(action) if field.name != "reason"]
    shown = [value if isinstance(value, str) else name for name, value in values if value not in {False, None}]
    return " ".join([name, *map(str, shown)])


class Machine:
    """One machine. A state is its number; `states` has them."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.states: list[Any] = []
        self.phases: list[str] = []
        self._numbers: dict[Any, int] = {}
        self._steps: dict[tuple[int, Event], tuple[int, tuple[str, ...]]] = {}

    def number(self, state: Any) -> int:
        if getattr(state, "reason", ""):
            state = replace(state, reason="")
        found = self._numbers.get(state)
        if found is None:
            found = self._numbers[state] = len(self.states)
            self.states.append(state)
            self.phases.append(str(state.phase))
        return found

    def step(self, number: int, event: Event) -> tuple[int, tuple[str, ...]]:
        key = (number, event)
        found = self._steps.get(key)
        if found is None:
            state, actions = self._step(self.states[number], event)
            found = self._steps[key] = self.number(state), tuple(word(action) for action in actions)
        return found


# ---- what the coordinator's own code makes of its journal and of an agent's greeting ----

_AGREED = Agreed("m", "vm", "A", "B", 2, 1, "", False, False, False, 0.0, 0)


def journalled(state: c.State) -> c.State:
    """The state as a coordinator that starts finds it: through the journal's own coding."""
    run = Running(_AGREED, state, pb.Migration(), {"mac": 1})
    body = json.loads(run.encode())
    return decode(json.dumps(body).encode(), pb.Migration()).machine


_INSTANCES = {
    "S": "staged",
    "C": "staged",
    "W": "active",
    "O": "active",
    "H": "active",
    "Q": "quiesced",
    "R": "quiesced",
}


def missed(role: Role, port: str) -> tuple[str, ...]:
    """Words that a port's instance stands for when its agent attaches: `port` is its letter in the model's switch."""
    if port == "N":
        return ()
    instance = pb.Instance(
        vm="vm",
        mac="mac",
        epoch=1 if role is Role.SOURCE else 2,
        state=_INSTANCES.get(port, "stub"),
        committed=port in "CWO",
        redirecting=port in "RT",
    )
    run = Running(_AGREED, c.State(), pb.Migration(), {"mac": 1})
    return tuple(orders.missed(run, role, pb.Hello(host=role, instances=[instance])))
