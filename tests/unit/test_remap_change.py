"""A change of few remap rules among many: what is looked at is enough, for what is wrong and for what is written."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as some

from datapath.drivers.ebpf.remap import elements
from datapath.state.kind import Record
from datapath.state.remap import REMAP, ByAddress, problems

ADDRESSES = [f"203.0.113.{number}" for number in range(1, 6)]
"""Few, and for both sides, so that rules meet and contradict each other."""
ends = some.tuples(some.sampled_from(ADDRESSES), some.sampled_from(ADDRESSES))
ports = some.one_of(
    some.just(("", 0, 0)),
    some.tuples(some.sampled_from(["tcp", "udp"]), some.integers(1, 2), some.integers(1, 2)),
)
rules = some.builds(
    lambda sides, port: (
        dict(zip(REMAP.key, (sides[0], port[0], port[1]), strict=True)) | {"inside": sides[1], "inside_port": port[2]}
    ),
    ends,
    ports,
)
changes = some.lists(rules, max_size=3, unique_by=REMAP.key_of)


def rows(records: list[Record]) -> dict[bytes, bytes]:
    """What the kernel has of them: key -> where it leads."""
    keys, values = elements(3, records)
    assert len({key.tobytes() for key in keys}) == len(keys)
    return {key.tobytes(): np.void(value).tobytes() for key, value in zip(keys, values, strict=True)}


@given(some.lists(some.tuples(changes, changes), max_size=8))
def test_what_is_near_a_change_is_all_that_it_can_touch(steps: list[tuple[list[Record], list[Record]]]) -> None:
    there: dict[Any, Record] = {}
    addresses = ByAddress(())
    for taken, given_ in steps:
        new = [rule for rule in given_ if there.get(REMAP.key_of(rule)) != rule]
        named = {REMAP.key_of(rule) for rule in (*taken, *new)}
        gone = [rule for key, rule in there.items() if key in named]
        after = {key: rule for key, rule in there.items() if key not in named}
        after |= {REMAP.key_of(rule): rule for rule in new}
        here = rows(addresses.near((*gone, *new))) if there else {}
        addresses.change(gone, new)
        near = addresses.near((*gone, *new))
        whole, few = problems(list(after.values())), problems(near)
        assert bool(whole) == bool(few), (whole, few)
        if few:
            addresses = ByAddress(there.values())
            continue
        kept = {key: value for key, value in rows([*there.values()]).items() if key not in here}
        assert kept | rows(near) == rows([*after.values()])
        there = after


def test_rules_without_an_address_in_common_are_not_looked_at() -> None:
    many = [
        {"outside": f"198.18.0.{n}", "protocol": "", "outside_port": 0, "inside": f"10.0.0.{n}", "inside_port": 0}
        for n in range(200)
    ]
    changed = {**many[7], "inside": "10.0.1.1"}
    addresses = ByAddress(many)
    addresses.change([many[7]], [changed])
    assert addresses.near([many[7], changed]) == [changed]
