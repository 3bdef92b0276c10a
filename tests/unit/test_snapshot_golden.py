"""Snapshots that earlier versions wrote load for ever, and mean what they meant."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.drivers.dummy import DummyDriver
from datapath.provider import Event, Network, NetworkKind
from migrator.checkpoint import restore
from tests.contract.samples import MAC
from tests.fixtures.make_golden import FIXTURES, GOLDEN, contents

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
