# SPDX-License-Identifier: GPL-2.0-only
"""The RPC contract of each release is part of every later one: no number is used again, no type changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.make_contract import contract

RELEASED = sorted((Path(__file__).parents[1] / "fixtures").glob("rpc-*/contract.json"))


def broken(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What programs of the old contract would miss, or take for something else."""
    if old["package"] != new["package"]:
        yield "the package has another name"
    for message, fields in old["messages"].items():
        there = new["messages"].get(message)
        if there is None:
            yield f"message {message} is gone"
            continue
        for number, field in fields.items():
            if there.get(number) != field:
                yield f"{message} field {number} was {field}, is {there.get(number)}"
    for service, calls in old["services"].items():
        for call, shape in calls.items():
            if new["services"].get(service, {}).get(call) != shape:
                yield f"{service}.{call} was {shape}"


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.parent.name)
def test_the_contract_of_a_release_is_part_of_this_one(path: Path) -> None:
    assert not list(broken(json.loads(path.read_text()), contract()))


def test_a_change_that_breaks_is_found() -> None:
    assert RELEASED
    old = json.loads(RELEASED[0].read_text())
    for change, words in (
        (lambda new: new["messages"].pop("Begin"), "message Begin is gone"),
        (lambda new: new["messages"]["Begin"].pop("3"), "Begin field 3"),
        (lambda new: new["messages"]["Begin"]["3"].update(type=9), "Begin field 3"),
        (lambda new: new["messages"]["FromSource"]["4"].update(oneof=""), "FromSource field 4"),
        (lambda new: new["services"]["Peer"].pop("Ask"), "Peer.Ask"),
        (lambda new: new.update(package="migrator.v2"), "package"),
    ):
        new = copy.deepcopy(old)
        change(new)
        assert any(words in line for line in broken(old, new))
