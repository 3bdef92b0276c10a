"""Marks and labels as they are written, checked, carried and looked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from datapath.drivers.ebpf.acl import compile_rules, validate
from datapath.drivers.ebpf.labels import LABEL_RULES_MAX
from datapath.errors import LoadRejected, UnsupportedKind
from datapath.registry import KINDS
from datapath.state.acl import ACL, digest
from datapath.state.kind import Table
from datapath.state.labels import LABEL_BITS, MARK_BITS, label, mark, parse
from migrator._pb import migrator_pb2 as pb
from migrator.agent.orders import rules as ordered
from migrator.agent.relabelling import Relabelling
from migrator.config import Rule
from migrator.errors import ConfigInvalid, Incompatible
from migrator.inspect import rows
from migrator.snapshot import decode_section, encode_table
from migrator.watching.match import Filter
from migrator.watching.match import parse as written
from tests.contract.samples import MAC, sample
from tests.unit.test_acl_compile import rule


@pytest.mark.parametrize(
    ("text", "bits", "expected"),
    [
        ("7", MARK_BITS, (7, 0xFFFFFFFF)),
        ("0x10/0xf0", MARK_BITS, (0x10, 0xF0)),
        ("0/0", MARK_BITS, (0, 0)),
        (f"{1 << 127}", LABEL_BITS, (1 << 127, (1 << 128) - 1)),
    ],
)
def test_parse(text: str, bits: int, expected: tuple[int, int]) -> None:
    assert parse(text, bits) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1/", "/1", "1/2/3", "0x1_0", "٣", "4294967296", "1/0x100000000", "3/1"]
)
def test_what_is_no_mark(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse(text, MARK_BITS)


def test_one_text_for_each_meaning() -> None:
    assert [mark(text) for text in ("", "255", "0XFF", "0xff/4294967295", "1/3")] == [
        "",
        "0xff",
        "0xff",
        "0xff",
        "0x1/0x3",
    ]
    assert label("1/3") == "0x1/0x3"


def test_a_rule_says_what_it_gives_and_asks() -> None:
    given = Rule.model_validate({"direction": "to", "action": "allow", "set_mark": 7, "label": "0x1/0x1"})
    (record,) = ordered(pb.PortOrder(rules=[pb.Rule(**given.model_dump())])).records or ()
    assert (record["set_mark"], record["label"]) == ("0x7", "0x1/0x1")
    assert {"mark", "set_label"}.isdisjoint(record)
    with pytest.raises(ValueError, match="action allow"):
        Rule.model_validate({"direction": "to", "action": "drop", "set_mark": 7})
    with pytest.raises(ValueError, match="32 bits"):
        Rule.model_validate({"direction": "to", "action": "drop", "mark": 1 << 32})


def test_rules_without_them_have_the_digest_that_they_had() -> None:
    assert digest([rule(1)]) == digest([{name: value for name, value in rule(1).items() if name not in ACL.accounting}])
    assert digest([rule(1)]) != digest([rule(1, mark="0x1")]) != digest([rule(1, mark="0x2")])


@pytest.mark.parametrize(
    "fields", [{"mark": "x"}, {"label": 7}, {"set_mark": "0x1", "action": "drop"}, {"mark": "2/1"}]
)
def test_what_is_no_rule_is_refused_by_its_field(fields: dict[str, Any]) -> None:
    with pytest.raises(LoadRejected, match=next(iter(fields))):
        validate([rule(1, **fields)])


def test_more_than_the_switch_looks_at_are_refused() -> None:
    many = [rule(number, mark=f"{number}") for number in range(1, LABEL_RULES_MAX + 1)]
    assert len(compile_rules(many).label_table) == LABEL_RULES_MAX + 1
    with pytest.raises(UnsupportedKind, match="257 rules"):
        compile_rules([*many, rule(999, set_mark="1")])
    alike = compile_rules([rule(number, mark="1") for number in range(1, 9)])
    assert alike.labels.tolist() == [1] * 8


def test_only_records_that_use_them_need_a_later_reader() -> None:
    older = {**KINDS, "acl": dataclasses.replace(ACL, version=1, since={}, fields={"id": (int,)})}
    plain, using = ([rule(1, **fields)] for fields in ({}, {"mark": "0x1"}))
    (section,) = encode_table(Table("acl", records=plain), MAC)
    assert decode_section(section, kinds=older).version == 1
    (section,) = encode_table(Table("acl", records=using), MAC)
    with pytest.raises(Incompatible, match="acl version 2"):
        decode_section(section, kinds=older)
    assert decode_section(section).table == Table("acl", records=using)


def test_connections_without_labels_have_no_column_of_them() -> None:
    table = sample("conntrack", 9)
    assert table.columns is not None
    (with_labels,) = encode_table(table, MAC)
    none = {**table.columns, "label": np.zeros(9, "V16")}
    (without,) = encode_table(Table("conntrack", columns=none), MAC)
    assert (b"label" in with_labels, b"label" in without) == (True, False)
    read = decode_section(without).table
    assert read is not None
    assert read.columns is not None
    assert read.columns["label"].tobytes() == bytes(9 * 16)


def test_a_label_is_shown_and_looked_for_as_a_number() -> None:
    table = sample("conntrack", 9)
    shown = [record["label"] for record in rows(table)]
    assert shown[:4] == [f"{(1 << 127) + 0x77:#x}", "0x0", "0x0", f"{1 << 127:#x}"]
    for text, count in (("label=0x77/0xff", 2), ("label!=0", 4), (f"label={1 << 127}", 2), ("label=1,0x77", 1)):
        assert Filter(KINDS["conntrack"], [written(text)]).mask(table).sum() == count
    with pytest.raises(ConfigInvalid, match="label: expected VALUE"):
        Filter(KINDS["conntrack"], [written("label=10.0.0.1")])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({}, "neither"), ({"mark": "x"}, "mark: expected"), ({"label": "2/1"}, "label: expected no bit")],
)
def test_a_change_that_says_nothing_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        Relabelling(pb.RelabelRequest(**fields))
