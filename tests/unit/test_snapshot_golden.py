"""Snapshots that earlier versions wrote load for ever, and mean what they meant."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from datapath.drivers.dummy import DummyDriver
from datapath.provider import Event, Network, NetworkKind
from datapath.registry import KINDS
from datapath.state.acl import ACL, LABELS
from datapath.state.conntrack import CONNTRACK
from datapath.state.kind import Kind, Table
from migrator.checkpoint import checkpoint, restore
from migrator.errors import Incompatible
from migrator.snapshot import SnapshotReader
from tests.contract.hosts import ref
from tests.contract.samples import MAC, port_record, sample
from tests.fixtures.make_golden import FIXTURES, GOLDEN, contents

LABELLED = (FIXTURES / "format1-labels.mgs").read_bytes()
LATER = ("label", "window_")
FILES = sorted(FIXTURES.glob("*.mgs"))


@pytest.fixture
def driver() -> Iterator[DummyDriver]:
    made = DummyDriver()
    made.start({"host": "golden", "fabric": "golden"}, _ignore)
    made.set_network(Network("blue", NetworkKind.LOCAL))
    yield made
    made.destroy()


def _ignore(event: Event) -> None:
    pass


def test_every_golden_file_is_there() -> None:
    assert {path.stem for path in FILES} >= set(GOLDEN)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_means_what_it_meant(path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    got = json.loads(json.dumps(contents(path.read_bytes())))
    assert _known(got) == _known(expected)
    # a later version may know more: fields it fills in are additions, never changes
    for mine, theirs in zip(got["records"], expected["records"], strict=True):
        assert {name: mine["record"][name] for name in theirs["record"]} == theirs["record"]
        assert (mine["port"], mine["kind"], mine["op"]) == (theirs["port"], theirs["kind"], theirs["op"])


def _known(shown: dict[str, dict[str, object]]) -> dict[str, object]:
    return {name: value for name, value in shown["inspect"].items() if name not in ("kinds", "skipped")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_can_be_restored(path: Path, driver: DummyDriver) -> None:
    restored = restore(driver, lambda: io.BytesIO(path.read_bytes()), 1, {MAC: "tap0"})
    assert restored.loaded["conntrack"] == 12
    assert driver.port(restored.refs[0]).counters == {"packets_to": 1 << 40, "bytes_to": 7}


def earlier(**known: bool) -> dict[str, Kind]:
    """The registry of a version before labels and windows; `rules`, `window`: but for rules that speak of labels, or
    for kind `window`."""
    plain = {name: sort for name, sort in ACL.fields.items() if name not in LABELS}
    columns = {name: column for name, column in CONNTRACK.columns.items() if not name.startswith(LATER)}
    made = {**KINDS, "conntrack": dataclasses.replace(CONNTRACK, columns=columns)}
    if not known.get("rules"):
        made["acl"] = dataclasses.replace(ACL, version=1, since={}, fields=plain)
    if not known.get("window"):
        del made["window"]
    return made


@pytest.mark.parametrize(
    ("known", "reason"),
    [({"window": True}, "kind acl version 2; this host knows 1"), ({"rules": True}, "kind 'window' is not known here")],
    ids=["rules", "window"],
)
def test_an_earlier_reader_refuses_by_name_what_it_would_read_as_something_else(
    known: dict[str, bool], reason: str
) -> None:
    """At the header, before anything is made. What connections have beside it skips."""
    with pytest.raises(Incompatible, match=reason) as refused:
        SnapshotReader(io.BytesIO(LABELLED), kinds=earlier(**known))
    assert refused.value.hint == "upgrade the migrator on this host"
    (read,) = connections(LABELLED, earlier(rules=True, window=True))
    assert len(read) == 12 and read.columns is not None and not [n for n in read.columns if n.startswith(LATER)]


def connections(raw: bytes, kinds: Mapping[str, Kind]) -> list[Table]:
    sections = SnapshotReader(io.BytesIO(raw), kinds=kinds)
    return [one.table for one in sections if one.kind == "conntrack" and one.table is not None]


@pytest.mark.parametrize("labelled", [False, True], ids=["plain", "labelled connections"])
def test_an_earlier_reader_takes_what_no_rule_speaks_of(driver: DummyDriver, labelled: bool) -> None:
    """Nothing there asks for labels that an operator gave: they are left behind, and all else is read."""
    made = ref()
    driver.stage(made, port_record(), "tap0")
    driver.load(made, sample("acl", 9))
    table = sample("conntrack", 12)
    assert table.columns is not None
    driver.load(
        made, table if labelled else Table("conntrack", columns={**table.columns, "label": np.zeros(12, "V16")})
    )
    raw = b"".join(checkpoint(driver, [made], "host-a", codec="none"))
    assert (b"label" in raw) is labelled
    (read,) = connections(raw, earlier())
    assert read.columns is not None and read.columns.keys() == earlier()["conntrack"].columns.keys()
    for name, values in read.columns.items():
        if name != "age_ns":
            assert values.tobytes() == table.columns[name].tobytes(), name
