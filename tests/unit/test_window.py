"""Kind `window`: its document, and windows of connections as columns."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from datapath.drivers.ebpf import conntrack, layout, window_columns
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.tracking import joined, split
from datapath.state.check import checked_columns
from datapath.state.conntrack import CONNTRACK, NO_SCALE, WINDOW_FLAGS
from datapath.state.kind import Table
from datapath.state.window import WindowDocument
from tests.contract.samples import PORT_TIME_NS, sample


def test_a_document_is_one_record() -> None:
    assert WindowDocument().records() == [{"protocol": "tcp", "check": "strict"}]
    assert WindowDocument(check="count").records() == [{"protocol": "tcp", "check": "count"}]


@pytest.mark.parametrize("written", [{"check": "loose"}, {"checks": "strict"}, {"check": None}])
def test_what_is_not_known_is_refused(written: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        WindowDocument.model_validate(written)


def test_names_of_flags_are_those_of_the_kernel() -> None:
    flags = {value >> 12: name for value, name in C.named("WINDOW_F_").items()}
    assert flags == WINDOW_FLAGS
    assert C.WINDOW_NO_SCALE == NO_SCALE


def test_columns_are_what_an_entry_says() -> None:
    columns = checked_columns(CONNTRACK, sample("conntrack", 200))
    made = conntrack.entries(columns, conntrack.ORIGIN_NS + PORT_TIME_NS)
    assert made["window"].all()
    again = window_columns.columns(made)
    assert again.keys() == {name for name in columns if name.startswith("window_")}
    for name, values in again.items():
        assert values.dtype == np.dtype(CONNTRACK.columns[name].dtype), name
        assert np.array_equal(values, columns[name]), name


def test_a_table_without_windows_has_no_columns_of_them() -> None:
    columns = sample("conntrack", 9).columns or {}
    plain = {name: values for name, values in columns.items() if not name.startswith("window_")}
    filled = checked_columns(CONNTRACK, Table("conntrack", columns=plain))
    made = conntrack.entries(filled, conntrack.ORIGIN_NS)
    assert window_columns.columns(made) == {}
    keys = conntrack.keys(filled)
    assert conntrack.columns(keys, made, conntrack.ORIGIN_NS).keys() == plain.keys()


def test_keys_of_changed_windows_are_set_apart() -> None:
    keys = np.zeros(6, layout.CT_KEY)
    keys["lport"] = (1, 2, 3, 2, 4, 4)
    keys["type"] = (0, 0, 1, C.CT_TYPE_WINDOW, C.CT_TYPE_WINDOW, C.CT_TYPE_L2)
    rest, windows = split(keys)
    assert rest["type"].tolist() == [0, 0, 1, C.CT_TYPE_L2]
    both = joined(rest, windows)
    assert sorted(zip(both["lport"].tolist(), both["type"].tolist(), strict=True)) == [
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 0),
        (4, C.CT_TYPE_L2),
    ]
    assert len(joined(rest, [])) == 4
