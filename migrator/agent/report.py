"""What one end of a migration knows about it: true numbers for the operator's report."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from migrator._pb import migrator_pb2 as pb


@dataclass
class Report:
    """Times are CLOCK_MONOTONIC seconds in `marks`, milliseconds in `times_ms`."""

    id: str
    vm: str
    epoch: int
    source: str
    destination: str
    warnings: list[str] = field(default_factory=list)
    rounds: int = 0
    entries: int = 0
    bytes: int = 0
    rate: float = 0.0
    leading: bool = False
    moved: Counter[str] = field(default_factory=Counter)
    not_moved: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)
    times_ms: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)  # of the guest, as in Migration.memory
    marks: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    revision: int = 0  # of the configuration that the ports opened with

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    @property
    def measured(self) -> bool:
        """Has the hypervisor said what the move took, if it says anything? It does a moment after the guest's start."""
        return not self.memory or "downtime_ms" in self.memory

    def mark(self, name: str, at: float = 0.0) -> None:
        """Remember when something happened; the first time counts."""
        self.marks.setdefault(name, at or time.monotonic())

    def span(self, name: str, since: str, until: str = "") -> None:
        """Milliseconds between two marks (until now without `until`); nothing when one is missing."""
        end = self.marks.get(until) if until else time.monotonic()
        if since in self.marks and end is not None:
            self.times_ms[name] = (end - self.marks[since]) * 1e3

    def lasted(self, name: str, began: float) -> None:
        """Milliseconds since `began` (time.monotonic) as the time of a part."""
        self.times_ms[name] = (time.monotonic() - began) * 1e3

    def commit(self, committed: pb.Committed) -> None:
        """The destination's word: what it has, and what it could not take."""
        self.mark("committed")
        self.span("committed", "paused", "committed")
        self.moved, self.not_moved = Counter(committed.moved), Counter(committed.not_moved)

    def message(self, phase: str) -> pb.Migration:
        return pb.Migration(
            id=self.id,
            vm=self.vm,
            epoch=self.epoch,
            source=self.source,
            destination=self.destination,
            phase=phase,
            warnings=self.warnings,
            rounds=self.rounds,
            entries=self.entries,
            bytes=self.bytes,
            rate=self.rate,
            moved=dict(self.moved),
            not_moved=dict(self.not_moved),
            times_ms=self.times_ms,
            frames=dict(self.frames),
            memory=self.memory,
            leading=self.leading,
            reason=self.reason,
            revision=self.revision,
        )
