"""What a search is about: a budget, the machines, and which rules have been taken away."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migrator.lifecycle import coordinator, destination, source
from tests.model.machines import Machine, Step
from tests.model.world import COUNTED, Budget


class Violation(AssertionError):
    """What must never be has happened."""


class Missing(Exception):
    """The switch has no such instance, or it is in a state in which that cannot be done: the action fails."""


@dataclass
class Model:
    """`without`: names of rules that the glue around the machines does not keep; `source` … may be mutated machines."""

    budget: Budget
    without: frozenset[str] = frozenset()
    source: Step = source.step
    destination: Step = destination.step
    coordinator: Step = coordinator.step
    a: Machine = field(init=False)
    b: Machine = field(init=False)
    c: Machine = field(init=False)
    mishaps: list[tuple[str, int, int]] = field(init=False)  # name, index in World.spent, how often
    sound: set[tuple[Any, ...]] = field(init=False, default_factory=set)  # see tests.model.invariants

    def __post_init__(self) -> None:
        self.a, self.b, self.c = Machine(self.source), Machine(self.destination), Machine(self.coordinator)
        counted = [(name, index, getattr(self.budget, name)) for index, name in enumerate(COUNTED) if name != "lates"]
        self.mishaps = [item for item in counted if item[2]]

    def keeps(self, rule: str) -> bool:
        return rule not in self.without
