# SPDX-License-Identifier: GPL-2.0-only
"""Declared layouts against BTF, and constants read from it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from datapath.drivers.ebpf import btf
from datapath.drivers.ebpf.layout import PORT, STRUCTURES, C, check
from datapath.errors import FeatureMissing

from .model import BPF_SOURCES


@pytest.fixture
def types(switch_object: Path) -> btf.Btf:
    return btf.read_object(switch_object)


def test_declared_layouts_are_those_of_the_object(types: btf.Btf) -> None:
    check(types)
    declared = re.findall(r"^struct (\w+) \{", (BPF_SOURCES / "lib" / "types.h").read_text(), re.M)
    shared = {name for name in declared if name in types.structures}
    assert {"port", "ct_key", "ct_entry", "l2_entry", "event"} <= shared


def changed(field: str, dtype: str) -> np.dtype:
    """struct port with one field of another type."""
    fields, names = PORT.fields or {}, list(PORT.names or ())
    formats = [dtype if name == field else fields[name][0] for name in names]
    offsets = [fields[name][1] for name in names]
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": PORT.itemsize})


def test_each_difference_is_named(types: btf.Btf) -> None:
    with pytest.raises(FeatureMissing, match=r"port\.mtu is <u2, not >u2") as raised:
        check(types, {"port": changed("mtu", ">u2")})
    assert "make bpf" in raised.value.hint
    with pytest.raises(FeatureMissing, match=r"port\.held_to is <i8, not <u8"):
        check(types, {"port": changed("held_to", "<u8")})
    longer = np.dtype([*((name, PORT[name]) for name in PORT.names or ()), ("extra", "<u8")], align=True)
    with pytest.raises(FeatureMissing, match=r"port\.extra is only here"):
        check(types, {"port": longer})
    shifted = np.dtype([("before", "<u8"), *((name, PORT[name]) for name in PORT.names or ())], align=True)
    with pytest.raises(FeatureMissing, match=r"port\.word is at 0, not 8"):
        check(types, {"port": shifted})
    with pytest.raises(FeatureMissing, match="struct nowhere is not there"):
        check(types, {"nowhere": PORT})


def test_constants_are_the_header_s() -> None:
    text = (BPF_SOURCES / "lib" / "types.h").read_text()
    written = dict(re.findall(r"^\t([A-Z][A-Z0-9_]+) = (\d+),", text, re.M))
    assert len(written) > 50
    assert {name: getattr(C, name) for name in written} == {name: int(value) for name, value in written.items()}
    macros = re.findall(r"^\tABI_(\w+) = (\w+),", (BPF_SOURCES / "lib" / "abi.h").read_text(), re.M)
    values = dict(re.findall(r"^#define (\w+)\s+(\w+)", text, re.M))
    assert macros
    assert {name: getattr(C, name) for name, _ in macros} == {name: int(values[macro], 0) for name, macro in macros}
    assert C.PORT_F_TRACE == 1 << 2
    assert C.named("DROP_")[C.DROP_POLICY] == "POLICY"
    with pytest.raises(AttributeError, match="NO_SUCH"):
        _ = C.NO_SUCH


def test_every_structure_of_the_kernel_side_is_exact(types: btf.Btf) -> None:
    assert types.structures["ct_key"]["lport"] == np.dtype(">u2")
    for name, declared in STRUCTURES.items():
        assert types.structures[name].itemsize == declared.itemsize


def test_an_object_without_types_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureMissing, match="not there"):
        btf.read_object(tmp_path / "none.o")
    (tmp_path / "text").write_text("no ELF")
    with pytest.raises(FeatureMissing, match="no BTF"):
        btf.read_object(tmp_path / "text")
