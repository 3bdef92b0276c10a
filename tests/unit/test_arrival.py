# SPDX-License-Identifier: GPL-2.0-only
"""What the destination says of records that its switch did not take."""

from __future__ import annotations

import pytest

from datapath.provider import Loaded, PortRef
from datapath.state.kind import Op, Table
from migrator.agent.loading import Arrival
from migrator.agent.report import Report
from migrator.snapshot import Section

REF = PortRef("8b3c0f3e-6f8c-4d59-9a4c-6d6a6e0f4c11", "02:00:00:00:00:01", 2)


class Refusing:
    """A switch that takes none of what it is given."""

    def kinds(self) -> dict[str, int]:
        return {"conntrack": 1}

    def load(self, _: PortRef, table: Table) -> Loaded:
        return Loaded(0, (("no room", len(table)),))


@pytest.mark.parametrize(
    ("op", "said"),
    [
        pytest.param(Op.LOAD, {"conntrack: no room": 1}, id="state"),
        pytest.param(Op.ACCOUNT, {}, id="accounting of what has ended since"),
    ],
)
def test_what_is_not_moved_is_said(op: Op, said: dict[str, int]) -> None:
    report = Report("m", REF.vm, REF.epoch, "a", "b")
    arrival = Arrival(Refusing(), [REF], report)  # type: ignore[arg-type]
    table = Table("conntrack", op, records=[{}])
    arrival.load(Section("conntrack", 1, op, 0, REF.mac, 1, 100, b"", table))
    assert report.not_moved == said
