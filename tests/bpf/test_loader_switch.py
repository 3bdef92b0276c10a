# SPDX-License-Identifier: GPL-2.0-only
"""Loading, taking over and taking down a switch, on a bpffs of the test's own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datapath.drivers.ebpf import bpffs, loader, syscall
from datapath.drivers.ebpf.adopted import Adopted
from datapath.drivers.ebpf.bpffs import NEXT, Pins
from datapath.drivers.ebpf.layout import CT_KEY, EVENT, L2_KEY, PORT, C
from datapath.drivers.ebpf.loader import Sizes
from datapath.errors import DatapathError, FeatureMissing, KernelError

from .harness import compile_object

SOURCE = Path(__file__).with_name("small.bpf.c")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_object(SOURCE, tmp_path_factory.mktemp("small") / "small.bpf.o")


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Pins]:
    path = tmp_path / "bpf"
    made = bpffs.pins(f"test-{os.getpid()}", path)
    try:
        yield made
    finally:
        made.clear()
        bpffs.unmount(path)
        assert not bpffs.is_bpffs(path)


def test_a_fresh_switch_is_pinned_and_typed(pins: Pins, small: Path) -> None:
    switch = loader.load(pins, path=small)
    assert switch.fresh
    assert {"maps/ports", "maps/conntracks"} <= set(pins.names())
    assert {name.split("/")[1] for name in pins.names() if name.startswith("programs-")} == set(switch.programs)
    with switch.table("l2") as l2, switch.outer("conntracks") as conntracks, switch.mapped("ports") as ports:
        assert l2.key == L2_KEY
        assert conntracks.template.key == CT_KEY
        assert ports.value == PORT
        assert conntracks.entries == C.SLOTS_DEFAULT
    assert switch.structure("event").itemsize == EVENT.itemsize
    switch.close()


def test_a_restart_finds_what_was_there(pins: Pins, small: Path) -> None:
    first = loader.load(pins, path=small)
    with first.mapped("ports") as ports, first.outer("conntracks") as conntracks, first.table("settings") as settings:
        ports.store(3, "word", 0x0000_0005_0000_0002)
        with conntracks.new(4096) as table:
            table.set(np.zeros((), CT_KEY), np.zeros((), table.value))
            conntracks.put(3, table)
        boot = settings.get(0)["boot"]
    assert boot
    first.close()
    second = loader.load(pins, path=small)
    assert not second.fresh
    with (
        second.mapped("ports") as ports,
        second.outer("conntracks") as conntracks,
        second.table("settings") as settings,
    ):
        assert ports.load(3, "word") == 0x0000_0005_0000_0002
        with conntracks.inner(3) as table:  # type: ignore[union-attr]
            assert len(table.keys()) == 1
    second.close()


def test_inner_tables_have_the_types_of_their_template(pins: Pins, small: Path) -> None:
    """Linux 6.1 takes none without, whoever loaded the programs."""
    for _ in ("loaded", "taken over"):
        switch = loader.load(pins, path=small)
        with switch.outer("conntracks") as conntracks, conntracks.new(4096) as table, switch.table("l2") as l2:
            assert table.info.btf_id == l2.info.btf_id != 0
            inner = switch.template("conntracks").types
            assert inner == syscall.MapTypes(l2.info.btf_id, table.info.btf_key_type_id, table.info.btf_value_type_id)
            names = [switch.types.types[type_].name for type_ in (inner.key, inner.value)]
            assert names == ["ct_key", "ct_entry"]
        switch.close()


def test_programs_of_the_same_object_are_taken_over(pins: Pins, small: Path, tmp_path: Path) -> None:
    first = loader.load(pins, path=small)
    second = loader.load(pins, path=small)
    ids = {name: syscall.prog_info(fd).id for name, fd in first.programs.items()}
    assert {name: syscall.prog_info(fd).id for name, fd in second.programs.items()} == ids
    newer = compile_object(SOURCE, tmp_path / "newer.o", "-DVERSION=2")
    third = loader.load(pins, path=newer)
    assert not set(ids.values()) & {syscall.prog_info(fd).id for fd in third.programs.values()}
    directories = {name.split("/")[0] for name in pins.names()}
    assert len(directories) == 2, f"programs of one object only: {directories}"
    (pins.maps / "l2").unlink()
    fourth = loader.load(pins, path=newer)
    assert (pins.maps / "l2").exists()
    assert fourth.programs.keys() == third.programs.keys()
    for switch in (first, second, third, fourth):
        switch.close()


def test_sizes_scale_what_hangs_off_ports(pins: Pins, small: Path) -> None:
    switch = loader.load(pins, Sizes(slots=64, networks=16, hosts=8, l2=512), small)
    entries = {}
    for name in ("ports", "devices", "addresses", "networks", "hosts", "l2"):
        with switch.table(name) as table:
            entries[name] = table.entries
    assert entries == {"ports": 64, "devices": 256, "addresses": 4096, "networks": 16, "hosts": 8, "l2": 512}
    switch.close()
    with pytest.raises(KernelError, match=r"pinned map \w+ is .*\b64\b.*, not") as raised:
        loader.load(pins, path=small)
    assert "upgrades.md" in raised.value.hint
    loader.load(pins, Sizes(slots=64, networks=16, hosts=8, l2=512), small).close()


def test_pinned_maps_of_another_layout_are_named(pins: Pins, tmp_path: Path) -> None:
    headers = tmp_path / "lib"
    headers.mkdir()
    for header in (SOURCE.parents[2] / "datapath" / "bpf" / "lib").glob("*.h"):
        (headers / header.name).write_text(header.read_text().replace("__u32 channel;", "__u32 channels;"))
    source = tmp_path / "small.bpf.c"
    source.write_text(SOURCE.read_text())
    other = compile_object(source, tmp_path / "other.bpf.o")
    with pytest.raises(FeatureMissing, match=r"port\.channel is only here"):
        loader.load(pins, path=other)
    assert not any(name.startswith("maps/") for name in pins.names()), "nothing is made before the check"


def test_pinned_maps_of_an_older_object_are_named(pins: Pins, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.load(pins, path=small).close()
    types = loader.btf.parse
    monkeypatch.setattr(loader.btf, "parse", lambda raw: types(raw.replace(b"redirected\0", b"deflected!\0")))
    monkeypatch.setattr(loader.btf, "read_object", lambda path: types(loader.btf._section(path.read_bytes(), b".BTF")))
    with pytest.raises(KernelError, match=r"pinned map \w+: .*redirected is only here"):
        loader.load(pins, path=small)


def test_the_verifier_s_words_are_in_the_error(pins: Pins, tmp_path: Path) -> None:
    refused = compile_object(SOURCE, tmp_path / "refused.bpf.o", "-DREFUSED")
    with pytest.raises(KernelError, match="invalid access to packet") as raised:
        loader.load(pins, path=refused)
    assert raised.value.hint
    assert not pins.names(), "a failed load leaves no pins"


def test_programs_that_cannot_be_loaded_leave_those_that_run(pins: Pins, small: Path, tmp_path: Path) -> None:
    """And the error says so."""
    switch = loader.load(pins, path=small)
    before = pins.names()
    with pytest.raises(KernelError, match="invalid access to packet") as raised:
        loader.load(pins, path=compile_object(SOURCE, tmp_path / "refused.bpf.o", "-DREFUSED"))
    assert "the programs that were here go on" in raised.value.hint
    assert pins.names() == before
    again = loader.load(pins, path=small)
    ids = [{name: syscall.prog_info(fd).id for name, fd in one.programs.items()} for one in (switch, again)]
    assert ids[0] == ids[1]
    switch.close()
    again.close()


def test_differences_are_named_before_anything_is_loaded(pins: Pins, small: Path) -> None:
    assert loader.differences(pins, path=small) == []
    loader.load(pins, path=small).close()
    before = pins.names()
    assert loader.differences(pins, path=small) == []
    found = loader.differences(pins, Sizes(slots=64), small)
    assert any(re.match(r"pinned map ports is .*\b1024\b.*, not .*\b64\b", line) for line in found)
    assert pins.names() == before


def test_a_switch_is_read_by_its_own_types(pins: Pins, small: Path) -> None:
    """Also beside programs of another object that are pinned for the next maps."""
    first = loader.load(pins, path=small)
    following = pins.of(NEXT)
    following.make()
    second = loader.load(following, Sizes(slots=64), small)
    with first.mapped("ports") as ports:
        ports.store(3, "word", 5 << 32 | 2)
    adopted = Adopted(pins)
    with adopted.mapped("ports") as ports, adopted.outer("conntracks") as conntracks:
        assert ports.load(3, "word") == 5 << 32 | 2 and len(ports.view) == C.SLOTS_DEFAULT
        assert conntracks.template.key == CT_KEY
        with conntracks.new(16) as table:
            conntracks.put(3, table)
    ids = [syscall.prog_info(one.program("from_port")).id for one in (first, adopted, second)]
    assert ids[0] == ids[1] != ids[2]
    for switch in (first, second, adopted):
        switch.close()


def test_a_name_that_is_not_there_is_an_error(pins: Pins, small: Path) -> None:
    switch = loader.load(pins, path=small)
    for missing in (switch.program, switch.table, switch.structure, switch.template):
        with pytest.raises(FeatureMissing, match="nothing"):
            missing("nothing")
    switch.close()
    with pytest.raises(DatapathError, match=r"a\.b"):
        bpffs.pins("a.b", pins.root)
