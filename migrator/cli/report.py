"""The report of a migration, in words: memory, downtime and whose it was, state, frames."""

from __future__ import annotations

from collections.abc import Iterable

import click

from migrator._pb import migrator_pb2 as pb
from migrator.table import print_fields, print_table, size

IN_DOUBT = "in-doubt"
CONNECTIONS = "conntrack"


def numbers(report: pb.Migration) -> str:
    """How much network state was sent."""
    rate = f", {report.rate:,.0f}/s" if report.rate else ""
    return f"round {report.rounds}, {report.entries:,} entries, {size(report.bytes)}{rate}"


def memory_now(report: pb.Migration) -> str:
    """How far the guest's memory is; "" when its hypervisor does not say."""
    memory = report.memory
    if not memory.get("total"):
        return ""
    done = max(0.0, 1 - memory.get("remaining", 0.0) / memory["total"])
    rate = f", {size(memory['bps'])}/s" if memory.get("bps") else ""
    return f"memory {done:.0%} of {size(memory['total'])}, pass {memory.get('passes', 0):.0f}{rate}"


def memory_moved(report: pb.Migration) -> str:
    """What it took to move the guest's memory; "" when its hypervisor does not say."""
    memory = report.memory
    if "transferred" not in memory:
        return ""
    passes = int(memory.get("passes", 0))
    took = f", {memory['elapsed_ms'] / 1e3:.1f} s" if "elapsed_ms" in memory else ""
    total = f" of {size(memory['total'])}" if "total" in memory else ""
    return f"{size(memory['transferred'])} sent{total} in {passes} pass{'es' if passes != 1 else ''}{took}"


def downtime(report: pb.Migration) -> str:
    """How long the guest stood still, and which part of it was waiting for its network state."""
    times = report.times_ms
    spans = [
        (times, "committed", "from its stop until its state was at the destination"),
        (times, "open", "from its start until its ports were open"),
    ]
    ours = [f"{found[name]:.1f} ms {words}" for found, name, words in spans if name in found]
    if "downtime_ms" in report.memory:
        whole = [f"{report.memory['downtime_ms']:.0f} ms, as the hypervisor says"]
    else:
        whole = [f"{times['downtime']:.1f} ms until the source knew it open"] if "downtime" in times else []
    return "; ".join([*whole, *ours])


def connections(report: pb.Migration) -> str:
    """How many connections are at the destination, and how many are not."""
    if CONNECTIONS not in report.moved and not report.not_moved:
        return ""
    left = sum(count for what, count in report.not_moved.items() if what.partition(":")[0] == CONNECTIONS)
    return f"{report.moved.get(CONNECTIONS, 0):,} moved, {left:,} not moved"


def frames(report: pb.Migration) -> str:
    """What became of frames for the guest."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(report.frames.items()))


def print_report(report: pb.Migration) -> None:
    """The whole report for people."""
    stopped_by = "agent" if report.leading else "guest or hypervisor"
    print_fields(
        {
            "migration": report.id,
            "vm": report.vm,
            "from": report.source,
            "to": report.destination,
            "phase": report.phase,
            "outcome": report.outcome,
            "reason": report.reason,
            "epoch": report.epoch,
            "state": numbers(report),
            "memory": memory_moved(report) if report.outcome else memory_now(report),
            "downtime": downtime(report) if report.outcome in {"complete", "degraded"} else "",
            "stopped by": stopped_by if report.outcome in {"complete", "degraded"} else "",
            "connections": connections(report),
            "frames": frames(report),
        }
    )
    for title, values in (
        ("MOVED", {kind: f"{count:,}" for kind, count in sorted(report.moved.items())}),
        ("NOT MOVED", {what: f"{count:,}" for what, count in sorted(report.not_moved.items())}),
        ("TIME", {name: f"{ms:,.2f} ms" for name, ms in report.times_ms.items()}),
    ):
        if values:
            click.echo()
            print_table((title, ""), values.items())
    for warning in report.warnings:
        click.echo(f"migrator: warning: {warning}", err=True)
    hint_at_doubt([report])


def hint_at_doubt(reports: Iterable[pb.Migration]) -> None:
    """Say what can be done about each migration that waits for a word of where its guest is."""
    for report in reports:
        if report.phase == IN_DOUBT:
            hosts = f"{report.source}|{report.destination}"
            resolve = f"migrator migration resolve {report.id} --guest-at {hosts}"
            click.echo(f"migrator: hint: look where VM {report.vm} runs, then `{resolve}`", err=True)
