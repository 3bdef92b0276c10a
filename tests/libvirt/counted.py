# SPDX-License-Identifier: GPL-2.0-only
"""Traffic whose losses are told move by move, and the course of one move as all who took part in it saw it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from migrator.lab.processes import wait_until

from .hooked import WAYS, Traffic
from .lab import Events, GuestMachine, LibvirtCluster

BEHIND = 10
"""Later datagrams that have to come before one that has not is lost: what was held goes before what came after it."""


class CountedTraffic(Traffic):
    """`Traffic` of which one may ask between two moves what was lost."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._known = {way: (self._before[way], 0) for way, _, _ in WAYS}
        self.silence()

    def lost(self) -> dict[str, tuple[int, int]]:
        """How many datagrams were lost and doubled each way since it was asked last, of those sent until now."""
        found = {}
        for way, flow, at in WAYS:
            sent = int(self.probes[way].call("sending", flow=flow)["sent"])
            wait_until(f"later ones of {way} came", partial(self._reached, at, flow, sent + BEHIND))
            report = self._report(at, flow, below=sent)
            now, (lost, doubled) = (report["missing_count"], report["doubled"]), self._known[way]
            found[way], self._known[way] = (now[0] - lost, now[1] - doubled), now
        return found

    def silence(self) -> dict[str, float]:
        """The longest time since it was asked last in which the peer heard nothing of the guest, `ms`, and when it
        `ended` (CLOCK_REALTIME). The guest cannot tell: its clock stands while it does."""
        found: dict[str, float] = self.probes["to"].call("silence", flow=1)
        return found


@dataclass(frozen=True)
class Moment:
    """`ms` since the client's call."""

    ms: float
    host: str
    what: str

    def __str__(self) -> str:
        return f"{self.ms:9.1f}  {self.host:5} {self.what}"


def course(cluster: LibvirtCluster, guest: GuestMachine, events: Events, began: float, heard: float) -> list[Moment]:
    """One move in order: what the agents' logs, QEMU and the peer say. `began`: time.time() of the client's call;
    `heard`: when the peer heard the guest again."""
    found = [Moment((heard - began) * 1e3, "peer", "the guest's first datagram")]
    for event in events.seen:
        if event.kind == "qemu" and event.name in {"STOP", "RESUME"}:
            found.append(Moment((event.at - began) * 1e3, event.host, f"QEMU's {event.name}"))
    for host in cluster.machine_names:
        for line in _lines(cluster, host):
            at = datetime.fromisoformat(line["timestamp"]).timestamp()
            what = _word(line, guest)
            if what and at >= began:
                found.append(Moment((at - began) * 1e3, host, what))
    return sorted((moment for moment in found if moment.ms >= 0), key=lambda moment: moment.ms)


def _lines(cluster: LibvirtCluster, host: str) -> Iterator[dict[str, Any]]:
    for text in cluster.agents[host].log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(text)


def _word(line: dict[str, Any], guest: GuestMachine) -> str:
    """What a line of an agent's log says of the guest's move, "" for nothing."""
    of_hook = line.get("event") == "hook" and line.get("domain") == guest.name
    if of_hook:
        return f"hook {line['operation']} answered after {line['ms']} ms"
    if line.get("vm") != guest.uuid:
        return ""
    if line.get("event") == "phase":
        return f"{line['role']}: {line['phase']}"
    return f"event {line['what']} ({line['reason']})" if line.get("event") == "guest" else ""
