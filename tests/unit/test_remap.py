"""The document of remapping: what it takes, what it comes to, and what it says of rules that are not one to one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from datapath.state.check import checked_records
from datapath.state.kind import Table
from datapath.state.remap import REMAP, RemapDocument, problems
from migrator import announce

A, B, X, Y = "203.0.113.10", "203.0.113.11", "10.0.0.5", "10.0.0.6"


def port(outside: str, inside: str, outside_port: int, inside_port: int = 0, protocol: str = "tcp") -> dict[str, Any]:
    ports = {"outside_port": outside_port} | ({"inside_port": inside_port} if inside_port else {})
    return {"outside": outside, "inside": inside, "protocol": protocol, **ports}


def whole(outside: str, inside: str) -> dict[str, Any]:
    return {"outside": outside, "inside": inside}


def test_records_are_of_the_kind() -> None:
    rules = [whole("2001:DB8:0::10", "fd00::5"), port(B, X, 443, 8443), port(B, X, 53, protocol="udp")]
    records = RemapDocument.model_validate({"rules": rules}).records()
    assert checked_records(REMAP, Table(REMAP.name, records=records)) == records
    assert [tuple(record.values()) for record in records] == [
        ("2001:db8::10", "fd00::5", "", 0, 0),
        (B, X, "tcp", 443, 8443),
        (B, X, "udp", 53, 53),
    ]


def test_rules_for_all_there_is_are_one_to_one() -> None:
    rules = [
        whole(A, X),
        port(A, X, 80, 8080),
        port(B, X, 443, 8443),
        port(B, X, 443, 8443, "udp"),
        whole("1.1.1.1", Y),
    ]
    assert problems(RemapDocument.model_validate({"rules": rules}).records()) == []


WRONG = [
    ([whole("somewhere", X)], "outside 'somewhere' is no IP address"),
    ([whole(A, "fd00::5")], "of two families"),
    ([whole("224.0.0.1", X)], "not an address of one station"),
    ([whole("fe80::1", "fd00::5")], "not an address of one station"),
    ([whole(A, "127.0.0.1")], "not an address of one station"),
    ([whole("255.255.255.255", X)], "not an address of one station"),
    ([whole("::ffff:203.0.113.10", "fd00::5")], "not an address of one station"),
    ([{**whole(A, X), "protocol": "tcp"}], "go together"),
    ([{**whole(A, X), "outside_port": 80}], "go together"),
    ([{**whole(A, X), "inside_port": 80}], "go together"),
    ([whole(A, X), whole(A, X)], f"outside {A} is in two rules"),
    ([whole(A, X), whole(B, X)], f"inside {X} is in two rules"),
    ([port(A, X, 80), port(B, X, 80)], f"inside {X} tcp port 80 is in two rules"),
    ([port(A, X, 80), port(A, Y, 81)], f"leads to {X} and to {Y}"),
    ([whole(A, X), whole(X, Y)], f"{X} is outside in one rule and inside in another"),
    ([{**whole(A, X), "protocol": "sctp"}], "Input should be"),
    ([{**whole(A, X), "comment": "mine"}], "Extra inputs"),
    ([port(A, X, 70_000)], "less than or equal to 65535"),
]


@pytest.mark.parametrize(("rules", "said"), WRONG)
def test_what_is_wrong_is_named(rules: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RemapDocument.model_validate({"rules": rules})
    assert said in str(caught.value)


def test_outside_addresses_are_announced_with_the_ports_own() -> None:
    record = {"mac": "02:00:00:00:00:01", "addresses": [X], "trunk": {}}
    own, more = announce.frames(record), announce.frames(record, [A, "2001:db8::10"])
    assert len(more) == len(own) + 3
    assert set(own) < set(more)
