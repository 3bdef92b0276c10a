# SPDX-License-Identifier: GPL-2.0-only
"""Moves between agents of different versions: the first release, and one that does not exist yet."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datapath.registry import KINDS
from datapath.state.kind import Table
from migrator._pb import migrator_pb2 as pb
from migrator.agent.copying import Batch, Copier
from migrator.errors import PreflightFailed
from migrator.protocol import MAJOR, MINOR, common, known, spoken, text
from migrator.snapshot import encode_table
from tests.fixtures.make_golden import UNKNOWN

from .pair import MACS, VM, World, eventually, world
from .versions import Change, following, previous, speak

COUNT = 500
LATER = dataclasses.replace(UNKNOWN, name="x-later")


async def move(directory: Path, **options: Any) -> tuple[pb.Migration, bool]:
    """The report of a move from a to b, and whether b has all connections."""
    async with world(directory, "a", "b") as cluster:
        cluster.fill("a", COUNT)
        before = cluster.connections("a")
        report = await cluster.finish(await cluster.migrate("b", **options))
        whole = before == cluster.connections("b")
        await cluster.quiet()
        return report, whole


@pytest.mark.parametrize("change", [previous, following])
@pytest.mark.parametrize("host", ["a", "b"])
def test_a_vm_moves_between_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, host: str
) -> None:
    changed = speak(monkeypatch, host, change)
    report, whole = asyncio.run(move(tmp_path))
    assert (report.outcome, whole, dict(report.not_moved)) == ("complete", True, {})
    assert "Hello" in changed, "the other version said nothing else than this one"


@pytest.mark.parametrize("host", ["a", "b"])
def test_what_both_speak_is_agreed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """An order names the lower of both protocols."""
    agreed: list[str] = []

    def listening(message: Any) -> Any:
        for order in ("prepare", "start"):
            if isinstance(message, pb.ToAgent) and message.HasField(order):
                agreed.append(text(getattr(message, order).protocol))
        return previous(message) if isinstance(message, pb.Hello) else message

    speak(monkeypatch, host, listening)
    report, _ = asyncio.run(move(tmp_path))
    assert report.outcome == "complete" and agreed == ["1.0"]


def carrying(monkeypatch: pytest.MonkeyPatch, *, optional: bool) -> None:
    """The source has a kind of state that nobody else knows."""
    chunk = Copier.chunk

    def chunk_so(copier: Copier) -> Batch:
        if copier.records:
            return chunk(copier)
        batch, table = Batch(), Table("x-later", columns={"vid": np.arange(5, dtype="<u2")})
        for section in encode_table(table, MACS[0], copier.round, kinds={**KINDS, "x-later": LATER}):
            copier._tally.add(section)
            batch.sections.append(section)
        copier._tally.records += len(table)
        copier.records += len(table)
        return batch

    def more(message: Any) -> Any:
        if isinstance(message, pb.FromAgent) and message.reply.HasField("need"):
            made = pb.FromAgent()
            made.CopyFrom(message)
            made.reply.need.kinds["x-later"] = 1
            made.reply.need.optional.extend(["x-later"] if optional else [])
            return made
        return message

    monkeypatch.setattr(Copier, "chunk", chunk_so)
    speak(monkeypatch, "a", more)


def test_an_optional_kind_that_nobody_knows_is_skipped_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrying(monkeypatch, optional=True)
    report, whole = asyncio.run(move(tmp_path))
    assert whole and report.outcome in {"complete", "degraded"}
    assert dict(report.not_moved) == {"x-later: not known here": 5}


def test_a_required_kind_that_nobody_knows_is_refused_before_the_vm_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrying(monkeypatch, optional=False)
    report, whole = asyncio.run(move(tmp_path))
    assert report.outcome == "refused" and not whole
    assert "x-later" in report.reason


def test_a_newer_version_of_a_kind_is_refused_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(message: Any) -> Any:
        if isinstance(message, pb.FromAgent) and message.reply.HasField("need"):
            message.reply.need.kinds["conntrack"] += 1
        return message

    speak(monkeypatch, "a", newer)
    report, _ = asyncio.run(move(tmp_path))
    assert report.outcome == "refused" and "conntrack" in report.reason


NARROW = pb.Rule(direction="to", priority=1, protocol="any", action="allow", label="0x1/0x1")


@pytest.mark.parametrize(
    ("kinds", "rules", "reason"),
    [
        ({"window": "{}"}, [], "kind window version 1: not held here"),
        ({}, [NARROW], "kind acl version 2: only 1 is known"),
        ({}, [], ""),
    ],
    ids=["window", "labels", "neither"],
)
def test_a_destination_of_before_refuses_labels_and_windows_by_name(
    tmp_path: Path, kinds: dict[str, str], rules: list[pb.Rule], reason: str
) -> None:
    """Only a VM that uses them; it stays, and says why."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            known: Any = {name: 1 for name in w.driver("b").kinds() if name != "window"}
            w.driver("b").kinds = lambda: known  # type: ignore[method-assign]
            w.fill("a", COUNT)
            ports = [pb.Port(kinds=kinds) for _ in MACS]
            for port, there in zip(ports, w.cluster.store.catalog.ports_of(VM), strict=True):
                port.MergeFrom(there)
            policies = [pb.Policy(name="web", rules=rules)] if rules else []
            w.cluster.apply(pb.ApplyRequest(config=pb.Config(ports=ports, policies=policies)))
            await eventually(lambda: has(w, "acl" if rules else "window") or not (kinds or rules))
            before = w.connections("a")
            report = await w.finish(await w.migrate("b"))
            assert report.outcome == ("refused" if reason else "complete")
            assert report.reason == (f"b: host b cannot take the VM (nothing has changed); {reason}" if reason else "")
            assert w.connections("a" if reason else "b") == before
            await w.quiet()

    asyncio.run(scenario())


def has(w: World, kind: str) -> bool:
    """All ports of the source have what was declared."""
    tables = [w.driver("a").dump(ref, kind) for ref in w.active("a")]
    records = [[record for one in table for record in one.records or ()] for table in tables]
    return all(any("label" in record or "check" in record for record in found) for found in records)


@pytest.mark.parametrize("host", ["a", "b"])
def test_another_major_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    def foreign(message: Any) -> Any:
        if isinstance(message, pb.Hello):
            message.protocol.major = MAJOR + 1
        return message

    speak(monkeypatch, host, foreign)
    with pytest.raises(PreflightFailed, match=rf"{host} speaks protocol {MAJOR + 1}\.{MINOR}"):
        asyncio.run(move(tmp_path))


def test_an_agent_refuses_a_protocol_that_it_does_not_speak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its coordinator thinks otherwise."""

    def ordered(message: Any) -> Any:
        if isinstance(message, pb.ToAgent) and message.HasField("prepare"):
            message.prepare.protocol.major = MAJOR + 1
        return message

    speak(monkeypatch, "b", ordered)
    report, _ = asyncio.run(move(tmp_path))
    assert report.outcome == "refused" and f"protocol {MAJOR + 1}" in report.reason


def test_what_two_programs_have_in_common() -> None:
    old, new, other = pb.Protocol(), pb.Protocol(major=MAJOR, minor=99), pb.Protocol(major=MAJOR + 1)
    assert common(old, spoken()) == known(old) == pb.Protocol(major=1, minor=0)
    assert common(spoken(), new) == common(new, spoken()) == spoken()
    assert common(other, spoken()) is None
