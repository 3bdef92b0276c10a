"""Marks and labels: rules that speak of them, and connections that an operator gives others."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest

from datapath.errors import LoadRejected, NotReady
from datapath.provider import PortRef
from datapath.state.conntrack import CONNTRACK, RELABELLED
from datapath.state.kind import Columns, Table
from migrator.checkpoint import checkpoint, restore
from migrator.inspect import records
from tests.contract.hosts import Host
from tests.contract.samples import MAC, sample
from tests.fixtures.make_golden import FIXTURES

COUNT = 300


def connections(host: Host, ref: PortRef) -> Columns:
    """All of a port, in the order of their remote addresses."""
    tables = [table.columns or {} for table in host.driver.dump(ref, CONNTRACK.name)]
    whole = {name: np.concatenate([one[name] for one in tables]) for name in CONNTRACK.columns}
    order = np.argsort([value.tobytes() for value in whole["raddr"]])
    return {name: array[order] for name, array in whole.items()}


def opened(host: Host) -> PortRef:
    made = host.stage()
    host.driver.load(made, sample("conntrack", COUNT))
    host.driver.commit(made)
    host.driver.open(made)
    return made


def wanted(columns: Columns, rows: Any) -> Columns:
    given = {name: columns[name][rows].copy() for name in (*CONNTRACK.key, *RELABELLED)}
    given["mark"][:] = 0xABC
    given["label"][:] = np.void(bytes(range(16)))
    return given


def test_connections_get_what_they_are_given(host: Host) -> None:
    if "conntrack" not in host.driver.kinds():
        pytest.skip("tracks no connections")
    port = opened(host)
    before = connections(host, port)
    host.driver.track(port)
    rows = np.arange(COUNT) % 4 == 0
    assert host.driver.relabel(port, wanted(before, rows)) == rows.sum()
    after = connections(host, port)
    assert (after["mark"][rows] == 0xABC).all()
    assert set(after["label"][rows].tolist()) == {bytes(range(16))}
    for name in ("mark", "label"):
        assert after[name][~rows].tobytes() == before[name][~rows].tobytes()
    for name in ("id", "state", "flags", "packets_from", "bytes_to"):
        assert after[name].tobytes() == before[name].tobytes()
    (noted,) = [table for table in host.driver.drain(port) if table.kind == "conntrack"]
    assert len(noted) == rows.sum(), "a move takes the change along"
    assert noted.columns is not None
    assert (noted.columns["mark"] == 0xABC).all()


def test_what_has_ended_or_is_another_is_left_out(host: Host) -> None:
    if "conntrack" not in host.driver.kinds():
        pytest.skip("tracks no connections")
    port = opened(host)
    before = connections(host, port)
    given = wanted(before, slice(0, 3))
    given["id"][0] += np.uint64(1)
    given["rport"][1] ^= 1
    assert host.driver.relabel(port, given) == 1
    after = connections(host, port)
    assert after["mark"][:3].tolist() == [before["mark"][0], before["mark"][1], 0xABC]


def test_it_is_refused_where_nothing_could_be_kept(host: Host) -> None:
    if "conntrack" not in host.driver.kinds():
        pytest.skip("tracks no connections")
    port = opened(host)
    given = wanted(connections(host, port), slice(0, 3))
    with pytest.raises(LoadRejected):
        host.driver.relabel(port, {name: array for name, array in given.items() if name != "label"})
    host.driver.hold(port)
    host.driver.quiesce(port)
    with pytest.raises(NotReady):
        host.driver.relabel(port, given)


@pytest.mark.parametrize("rules", [{}, {"mark": "0x1"}, {"set_label": "0x1"}], ids=["plain", "asks", "gives"])
def test_only_rules_that_use_them_ask_a_later_version(host: Host, rules: dict[str, str]) -> None:
    if "acl" not in host.driver.kinds():
        pytest.skip("has no rules")
    made = host.stage()
    (plain, *_) = sample("acl", 1).records or ()
    host.driver.load(made, Table("acl", records=[{**plain, "action": "allow", **rules}]))
    need = host.driver.describe([made])
    assert need.kinds["acl"] == (2 if rules else 1)
    assert host.driver.probe(need) == []


REFUSALS = {
    "ebpf": ["Kind acl has version 3, this host knows up to 2.", "The driver ebpf cannot hold state of kind x-later."],
    "dummy": ["kind acl version 3: only 2 is known", "kind x-later version 1: not held here"],
}


def test_what_a_driver_does_not_know_it_refuses_by_name(host: Host) -> None:
    need = host.driver.describe([host.stage()])
    later = dataclasses.replace(need, kinds={**need.kinds, "acl": 3, "x-later": 1})
    assert host.driver.probe(later) == REFUSALS[host.driver.name]


def test_rules_connections_and_windows_of_a_kept_file_come_back(host: Host) -> None:
    """Into this driver from the file, and out of it again: what `inspect` shows of them is the same."""
    if missing := {"acl", "conntrack", "window"} - set(host.driver.kinds()):
        pytest.skip(f"holds no {', '.join(sorted(missing))}")
    raw = (FIXTURES / "format1-labels.mgs").read_bytes()
    host.plug("ctgold")
    restored = restore(host.driver, lambda: io.BytesIO(raw), 1, {MAC: "ctgold"})
    again = b"".join(checkpoint(host.driver, restored.refs, "here"))
    kept = shown(raw)
    assert kept == shown(again)
    assert len(kept) == 9 + 12 + 1
    assert sum("label" in one["record"] for one in kept) == 12 + 1


def shown(raw: bytes) -> list[dict[str, Any]]:
    """Rules, connections and windows as people see them, but for the time since their last packet."""
    chosen = [one for one in records(io.BytesIO(raw)) if one["kind"] in ("acl", "conntrack", "window")]
    for one in chosen:
        one["record"] = {name: value for name, value in one["record"].items() if name not in ("age_ns", "judged")}
    return sorted(chosen, key=lambda one: json.dumps(one, sort_keys=True))
