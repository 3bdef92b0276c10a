"""`migrator host drain`: move all VMs away from a host, some at a time.

The loop is here and not in the coordinator: each migration is the coordinator's and outlives this command, and what is
left of a drain is nothing but the VMs that are still on the host. So a drain that was interrupted is run again.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import click
from rich.live import Live
from rich.table import Table

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Command, Context, complete, pass_context
from migrator.cli.migrate import move_options, request
from migrator.cli.report import IN_DOUBT, memory_now, numbers
from migrator.errors import OUTCOMES, ObjectNotFound, PeerLost, PreflightFailed, exit_code
from migrator.table import cell, plain, print_json, print_table

COLUMNS = ("VM", "NAME", "PORTS", "TO", "STATE", "PROGRESS", "REASON")
REFUSED = "refused"
_MILD = tuple(OUTCOMES[name] for name in ("complete", "degraded", "refused", "aborted"))


@dataclass
class Move:
    """One VM of the host. `report` is the last one heard, `error` why there is none, `refused` who said no before."""

    vm: str
    name: str
    ports: int
    to: str = ""
    report: pb.Migration = field(default_factory=pb.Migration)
    error: Error | None = None
    refused: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        if self.error is not None:
            return "failed"
        return self.report.outcome or self.report.phase or "waits"

    @property
    def reason(self) -> str:
        return "; ".join([*self.refused, str(self.error) if self.error is not None else self.report.reason]).strip("; ")

    @property
    def code(self) -> int:
        """As of a single migration."""
        if self.error is not None:
            return exit_code(self.error)
        return OUTCOMES.get(self.report.outcome or self.report.phase, exit_code(PeerLost("")))


class Plan:
    """Which VM goes where: to the host with the fewest ports, counting those on their way there."""

    def __init__(self, host: str, config: pb.Config, hosts: Iterable[pb.Host], to: Sequence[str] = ()) -> None:
        """Raises ObjectNotFound, PreflightFailed when there is no host to go to."""
        known = {one.name: one for one in hosts}
        for name in (host, *to):
            if name not in known:
                raise ObjectNotFound(f"no host {name!r}", hint="`migrator host list` shows all")
        wanted = set(to or known) - {host}
        self._load = Counter({name: known[name].ports for name in sorted(wanted) if known[name].connected})
        if not self._load:
            raise PreflightFailed(f"{host} cannot be drained", reasons=["no other host is connected that it may use"])
        self.moves = [
            Move(vm, next((port.name for port in ports if port.name), ""), len(ports))
            for vm, ports in _by_vm(config, host).items()
        ]
        self._guard = threading.Lock()

    def choose(self, move: Move, tried: Iterable[str] = ()) -> str:
        """The next host for a VM, "" when all have been tried."""
        with self._guard:
            left = [name for name in self._load if name not in set(tried)]
            move.to = min(left, key=lambda name: (self._load[name], name), default="")
            if move.to:
                self._load[move.to] += move.ports
            return move.to

    def failed(self, move: Move) -> None:
        """It did not go there."""
        with self._guard:
            self._load[move.to] -= move.ports


def _by_vm(config: pb.Config, host: str) -> dict[str, list[pb.Port]]:
    found: dict[str, list[pb.Port]] = {}
    for port in config.ports:
        if port.host == host:
            found.setdefault(port.vm, []).append(port)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


class Drain:
    """Carries out a plan, `at_once` VMs at a time."""

    def __init__(self, stub: Any, plan: Plan, order: Callable[[str, str], pb.MigrateRequest], at_once: int) -> None:
        self._stub, self._plan, self._order = stub, plan, order
        self._waiting = iter(list(plan.moves))
        self._guard = threading.Lock()
        self.news = threading.Condition()
        # They end with the process: what waits for a migration holds up nobody who does not want to wait any more.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(at_once)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (move := self._next()) is not None:
            self._move(move)
            self._tell()

    def _next(self) -> Move | None:
        with self._guard:
            return next(self._waiting, None)

    def _move(self, move: Move) -> None:
        """To the first host that does not refuse it: a refusal has changed nothing."""
        tried: list[str] = []
        while self._plan.choose(move, tried):
            tried.append(move.to)
            if not self._tried(move):
                return
            self._plan.failed(move)
            reason = str(move.error) if move.error is not None else move.report.reason
            move.refused.append(f"{move.to}: {reason}")
        move.report, move.error = pb.Migration(outcome=REFUSED), None

    def _tried(self, move: Move) -> bool:
        """Order it and wait for its end; was it refused?"""
        move.report, move.error = pb.Migration(), None
        try:
            for report in self._stub.Migrate(self._order(move.vm, move.to), timeout=None):
                move.report = report
                self._tell()
                if report.phase == IN_DOUBT:
                    break
        except Error as error:
            move.error = error
        return isinstance(move.error, PreflightFailed) or move.report.outcome == REFUSED

    def _tell(self) -> None:
        with self.news:
            self.news.notify_all()


@click.command(cls=Command)
@click.argument("name", metavar="HOST", shell_complete=complete("host"))
@click.option("--to", "to", multiple=True, metavar="HOST", shell_complete=complete("host"), help="Only there; repeat.")
@click.option("--at-once", type=click.IntRange(1), default=2, show_default=True, metavar="N", help="So many VMs.")
@click.option("--except", "left", multiple=True, metavar="VM", shell_complete=complete("vm"), help="Stays; repeat.")
@click.option("--dry-run", is_flag=True, help="Only say what would go where.")
@move_options
@pass_context
def drain(
    context: Context,
    /,
    name: str,
    to: tuple[str, ...],
    at_once: int,
    left: tuple[str, ...],
    dry_run: bool,
    **options: Any,
) -> int:
    """Move all VMs that have ports on HOST to other hosts, each to the one with the fewest ports.

    When one does not go, the others do. The exit code is that of the one that went worst.
    """
    stub = context.coordinator
    plan = Plan(name, stub.Show(pb.Empty()), stub.Hosts(pb.Empty()).hosts, to)
    plan.moves = [move for move in plan.moves if not {move.vm, move.name} & set(left)]
    if dry_run:
        for move in plan.moves:
            plan.choose(move)
        _show(context, plan.moves)
        return 0
    work = Drain(stub, plan, lambda vm, there: request(vm, there, options), at_once)
    try:
        work.start()
        _watch(work, plan.moves, silent=context.json)
    except KeyboardInterrupt:
        click.echo("migrator: moves that have begun go on: `migrator migration list --running`", err=True)
        raise
    _show(context, plan.moves)
    return worst(move.code for move in plan.moves)


def worst(codes: Iterable[int]) -> int:
    """Errors go before outcomes, and of these the one that left the VM least where it should be."""
    return max(codes, key=lambda code: _MILD.index(code) if code in _MILD else len(_MILD), default=0)


def _watch(work: Drain, moves: Sequence[Move], *, silent: bool) -> None:
    """Until all have been tried: a table that changes in place, or a line for each that ends."""
    live = Live(refresh_per_second=4, transient=True) if sys.stdout.isatty() and not silent else None
    told: set[str] = set()
    with live or nullcontext():
        while True:
            running = work.running
            if live is not None:
                live.update(_table(moves))
            for move in moves if live is None and not silent else ():
                if move.vm not in told and move.report.done:
                    told.add(move.vm)
                    click.echo(f"{move.name or move.vm}: {move.state} at {move.report.destination}")
            if not running:
                return
            with work.news:
                work.news.wait(0.2)


def _table(moves: Sequence[Move]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in COLUMNS:
        table.add_column(title)
    for move in moves:
        table.add_row(*(cell(value) for value in _row(move)))
    return table


def _row(move: Move) -> tuple[object, ...]:
    going = move.report.phase and not move.report.outcome
    progress = (memory_now(move.report) or numbers(move.report)) if going else ""
    return move.vm, move.name, move.ports, move.to, move.state, progress, move.reason


def _show(context: Context, moves: Sequence[Move]) -> None:
    if not context.json:
        print_table(COLUMNS, [_row(move) for move in moves])
        return
    words = ("vm", "name", "ports", "to", "state", "reason", "code")
    print_json([{word: getattr(move, word) for word in words} | {"report": plain(move.report)} for move in moves])
