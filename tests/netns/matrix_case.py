# SPDX-License-Identifier: GPL-2.0-only
"""One case of the crash matrix, which cases there are, and what is written down of each."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import pytest

from migrator import faults
from migrator._pb import migrator_pb2 as pb
from migrator.lab.errors import TooSlow
from migrator.lab.processes import wait_until

from .matrix import REST_S, Going, MatrixCluster, Stage, asked, ended, known, monotonic, stands
from .matrix_faults import FAULTS, Fault, Roles
from .matrix_scenarios import SCENARIOS, UNREACHED, Played, trace

TRIES = 3
RESULTS = "MATRIX_RESULTS"  # environment: a file that each result is appended to, as a line of JSON
SHARE = "MATRIX"  # environment: "" phases, "cover" messages and reboots as well, "full" all, "N/M" a part of all
STEP = 11  # through the faults from point to point: has no common divisor with their number
SLOW = ("freeze", "stall", "kill two", "memory", "disk full")


@dataclass(frozen=True)
class Case:
    point: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.point}+{self.fault}"


@dataclass(frozen=True)
class Result:
    """`outcome` of the move; frames lost and the longest silence of a stream in ms; where the guest was then."""

    point: str
    fault: str
    scenario: str
    outcome: str
    reason: str
    lost: int
    silence_ms: float
    moved: bool
    seconds: float

    def write(self) -> None:
        if RESULTS in os.environ:
            with Path(os.environ[RESULTS]).open("a") as file:
                file.write(json.dumps(asdict(self)) + "\n")


def reachable() -> list[str]:
    return [point for point in faults.points() if point not in UNREACHED]


def quick() -> list[Case]:
    """Each phase once, by all faults in turn but for reboots."""
    return [case for case in covering() if case.point.count(".") == 1 and case.fault.kind != "reboot"]


def covering() -> list[Case]:
    """Each phase once, by all faults in turn; each message once at one of its ends, by those that take little time."""
    phases = [point for point in reachable() if point.count(".") == 1]
    messages = [point for point in reachable() if point.count(".") > 1]
    ends = [point for n, point in enumerate(messages) if n % 2 == n // 2 % 2]
    brief = [fault for fault in FAULTS if fault.kind not in SLOW]
    return [*spread(phases, FAULTS), *spread(ends, brief)]


def spread(points: list[str], kinds: list[Fault]) -> list[Case]:
    """Each point once, by faults in turn."""
    return [Case(point, kinds[n * STEP % len(kinds)]) for n, point in enumerate(points)]


def cases() -> list[Case]:
    share = os.environ.get(SHARE, "")
    if share in ("", "cover"):
        return covering() if share else quick()
    return chosen(reachable(), FAULTS, share)


def chosen(points: list[str], kinds: list[Fault], share: str) -> list[Case]:
    """All of them ("full"), or one part of so many ("N/M")."""
    every = [Case(point, fault) for point, fault in itertools.product(points, kinds)]
    if share == "full":
        return every
    part, _, parts = share.partition("/")
    return every[int(part) - 1 :: int(parts)]


def differing(reached: Iterable[str], expected: Iterable[str]) -> list[str]:
    """By which points they differ, each with what is wrong."""
    came, wanted = set(reached), set(expected)
    return [f"{one}: no scenario came to it" for one in sorted(wanted - came)] + [
        f"{one}: a scenario came to it, and none is said to" for one in sorted(came - wanted)
    ]


class Theatre:
    """The stage; made anew after a case that failed, so that it fails no other. Scenarios are traced once.

    A scenario that fails takes only the points with it that no other one comes to.
    """

    def __init__(
        self,
        make: Callable[[], MatrixCluster],
        furnish: Callable[[MatrixCluster], Stage] = Stage,
        scenarios: Sequence[Played] = SCENARIOS,
    ) -> None:
        self._make = make
        self._furnish = furnish
        self._scenarios = scenarios
        self._stage: Stage | None = None
        self._points: dict[str, list[str]] = {}  # by scenario
        self._failed: dict[str, str] = {}  # by scenario: how
        self._close: Callable[[], None] = lambda: None

    def stage(self) -> Stage:
        if self._stage is None:
            with contextlib.ExitStack() as undo:
                stage = self._furnish(undo.enter_context(self._make()))
                self._close = undo.pop_all().close
            self._stage = stage
        return self._stage

    def logs(self) -> str:
        return "" if self._stage is None else self._stage.logs()

    def close(self) -> None:
        close, self._close, self._stage = self._close, lambda: None, None
        close()

    def ways(self) -> dict[str, list[Played]]:
        """Point -> scenarios that come to it, the plain one first."""
        found: dict[str, list[Played]] = {}
        for scenario in self._scenarios:
            for point in self._trace(scenario):
                found.setdefault(point, []).append(scenario)
        return found

    def _trace(self, scenario: Played) -> list[str]:
        if scenario.name not in self._points:
            stage = self.stage()
            try:
                self._points[scenario.name] = trace(stage, scenario)
            except TooSlow:
                self.close()
                raise
            except Exception:
                self._points[scenario.name] = []
                self._failed[scenario.name] = f"the scenario {scenario.name!r} failed:\n{traceback.format_exc()}"
                print(self.logs())
                self.close()
        return self._points[scenario.name]

    def ways_to(self, point: str) -> list[Played]:
        """Scenarios that come to a point, at least one."""
        ways = self.ways().get(point, [])
        assert ways, "\n".join([*self._failed.values(), f"no scenario comes to {point}"])
        return ways

    def trouble(self, expected: Iterable[str]) -> str:
        """Scenarios that fail, and points that they come to otherwise than expected; nothing if all is well."""
        return "\n".join([*differing(self.ways(), expected), *self._failed.values()])


def play(theatre: Theatre, case: Case) -> Result:
    """Move, break, heal, and see that all is as it must be."""
    ways = theatre.ways_to(case.point)
    stage = theatre.stage()
    stage.rest()
    began = monotonic()
    before = known(stage)
    stage.numbers.begin()
    scenario, roles, move = _struck(stage, ways, case)
    move.join(REST_S)
    stage.revive(roles.here)
    report = wait_until("the move has an outcome", lambda: _outcome(stage, before, move), REST_S, 0.05)
    place = stage.rest()
    found = stage.numbers.end()
    result = Result(
        case.point,
        str(case.fault),
        scenario.name,
        report.outcome,
        report.reason,
        int(found["lost"]),
        round(found["silence"], 1),
        place == roles.there,
        round(monotonic() - began, 1),
    )
    result.write()
    assert not found["doubled"], f"{found} {result}"
    _check(stage, result)
    return result


def _struck(stage: Stage, ways: Sequence[Played], case: Case) -> tuple[Played, Roles, Going]:
    """Come to the point and strike; what a move comes to depends a little on time."""
    for scenario in itertools.islice(itertools.cycle(ways), max(TRIES, len(ways))):
        with asked(stage, ""):
            roles, move = scenario.begin(stage, case.point)
            if stands(stage, move) is not None:
                case.fault.strike(roles, move)
                return scenario, roles, move
        move.join(REST_S)
        stage.rest()
    raise AssertionError(f"nobody came to {case.point} again, as once in: {', '.join(way.name for way in ways)}")


def _outcome(stage: Stage, before: frozenset[str], move: Going) -> pb.Migration | None:
    """A coordinator that dies before it has written the migration down knows nothing of it afterwards."""
    found = ended(stage, before)
    if found is not None:
        return found
    try:
        lost = known(stage) <= before and not move.is_alive()
    except grpc.RpcError:
        return None
    return pb.Migration(outcome="refused", reason="the coordinator does not know of it") if lost else None


def _check(stage: Stage, result: Result) -> None:
    """Every connection lives, byte for byte, and the next move works and keeps them as well."""
    if stage.broken_talk:
        stage.converse_anew()
        stage.broken_talk = False
    stage.talk.assert_whole()
    if result.outcome in ("complete", "degraded") or result.moved:
        assert result.moved and result.outcome not in ("aborted", "refused"), result
    stage.move_on()
    stage.rest()
    stage.talk.assert_whole()


def parameters() -> list[object]:
    return [pytest.param(case, id=str(case)) for case in cases()]
