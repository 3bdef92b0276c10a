# SPDX-License-Identifier: GPL-2.0-only
"""The soak: random steps of a seed's plan on a cluster of three hosts, each held against the reference model.

python -m tests.soak.run --minutes 60 --seed 7                 as long, as this seed has it
python -m tests.soak.run --seed 7 --steps 40                   its first 40 steps
python -m tests.soak.run --seed 7 --only 3,7,12                only these of them
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice

from tests.netns.standing import StandingCluster
from tests.soak.actions import Actions, Wrong
from tests.soak.checks import Checks
from tests.soak.lab import MIGRATION, NETWORKS, SoakLab
from tests.soak.leaks import Leaks
from tests.soak.operator import look
from tests.soak.plan import Step, steps
from tests.soak.reference import Model

KEPT = 30  # steps that a failure shows
LEAKS_EVERY = 10
OPERATOR_EVERY = 12


class Soak:
    """One run. `say` gets a line a step."""

    def __init__(self, lab: SoakLab, seed: int) -> None:
        self.lab, self.seed = lab, seed
        self.model = Model()
        self.actions, self.checks = Actions(lab, self.model), Checks(lab, self.model)
        self.leaks = Leaks(lab, self.model)
        self.done: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.past: deque[str] = deque(maxlen=KEPT)

    def begin(self) -> None:
        self.lab.build(self.model.config)
        self.checks.start_flows()
        self._look()

    def step(self, step: Step) -> None:
        """Do it, wait until all is quiet, and compare. Raises Wrong, or what broke."""
        self.past.append(str(step))
        self.lab.mark_logs()
        began = time.monotonic()
        self.model.begin(step)
        lanes = self.actions.begin(step)
        try:
            while self.model.plain and len(self.model.versions) == 1 and not all(lane.done() for lane in lanes):
                self.checks.tries(step.tries)  # whatever moves, newcomers must not notice
        finally:
            self.actions.finish(lanes)
        self._look()
        self.done[step.what] += 1
        self.outcomes.update(told.rpartition(" ")[2] for told in self.actions.told if "→" in told)
        self.past[-1] += f" [{', '.join(self.actions.told)}]"
        say(f"{step.number:4} {time.monotonic() - began:5.1f} s  {step.what}: {', '.join(self.actions.told)}")

    def _look(self) -> None:
        self.checks.quiet()
        self.checks.rules()
        self.checks.connections()
        self.checks.tries(self.model.step.tries)
        self.checks.flows()
        self.checks.counters()
        if self.model.step.number and self.model.step.number % OPERATOR_EVERY == 0:
            look(self.lab, self.model, self.checks)
        grown = self.leaks.look() + self.leaks.left()
        complaints = self.lab.complaints() if self.model.plain else []
        if grown or complaints:
            raise Wrong("\n".join([*grown, *complaints]))

    def report(self) -> str:
        """What was done, in numbers."""
        lines = [f"seed {self.seed}: {self.done.total()} steps, no difference from the model"]
        lines += [f"  {count:5} {what}" for what, count in sorted(self.done.items())]
        lines += [f"  moves: {', '.join(f'{count} {word}' for word, count in self.outcomes.most_common())}"]
        lines += [f"  {', '.join(f'{count:,} {what}' for what, count in self.checks.totals.items())}"]
        return "\n".join([*lines, f"  {self.leaks.told()}"])

    def failure(self, error: BaseException) -> str:
        """All that is needed to repeat and to understand it."""
        last = self.past[-1].partition(":")[0].removeprefix("step ") if self.past else "0"
        return "\n".join(
            [
                *self.lab.tails(),
                *self.past,
                f"{type(error).__name__}: {error}",
                f"seed {self.seed}, step {last}; again: make soak SEED={self.seed} STEPS={last}"
                f" (fewer: ONLY={last}, or ONLY=N,M,{last})",
            ]
        )


def run(seed: int, plan: Iterator[Step], minutes: float | None) -> str:
    """A cluster, the steps, and nothing left over; the report. Raises AssertionError that has all of the failure."""
    end = time.monotonic() + minutes * 60 if minutes else float("inf")
    with StandingCluster(networks=NETWORKS, migration_options=MIGRATION) as cluster:
        soak = Soak(SoakLab(cluster), seed)
        try:
            soak.begin()
            for step in plan:
                if time.monotonic() > end:
                    break
                soak.step(step)
                if step.number % LEAKS_EVERY == 0:
                    say(f"      {soak.leaks.told()}")
            soak.lab.mark_logs()
            soak.lab.leave_nothing()
        except Exception as error:
            raise AssertionError(soak.failure(error)) from error
        return soak.report()


def chosen(seed: int, count: int | None, only: str) -> Iterator[Step]:
    """The steps of a seed that are wanted."""
    if only:
        numbers = sorted({int(number) for number in only.split(",")})
        return (step for step in islice(steps(seed), numbers[-1]) if step.number in numbers)
    return islice(steps(seed), count)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", default="")
    parser.add_argument("--show", action="store_true", help="only print the plan")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    plan = chosen(seed, options.steps, options.only)
    say(f"seed {seed}")
    if options.show:
        for step in plan:
            say(str(step))
        return 0
    minutes = options.minutes if options.minutes or options.steps or options.only else 60.0
    try:
        say(run(seed, plan, minutes))
    except AssertionError as failure:
        say(str(failure))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
