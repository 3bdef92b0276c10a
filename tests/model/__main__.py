"""`python -m tests.model`: searches the budgets and prints what is in docs/reliability.md, a row as it is done.

`--small`: only those of `make test`. `--mutations`: only the rules that are taken away. `--budget NAME`: only this one.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.model.budgets import FULL, SMALL
from tests.model.explore import CounterExample, explore
from tests.model.model import Model
from tests.model.mutations import MUTATIONS
from tests.model.world import Budget


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--mutations", action="store_true")
    parser.add_argument("--budget", choices=[str(budget) for budget in (*SMALL, *FULL)], metavar="NAME")
    given = parser.parse_args()
    if given.budget:
        return 1 if _search(tuple(one for one in (*SMALL, *FULL) if str(one) == given.budget)) else 0
    wrong = 0 if given.mutations else _search((*SMALL, *(() if given.small else FULL)))
    return 1 if wrong + _mutate() else 0


def _search(budgets: tuple[Budget, ...]) -> int:
    print("| budget | states | transitions | ends | CPU s |\n|---|---:|---:|---:|---:|", flush=True)
    wrong = 0
    for budget in budgets:
        began = time.process_time()
        try:
            found = explore(Model(budget))
        except CounterExample as example:
            wrong += 1
            print(f"{budget}: {example}", file=sys.stderr, flush=True)
            continue
        took = time.process_time() - began
        print(f"| `{budget}` | {found.states:,} | {found.transitions:,} | {found.ends} | {took:.0f} |", flush=True)
    return wrong


def _mutate() -> int:
    print("\n| rule | what is gone | budget | states | steps | found |\n|---|---|---|---:|---:|---|", flush=True)
    wrong = 0
    for mutation in MUTATIONS:
        try:
            explore(mutation.model())
        except CounterExample as example:
            cells = f"{example.states:,} | {len(example.way)} | {example.why}"
            name = mutation.rule if " " in mutation.rule else f"`{mutation.rule}`"
            print(f"| {name} | {mutation.without} | `{mutation.budget}` | {cells} |", flush=True)
        else:
            wrong += 1
            print(f"{mutation.rule}: nothing found", file=sys.stderr, flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
