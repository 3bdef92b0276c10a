# SPDX-License-Identifier: GPL-2.0-only
"""Records of one layout in another, and which generation of maps is in force after a crash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datapath.drivers.ebpf import btf
from datapath.drivers.ebpf.bpffs import BEFORE, MAPS, NEXT, Pins
from datapath.drivers.ebpf.evolve import by_name, digest, lost, meanings
from datapath.drivers.ebpf.layout import STRUCTURES
from datapath.drivers.ebpf.uapi import F_NO_PREALLOC, MapType
from datapath.errors import UnsupportedKind

KEY = [("addr", ">u4", 4), ("port", ">u2"), ("pad", "<u2")]
OLD = np.dtype([("word", "<u8"), ("mark", "<u4"), ("gone", "<u4"), ("counts", "<u8", 3), ("key", KEY)])
NEW = np.dtype([("key", KEY[1:] + KEY[:1]), ("counts", "<u8", 2), ("fresh", "<u4"), ("mark", "<u8"), ("word", "<u8")])


def record() -> np.ndarray:
    made = np.zeros(3, OLD)
    made["word"], made["mark"], made["gone"] = (1 << 63) + 5, 7, 9
    made["counts"][:, 0], made["counts"][:, 1] = 11, 12
    made["key"]["addr"], made["key"]["port"] = 0x0A000001, 7000
    return made


def test_fields_keep_their_values_wherever_they_are() -> None:
    made = by_name(record(), NEW)
    assert made.dtype == NEW and len(made) == 3
    assert made[1]["word"] == (1 << 63) + 5 and made[1]["mark"] == 7 and made[1]["fresh"] == 0
    assert made[1]["counts"].tolist() == [11, 12]
    assert made[1]["key"]["addr"].tolist() == [0x0A000001] * 4 and made[1]["key"]["port"] == 7000
    assert made["key"]["port"].tobytes() == bytes.fromhex("1b58") * 3
    assert lost(OLD, NEW) == ["gone"] and lost(NEW, OLD) == ["fresh"]
    assert by_name(made, NEW) is made


@pytest.mark.parametrize(
    "field, value, words",
    [("counts", (0, 0, 1), "counts has 3 elements, 2 are known"), ("word", 1 << 40, "word holds")],
)
def test_what_does_not_fit_is_refused_and_not_cut(field: str, value: object, words: str) -> None:
    given, narrow = np.zeros(1, OLD), np.dtype([("word", "<u4"), ("counts", "<u8", 2)])
    assert not by_name(given, narrow).view("u1").any()
    given[field] = value
    with pytest.raises(UnsupportedKind, match=words):
        by_name(given, narrow)


def test_numbers_with_names_keep_their_meaning() -> None:
    ours = btf.read_object()
    assert meanings(ours, ours) == []
    other = btf.read_object()
    other.__dict__["constants"] = {**ours.constants, "PORT_ACTIVE": 9, "ABI_SLOTS_DEFAULT": 1, "ABI_REVISION": 2}
    assert meanings(other, ours) == ["PORT_ACTIVE is 9 there and 2 here"]


def test_tables_in_maps_of_maps_say_what_they_are() -> None:
    types = btf.read_object()
    found = types.inner_map("conntracks")
    assert found is not None and (found.type, found.entries, found.flags) == (MapType.HASH, 65536, F_NO_PREALLOC)
    assert [types.types[number].name for number in (found.key, found.value)] == ["ct_key", "ct_entry"]
    assert types.inner_map("ports") is None and types.inner_map("nothing") is None


def test_a_digest_stands_for_all_fields() -> None:
    changed = {**STRUCTURES, "host": np.dtype([("addr", "<u4", 4)])}
    assert digest(STRUCTURES) == digest(dict(STRUCTURES)) != digest(changed)


@pytest.mark.parametrize(
    "there, after, turned",
    [
        ({MAPS: "old"}, {MAPS: "old"}, False),
        ({MAPS: "old", NEXT: "new"}, {MAPS: "old"}, False),  # died before the turn
        ({NEXT: "new", BEFORE: "old"}, {MAPS: "new", BEFORE: "old"}, True),  # in the middle of it
        ({MAPS: "new", BEFORE: "old"}, {MAPS: "new", BEFORE: "old"}, True),  # before all was finished
    ],
)
def test_one_generation_of_maps_is_in_force_wherever_an_agent_died(
    tmp_path: Path, there: dict[str, str], after: dict[str, str], turned: bool
) -> None:
    pins = Pins(tmp_path)
    for generation, name in there.items():
        pins.of(generation).maps.mkdir()
        (pins.of(generation).maps / name).touch()
    pins.mend()
    assert {path.name: [pin.name for pin in path.iterdir()] for path in tmp_path.iterdir()} == {
        generation: [name] for generation, name in after.items()
    }
    assert pins.turned() is turned
