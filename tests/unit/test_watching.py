# SPDX-License-Identifier: GPL-2.0-only
"""What changed between two looks, filters on it, and a view that any order of messages keeps true."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.registry import KINDS
from datapath.state.conntrack import ASSURED, INBOUND
from datapath.state.kind import Table
from migrator.errors import ConfigInvalid, Corrupt
from migrator.inspect import rows
from migrator.watching import compare as comparing
from migrator.watching.compare import compare, identity, joined, matched, take, told
from migrator.watching.match import Filter, Match, fields, parse
from migrator.watching.view import Change, Update, View
from tests.contract.samples import SAMPLES, sample
from tests.unit.pair import connections

VM, MAC = "6f0c4d2e-7a55-4c0e-9d5e-3f2b8a1c0d01", "52:54:00:00:00:01"
CONNTRACK = KINDS["conntrack"]


def table(**columns: Any) -> Table:
    """Connections: of each column as many values as the longest has."""
    count = max(len(values) for values in columns.values())
    made = connections(count)
    for name, values in columns.items():
        made[name][:] = values
    return Table("conntrack", columns=made)


# ---- compare ----


@pytest.mark.parametrize("kind", sorted(SAMPLES))
def test_every_kind_can_be_compared(kind: str) -> None:
    whole = joined(KINDS[kind], [sample(kind, 20)])
    assert len(compare(whole, whole)) == 0
    part = take(whole, np.arange(len(whole))[::2])
    found = compare(part, whole)
    assert len(found.added) == len(whole) - len(part) and not len(found.changed) and not len(found.removed)
    found = compare(whole, part)
    assert len(found.removed) == len(whole) - len(part) and not len(found.changed) and not len(found.added)
    assert told(KINDS[kind]) and not set(told(KINDS[kind])) & set(identity(KINDS[kind]))


@pytest.mark.parametrize("kind", sorted(name for name in SAMPLES if KINDS[name].fields))
def test_what_is_counted_or_live_in_a_record_is_no_change(kind: str) -> None:
    before = joined(KINDS[kind], [sample(kind, 5)])
    moving = {*KINDS[kind].accounting, *KINDS[kind].live}
    after = Table(kind, records=[{n: v for n, v in one.items() if n not in moving} for one in before.records or ()])
    assert len(compare(before, after)) == 0


def keys(one: Table) -> set[bytes]:
    columns = one.columns or {}
    return {b"".join(columns[name][row].tobytes() for name in identity(CONNTRACK)) for row in range(len(one))}


@pytest.mark.parametrize("kind", sorted(name for name in SAMPLES if KINDS[name].columns))
def test_what_is_counted_or_moves_by_itself_in_columns_is_no_change(kind: str) -> None:
    columns = KINDS[kind].columns
    quiet = [name for name, column in columns.items() if column.accounting or column.volatile]
    by_itself = [name for name in columns if name.endswith("_ns") and name not in quiet]
    assert not by_itself, "time passes without a change: mark it volatile"
    before = joined(KINDS[kind], [sample(kind, 5)])
    after = take(before, np.arange(len(before)))
    assert after.columns is not None
    for name in quiet:
        after.columns[name] += np.ones(1, after.columns[name].dtype)
    assert len(before) and len(compare(before, after)) == 0


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=60, deadline=None)
def test_columns_are_compared_as_a_dictionary_would(seed: int, collide: bool) -> None:
    """Also when all sums of rows fall together."""
    rng = np.random.default_rng(seed)
    many = connections(60)
    many["id"] = rng.integers(0, 3, 60).astype("<u8")

    def some() -> Table:
        rows_ = rng.permutation(60)[: rng.integers(0, 60)]
        chosen = {name: array[rows_].copy() for name, array in many.items()}
        chosen["state"] = rng.integers(1, 4, len(rows_)).astype("u1")
        chosen["age_ns"] = rng.integers(0, 1 << 40, len(rows_)).astype("<u8")
        return Table("conntrack", columns=chosen)

    before, after = some(), some()
    was = comparing._sums
    try:
        if collide:
            comparing._sums = lambda words: was(words) & np.uint64(3)  # type: ignore[assignment]
        found = compare(before, after)
    finally:
        comparing._sums = was
    old, new = by(before), by(after)
    assert keys(found.added) == new.keys() - old.keys()
    assert keys(found.removed) == old.keys() - new.keys()
    assert keys(found.changed) == {key for key in old.keys() & new.keys() if old[key] != new[key]}
    assert len(found.before) == len(found.changed)
    pairs = matched(before, after)
    assert len(pairs[0]) == len(old.keys() & new.keys())


def by(one: Table) -> dict[bytes, int]:
    columns = one.columns or {}
    return {
        b"".join(columns[name][row].tobytes() for name in identity(CONNTRACK)): int(columns["state"][row])
        for row in range(len(one))
    }


# ---- match ----


def matching(given_: Table, *texts: str) -> list[int]:
    mask = Filter(KINDS[given_.kind], [parse(text) for text in texts]).mask(given_)
    return np.flatnonzero(mask).tolist()


def address(text: str) -> np.void:
    return np.frombuffer(b"\0" * 10 + b"\xff\xff" + bytes(map(int, text.split("."))), "V16")[0]


def test_filters_of_columns() -> None:
    given_ = table(
        proto=[6, 6, 17, 132],
        rport=[80, 443, 53, 9000],
        state=[3, 7, 16, 3],
        flags=[INBOUND, INBOUND | ASSURED, 0, ASSURED],
        laddr=[address(a) for a in ("10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.1")],
    )
    for texts, found in (
        (["proto=tcp"], [0, 1]),
        (["proto=TCP,udp"], [0, 1, 2]),
        (["proto!=tcp"], [2, 3]),
        (["proto=132"], [3]),
        (["proto=tcp", "rport=443"], [1]),
        (["rport=50-500"], [0, 1, 2]),
        (["state=ESTABLISHED"], [0, 3]),
        (["state!=established,time_wait"], [2]),
        (["flags=INBOUND"], [0, 1]),
        (["flags=INBOUND", "flags=ASSURED"], [1]),
        (["flags!=INBOUND"], [2, 3]),
        (["laddr=10.0.0.0/24"], [0, 1]),
        (["laddr=10.0.1.1"], [2]),
        (["laddr=::ffff:10.0.0.2"], [1]),
        (["laddr=2001:db8::/32"], []),
        (["laddr=0.0.0.0/0"], [0, 1, 2, 3]),
        ([], [0, 1, 2, 3]),
    ):
        assert matching(given_, *texts) == found, texts


def test_filters_of_macs_and_records() -> None:
    macs = sample("fdb", 4)
    assert matching(macs, "mac=06:11:00:00:00:02") == [2]
    rules = sample("acl", 10)
    assert matching(rules, "direction=from") == [1, 3, 5, 7, 9]
    assert matching(rules, "remote=192.0.2.2/32") == [2]
    assert matching(rules, "priority=100", "protocol=icmp") == [2]
    assert matching(rules, "log=true") == [0, 7]
    assert matching(rules, "protocol=47") == [4, 9]
    port = sample("port", 1)
    assert matching(port, "addresses=10.0.0.5", "antispoof=true", "mtu=1500", "timeouts_ms=udp") == [0]
    assert matching(port, "addresses=10.0.0.6") == matching(port, "policy!=web") == []


@pytest.mark.parametrize("number", ["65536", str(1 << 64), str(1 << 70), f"0-{1 << 70}", "-1", "0x50"])
def test_numbers_of_any_size_are_compared(number: str) -> None:
    given_ = table(rport=[80, 443], mark=[0, 1])
    assert matching(given_, f"rport={number}") == {"0x50": [0], f"0-{1 << 70}": [0, 1]}.get(number, [])


@pytest.mark.parametrize("text", ["", "proto", "=tcp", "proto=", "proto=tcp,", "!=3"])
def test_what_is_no_filter_is_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid, match="expected FIELD=VALUE"):
        parse(text)


@pytest.mark.parametrize(
    ("kind", "match", "words"),
    [
        ("conntrack", Match("colour", ("red",)), "no field of kind conntrack"),
        ("conntrack", Match("bytes_to", ("1",)), "only counted"),
        ("acl", Match("hits", ("1",)), "only counted"),
        ("conntrack", Match("raddr", ("10.0.0",)), "an address or prefix"),
        ("conntrack", Match("state", ("OPEN",)), "expected one of NONE"),
        ("conntrack", Match("rport", ("http",)), "a number or FIRST-LAST"),
        ("conntrack", Match("rport", ("1-" + "9" * 5000,)), "a number or FIRST-LAST"),
        ("conntrack", Match("rport", ("9" * 5000,)), "a number or FIRST-LAST"),
        ("fdb", Match("mac", ("06:11",)), "expected a MAC"),
    ],
)
def test_a_filter_that_cannot_hold_is_refused(kind: str, match: Match, words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        Filter(KINDS[kind], [match])
    assert all(name in fields([kind]) for name in identity(KINDS[kind]))


# ---- view ----


def update(what: str, *tables: Table, epoch: int = 1, last: bool = True) -> Update:
    return Update(what, VM, MAC, epoch, "conntrack", tables, last)


def heard(view: View, host: str, *updates: Update) -> list[Change]:
    return [change for one in updates for change in view.take(host, one)]


def test_a_view_in_random_hands_is_always_what_was_told_last() -> None:
    """Moves, restarts and deltas in any order; late words of hosts where the VM was change nothing."""
    for seed in range(30):
        rng = random.Random(seed)
        view, there, epoch, host = View(rows), {}, 1, "h1"
        begun = False
        known: set[int] = set()
        world = dict.fromkeys(range(20), 3)  # id -> state
        for _ in range(40):
            before = dict(world)
            for _ in range(rng.randrange(4)):
                world[rng.randrange(40)] = rng.choice((3, 4, 7))
            for gone in rng.sample(sorted(world), min(len(world), rng.randrange(3))):
                del world[gone]
            if not begun or rng.random() < 0.3:
                if rng.random() < 0.5:
                    late = heard(view, host, update("now", made({99: 3}), epoch=epoch - 1))
                    assert not late
                    epoch, host = epoch + 1, rng.choice(("h1", "h2", "h3"))
                begun = True
                cut = rng.randrange(len(world) + 1)
                parts = (dict(list(world.items())[:cut]), dict(list(world.items())[cut:]))
                said = heard(
                    view,
                    host,
                    update("here", epoch=epoch),
                    update("whole", made(parts[0]), epoch=epoch, last=False),
                    update("whole", made(parts[1]), epoch=epoch),
                )
            else:
                gone = {n: before[n] for n in before.keys() - world.keys()}
                news = {n: s for n, s in world.items() if before.get(n) != s}
                said = heard(
                    view, host, update("removed", made(gone), epoch=epoch), update("now", made(news), epoch=epoch)
                )
            for change in said:
                number = change.record.get("id")
                if change.op == "added":
                    assert number not in known
                    known.add(number)
                    there[number] = change.record["state"]
                elif change.op == "removed":
                    known.remove(number)
                    del there[number]
                elif change.op == "changed":
                    assert change.was["state"] == there[number] != change.record["state"]
                    there[number] = change.record["state"]
            labels = CONNTRACK.columns["state"].labels
            assert there == {n: labels[s] for n, s in world.items()}, f"seed {seed}"


def made(states: dict[int, int]) -> Table:
    columns = {name: array[list(states)].copy() for name, array in connections(100).items()}
    columns["id"] = np.array(list(states), "<u8")
    columns["state"] = np.array(list(states.values()), "u1")
    return Table("conntrack", columns=columns)


def test_what_no_agent_says_is_refused() -> None:
    view = View(rows)
    heard(view, "h1", update("here"))
    with pytest.raises(Corrupt, match="before the whole"):
        heard(view, "h1", update("now", made({1: 3})))
    with pytest.raises(Corrupt, match="another kind"):
        heard(view, "h1", update("whole", sample("fdb", 3)))
    newer = Update("whole", VM, MAC, 1, "weather", (), True)
    assert not heard(view, "h1", newer)


def test_what_leaves_is_known_by_host_and_epoch() -> None:
    view = View(rows)
    heard(view, "h1", update("here"), update("whole", made({1: 3})))
    heard(view, "h2", update("here", epoch=2), update("whole", made({1: 3}), epoch=2))
    assert not list(view.leave(VM, MAC, "h1", 1)) and view.ports("h2") == [(VM, MAC, 2)]
    assert [change.op for change in view.leave(VM, MAC, "h2", 2)] == ["left"]
    assert not list(view.leave(VM, MAC))
