"""One migration in hand: what was agreed on, its machine's state, the report that grows, and how it is journalled."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from migrator._pb import migrator_pb2 as pb
from migrator.lifecycle import coordinator as machine
from migrator.lifecycle.machine import Role

SETTLED_PHASES = frozenset({machine.Phase.DONE, machine.Phase.CLOSED, machine.Phase.ABORTED})
"""Phases in which the VM may be moved again."""


@dataclass(frozen=True)
class Agreed:
    """What does not change during a migration. `token` is shown by the source to the destination, once."""

    id: str
    vm: str
    source: str
    destination: str
    epoch: int  # of the instances at the destination
    channel: int  # 24 bits, random: frames that are redirected
    token: str  # hex
    strict: bool
    without_state: bool
    ordered_elsewhere: bool
    timeout_s: float
    downtime_ms: int  # 0: as the VM or its host is configured
    move: dict[str, Any] = field(default_factory=dict)  # pb.MoveOptions as JSON

    def host(self, role: Role) -> str:
        return self.source if role is Role.SOURCE else self.destination

    def role(self, host: str) -> Role | None:
        return {self.source: Role.SOURCE, self.destination: Role.DESTINATION}.get(host)


@dataclass
class Running:
    """A migration that there is something left to do, to undo or to wait for."""

    agreed: Agreed
    machine: machine.State
    report: pb.Migration
    epochs: dict[str, int] = field(default_factory=dict)  # MAC -> epoch at the source
    need: pb.Need | None = None
    opened_with: int = 0  # revision of the configuration that the destination named when it opened
    described_at: int = 0  # revision of the configuration that the source described
    news: asyncio.Event = field(default_factory=asyncio.Event)
    deadline: asyncio.TimerHandle | None = None
    report_later: asyncio.TimerHandle | None = None

    @property
    def id(self) -> str:
        return self.agreed.id

    @property
    def blocks(self) -> bool:
        """May the VM not be moved by another migration yet?"""
        return self.machine.phase not in SETTLED_PHASES

    @property
    def live(self) -> bool:
        """Is there something left for which the state has to be kept?"""
        return not self.machine.over

    def encode(self) -> bytes:
        """For the journal."""
        state = {**asdict(self.machine), "ended": sorted(self.machine.ended)}
        body = {"agreed": asdict(self.agreed), "machine": state, "epochs": self.epochs}
        return json.dumps(body, separators=(",", ":")).encode()

    def notify(self) -> None:
        """Wake up whoever follows the report."""
        self.news.set()
        self.news = asyncio.Event()


def decode(state: bytes, report: pb.Migration) -> Running:
    """What `encode` wrote; fields that this version does not know are left out, those it adds have their defaults."""
    body = json.loads(state)
    known = _known(machine.State, body["machine"])
    known["phase"] = machine.Phase(known["phase"])
    known["ended"] = frozenset(Role(role) for role in known["ended"])
    return Running(Agreed(**_known(Agreed, body["agreed"])), machine.State(**known), report, body["epochs"])


def _known(kind: type[Any], body: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in body.items() if name in names}


def new_report(agreed: Agreed) -> pb.Migration:
    return pb.Migration(
        id=agreed.id,
        vm=agreed.vm,
        source=agreed.source,
        destination=agreed.destination,
        epoch=agreed.epoch,
        phase="preparing",
        started_at=time.time(),
    )


_LATEST = ("rounds", "entries", "bytes", "rate", "leading")
_MAPS = ("moved", "not_moved", "times_ms", "frames", "memory")


def merge(report: pb.Migration, news: pb.Migration) -> None:
    """Take over what one agent knows: its numbers replace earlier ones, warnings are added once."""
    for name in _LATEST:
        value = getattr(news, name)
        if value or name == "rate":
            setattr(report, name, value)
    for name in _MAPS:
        getattr(report, name).update(getattr(news, name))
    report.warnings.extend(warning for warning in news.warnings if warning not in report.warnings)


def close(report: pb.Migration, outcome: str, reason: str, *, dry_run: bool = False) -> None:
    """The report's last lines. Records that did not reach the destination make a complete move a degraded one.

    What was feared of a move that is complete after all is a warning. So are frames that found a hold full.
    """
    dropped = report.frames["dropped"] + report.frames["dropped_at_destination"]
    if dropped:
        report.warnings.append(f"{dropped} frames were dropped: more came than a hold has room for")
    left = sum(report.not_moved.values())
    if outcome == "complete" and left:
        outcome, reason = "degraded", reason or f"{left} records were not moved"
    if outcome == "complete" and reason and not dry_run:
        report.warnings.append(reason)
        reason = ""
    report.outcome = outcome
    report.reason = reason
    report.done = True
    report.rate = 0
    report.finished_at = time.time()
    report.times_ms["total"] = (report.finished_at - report.started_at) * 1_000
