"""`migrator watch`: what there is, then every change as it happens, printed or given to a command."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any

import click

from datapath.registry import KINDS
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Command, Context, complete, pass_context
from migrator.cli.objects import SORTS, objects
from migrator.cli.reacting import Reaction, Told, command
from migrator.watching.match import fields, filters, parse, shown
from migrator.watching.view import OPS, Change
from migrator.watching.wire import to_messages

ALL = "all"
LOST = "lost"


def _complete_match(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    kinds = [kind for kind in ctx.params.get("kinds") or () if kind in KINDS]
    return [f"{name}=" for name in fields(kinds or list(KINDS)) if name.startswith(incomplete)]


@click.command(cls=Command)
@click.option(
    "--from", "from_revision", type=click.IntRange(0), default=0, metavar="REVISION", help="Changes after it."
)
@click.option("--sort", "sorts", multiple=True, type=click.Choice(SORTS), help="Only this sort; several times: these.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice([*KINDS, ALL]), help="State of this kind, where the VMs are."
)
@click.option("--vm", default="", metavar="VM", help="Only of this VM.", shell_complete=complete("vm"))
@click.option("--mac", default="", metavar="MAC", help="Only of this port. With --kind.")
@click.option("--name", default="", metavar="NAME", help="Only objects of this name; * and ? stand for others.")
@click.option(
    "--match",
    "matches",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Only records of which this holds, or FIELD!=VALUE; several times: all. With --kind.",
    shell_complete=_complete_match,
)
@click.option("--op", "ops", multiple=True, type=click.Choice(OPS), help="Only such changes; several times: these.")
@click.option("--added", is_flag=True, help="--op added.")
@click.option("--removed", is_flag=True, help="--op removed.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, help="Seconds between two looks at a host.")
@click.option("--here", is_flag=True, help="This host's agent alone, without the coordinator. With --kind.")
@click.option("--count", type=click.IntRange(1), help="End after so many changes.")
@click.option("--snapshot", is_flag=True, help="End with the snapshot.")
@click.option("--exec", "text", default="", metavar="COMMAND", help="Run it for each change, without a shell.")
@click.option("--shell", is_flag=True, help="Run it by /bin/sh.")
@click.option("--jobs", type=click.IntRange(1, 1000), default=1, help="Commands side by side; 1 keeps the order.")
@click.option("--on-failure", type=click.Choice(["stop", "go-on"]), default="go-on", help="When a command fails.")
@click.option("--initial", is_flag=True, help="Run it for what there is at the beginning, too.")
@pass_context
def watch(context: Context, /, **options: Any) -> None:
    """Print what there is, then every change; with --from only changes after that revision. JSON: one object a line.

    With --kind the state of VMs, which is followed from host to host; else what the coordinator has.
    """
    _check(options)
    wanted = {*options["ops"], *(op for op in ("added", "removed") if options[op])}
    react = _reaction(options)
    tell = react.run if react else _printer(context)
    skip_snapshot = bool(wanted) or (react is not None and not options["initial"])
    number = 0
    try:
        for told in _source(context, options):
            if told.end and options["snapshot"]:
                if react is None:
                    tell(told)
                return
            if (told.end and react) or (told.snapshot and skip_snapshot) or (wanted and told.op not in wanted):
                continue
            tell(told)
            number += 1
            if number == options["count"]:
                return
    finally:
        if react:
            react.finish()


def _check(options: dict[str, Any]) -> None:
    """Raises UsageError for options that do not go together."""
    state = [f"--{name}" for name in ("mac", "here") if options[name]] + (["--match"] if options["matches"] else [])
    state += [f"--op {op}" for op in options["ops"] if op in ("arrived", "left", LOST)]
    other = [f"--{name}" for name in ("name",) if options[name]] + (["--sort"] if options["sorts"] else [])
    other += ["--from"] if options["from_revision"] else []
    if options["kinds"] and other:
        raise click.UsageError(f"{other[0]} is of what the coordinator has, --kind of what is where the VMs are")
    if not options["kinds"] and state:
        raise click.UsageError(f"{state[0]} needs --kind")
    if options["from_revision"] and (options["added"] or {"added", "changed"} & set(options["ops"])):
        raise click.UsageError("what is new and what was there before is known from the snapshot only: without --from")
    if not options["text"] and (options["shell"] or options["initial"] or options["jobs"] > 1):
        raise click.UsageError("--shell, --jobs and --initial are of a command: --exec")


def _reaction(options: dict[str, Any]) -> Reaction | None:
    if not options["text"]:
        return None
    words = command(options["text"], shell=options["shell"])
    return Reaction(words, jobs=options["jobs"], stop=options["on_failure"] == "stop", warn=_warn)


def _warn(text: str) -> None:
    click.echo(f"migrator: warning: {' '.join(text.split())}", err=True)


def _printer(context: Context) -> Callable[[Told], None]:
    def show(told: Told) -> None:
        sys.stdout.write((json.dumps(told.body, ensure_ascii=False) if context.json else told.line) + "\n")
        if told.end or not told.snapshot:  # a snapshot of many goes out in few writes
            sys.stdout.flush()

    return show


def _source(context: Context, options: dict[str, Any]) -> Iterator[Told]:
    if not options["kinds"]:
        request = pb.WatchRequest(from_revision=options["from_revision"], sorts=options["sorts"])
        return objects(context, request, vm=options["vm"], name=options["name"])
    return _state(context, options)


# ---- state of VMs ----


def _state(context: Context, options: dict[str, Any]) -> Iterator[Told]:
    from migrator.cli.following import Wanted, follow

    kinds = [] if ALL in options["kinds"] else list(dict.fromkeys(options["kinds"]))
    matches = [parse(text) for text in options["matches"]]
    filters(kinds or list(KINDS), matches)
    mac = options["mac"].lower()
    request = pb.StateRequest(
        kinds=kinds,
        macs=[mac] if mac else [],
        matches=to_messages(matches),
        interval_s=options["interval"],
    )
    if options["here"] and options["vm"]:
        request.vms.append(options["vm"].lower())
    ways = context.ways(here=options["here"])
    for change, name in follow(Wanted(request, options["vm"], mac), ways, _warn):
        told = _told(change, name)
        if change.op in ("arrived", "left") and kinds and change.kind not in kinds:
            continue
        yield told


def _told(change: Change, name: str) -> Told:
    head: dict[str, Any] = {"op": change.op, "kind": change.kind, "vm": change.vm, "name": name, "mac": change.mac}
    head |= {"host": change.host, "epoch": change.epoch, "time": change.time or time.time()}
    parts = {"": head, "RECORD_": change.record, "WAS_": change.was}
    body = {**head, "record": change.record, "was": change.was, "snapshot": change.snapshot}
    end = change.op == "current"
    return Told(change.op, change.kind, body, partial(_line, change, name), parts, snapshot=change.snapshot, end=end)


def _line(change: Change, name: str) -> str:
    at = datetime.fromtimestamp(change.time).astimezone().strftime("%H:%M:%S.%f")[:-3] if change.time else "-"
    if change.op == "current":
        return f"{at}\tsnapshot ends"
    if change.op == LOST:
        return f"{at}\tsome changes at {change.host or 'this host'} were missed; what became of them follows"
    whose = f"{name or change.vm} {change.mac}"
    if change.op in ("arrived", "left"):
        where = f" at {change.host or 'this host'}" if change.op == "arrived" else ""
        return f"{at}\t{whose} {'is' if change.snapshot else 'has ' + change.op}{where}"
    what = "is" if change.snapshot else change.op
    was = "".join(f" ({field} was {_short(value)})" for field, value in change.was.items())
    return f"{at}\t{whose} {change.kind} {what}: {_record(change)}{was}"


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _record(change: Change) -> str:
    if {"laddr", "raddr", "state"} <= change.record.keys():
        from migrator.cli.conntrack import line

        return line(change.record)
    return shown(change.record)
