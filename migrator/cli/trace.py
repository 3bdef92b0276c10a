"""`migrator trace`: every frame of a port with what became of it, live."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Command, Context, pass_context
from migrator.cli.local import here
from migrator.errors import ObjectNotFound
from migrator.packet import describe
from migrator.table import plain, print_json


@click.command(cls=Command)
@click.argument("word", metavar="VM|MAC|VM/MAC")
@click.option("--count", type=click.IntRange(1), help="End after so many frames.")
@click.option("--dropped", is_flag=True, help="Only frames that were dropped.")
@pass_context
def trace(context: Context, word: str, count: int | None, dropped: bool) -> None:
    """Print each frame of a port (or of all of a VM's) on this host, with its verdict and the reason."""
    vm, mac = _target(context, word.lower())
    events = context.agent.Trace(pb.TraceRequest(vm=vm, mac=mac), timeout=None)
    since_boot = time.time() - time.monotonic()  # the switch gives times of CLOCK_MONOTONIC
    for number, event in enumerate((e for e in events if not dropped or e.verdict == "drop"), 1):
        event.time += since_boot
        if context.json:
            print_json(plain(event), lines=True)
        else:
            click.echo(line(event))
        if number == count:
            return


def line(event: pb.TraceEvent) -> str:
    """Time, direction, verdict with rule or reason, then the frame."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time)) + f".{int(event.time % 1 * 1e6):06d}"
    why = event.reason or (f"rule {event.rule}" if event.rule else "")
    verdict = f"{event.verdict} ({why})" if why else event.verdict
    return f"{clock} {event.mac} {event.direction:<4} {verdict}: {describe(event.frame)}, {event.length} bytes"


def _target(context: Context, word: str) -> tuple[str, str]:
    """VM and MAC ("" for all) of what is on this host. VMs' names are asked of the coordinator."""
    instances = [status.instance for status in here(context)]
    uuids = {i.vm for i in instances}
    vm = word if word in uuids else next((vm for vm in _named(context, word) if vm in uuids), "")
    if vm:
        return vm, ""
    for instance in instances:
        if word in (instance.mac, f"{instance.vm}/{instance.mac}"):
            return instance.vm, instance.mac
    raise ObjectNotFound(f"no VM or port {word!r} on this host", hint="`migrator port list` says where each is")


def _named(context: Context, word: str) -> Iterator[str]:
    try:
        ports = context.coordinator.Show(pb.Empty(), timeout=2.0).ports
    except Error:
        return
    yield from (port.vm for port in ports if port.name.lower() == word)
