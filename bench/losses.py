"""Which numbered frames of a stage were lost, and when in which move: so that whoever reads a loss can look for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 20  # runs of lost frames that are told one by one


@dataclass(frozen=True)
class Move:
    """Seconds of CLOCK_MONOTONIC: asked for, guest stopped and resumed, done."""

    number: int
    to: str
    began: float
    stopped: float
    resumed: float
    ended: float


@dataclass(frozen=True)
class Gap:
    """Frames `first` to `last` of one direction, the first sent at `sent` (CLOCK_MONOTONIC), did not arrive."""

    direction: str  # "to the guest" | "from the guest"
    first: int
    last: int
    sent: float

    @property
    def frames(self) -> int:
        return self.last - self.first + 1


def told(name: str, gaps: Sequence[Gap], moves: Sequence[Move], drops: Sequence[str]) -> list[str]:
    """Lines for the reader: each gap and its place in a move; what the switches dropped, by reason."""
    lines = [f"{name}: {gap.frames} frames {gap.direction} lost, {_when(gap.sent, moves)}" for gap in gaps[:SHOWN]]
    if len(gaps) > SHOWN:
        lines.append(f"{name}: {sum(gap.frames for gap in gaps[SHOWN:])} more in {len(gaps) - SHOWN} other gaps")
    if gaps:
        lines.append(f"{name}: dropped by the switches: {', '.join(drops) or 'nothing'}")
    return lines


def _when(sent: float, moves: Sequence[Move]) -> str:
    """In milliseconds from the nearest steps of the move that had begun last."""
    before = [move for move in moves if move.began <= sent]
    if not before:
        return "before the first move"
    move = before[-1]
    steps = {"begin": move.began, "stop": move.stopped, "resume": move.resumed, "end": move.ended}
    since = ", ".join(f"{1e3 * (sent - at):+.1f} ms from its {step}" for step, at in steps.items())
    return f"sent in move {move.number} to {move.to}: {since}"
