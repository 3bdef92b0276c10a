# SPDX-License-Identifier: GPL-2.0-only
"""A copy that begins again, into ports whose guest may already be at work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from datapath.provider import PortRef
from datapath.registry import KINDS
from datapath.state.kind import Nature, Op, Table
from migrator.agent.loading import Arrival
from migrator.agent.report import Report
from migrator.snapshot import decode_section, encode_table
from tests.contract.hosts import Host
from tests.contract.samples import keys_of, normal, sample

COPIED = sorted(name for name, kind in KINDS.items() if kind.nature != Nature.ACCOUNTING and name != "port")
OF_MANY = [name for name in COPIED if len(sample(name, 2)) == 2]


def begin(host: Host, ref: PortRef) -> Arrival:
    return Arrival(host.driver, [ref], Report("m", ref.vm, ref.epoch, "there", "here"))


def bring(arrival: Arrival, ref: PortRef, table: Table) -> None:
    for sealed in encode_table(table, ref.mac):
        arrival.load(decode_section(sealed))


def part(table: Table, first: int, end: int) -> Table:
    if table.columns is not None:
        return replace(table, columns={name: np.copy(array[first:end]) for name, array in table.columns.items()})
    return replace(table, records=list(table.records or ())[first:end])


def there(host: Host, ref: PortRef, kind: str) -> set[tuple[object, ...]]:
    return set(normal(list(host.driver.dump(ref, kind))))


@pytest.mark.parametrize("kind", OF_MANY)
def test_what_the_second_copy_did_not_bring_goes_with_its_end(host: Host, kind: str) -> None:
    if kind not in host.driver.kinds():
        pytest.skip(f"the driver holds no {kind}")
    ref, table = host.stage(), sample(kind, 2)
    arrival = begin(host, ref)
    bring(arrival, ref, table)
    both = there(host, ref, kind)
    arrival.restart()
    bring(arrival, ref, part(table, 1, 2))
    assert there(host, ref, kind) == both  # nothing is missing until then
    arrival.finish_copy()
    assert there(host, ref, kind) == set(normal([part(table, 1, 2)]))
    arrival.finish_copy()
    assert there(host, ref, kind) == set(normal([part(table, 1, 2)]))


@pytest.mark.parametrize("kind", COPIED)
def test_a_second_copy_without_a_kind_takes_it_all_away(host: Host, kind: str) -> None:
    if kind not in host.driver.kinds():
        pytest.skip(f"the driver holds no {kind}")
    ref = host.stage()
    arrival = begin(host, ref)
    bring(arrival, ref, sample(kind, 2))
    assert there(host, ref, kind)
    arrival.restart()
    arrival.finish_copy()
    assert not there(host, ref, kind)


def test_what_the_second_copy_brought_and_took_away_stays_away(host: Host) -> None:
    ref, table = host.stage(), sample("conntrack", 10)
    arrival = begin(host, ref)
    bring(arrival, ref, table)
    arrival.restart()
    bring(arrival, ref, part(table, 4, 10))
    bring(arrival, ref, keys_of(part(table, 8, 10), op=Op.DELETE))
    arrival.finish_copy()
    assert there(host, ref, "conntrack") == set(normal([part(table, 4, 8)]))


def test_a_copy_that_begins_a_third_time(host: Host) -> None:
    ref, table = host.stage(), sample("conntrack", 10)
    arrival = begin(host, ref)
    for first, end in ((0, 6), (2, 8), (4, 10)):
        arrival.restart()
        bring(arrival, ref, part(table, first, end))
    arrival.finish_copy()
    assert there(host, ref, "conntrack") == set(normal([part(table, 4, 10)]))


def test_a_second_copy_finds_room_in_a_table_that_the_first_one_filled(host: Host) -> None:
    ref, table = host.stage(connections_max=64), sample("conntrack", 128)
    arrival = begin(host, ref)
    bring(arrival, ref, part(table, 0, 64))
    arrival.restart()
    bring(arrival, ref, part(table, 64, 96))
    bring(arrival, ref, part(table, 96, 128))
    arrival.finish_copy()
    assert there(host, ref, "conntrack") == set(normal([part(table, 64, 128)]))
