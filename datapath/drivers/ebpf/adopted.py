"""The switch as it is pinned, of whatever version it is: its maps and control programs, read by their own BTF."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from datapath.drivers.ebpf import btf, syscall
from datapath.drivers.ebpf.bpffs import Pins
from datapath.drivers.ebpf.libbpf import Declared
from datapath.drivers.ebpf.loader import Switch
from datapath.drivers.ebpf.maps import U32
from datapath.drivers.ebpf.uapi import MapType
from datapath.errors import FeatureMissing

MAPS_OF_MAPS = (MapType.ARRAY_OF_MAPS, MapType.HASH_OF_MAPS)
_CONTROL = "port_cas"  # every version has it, and it uses `ports`


class Adopted(Switch):
    """Layouts are those of whoever made the maps: read fields by name."""

    def __init__(self, pins: Pins) -> None:
        """Raises FeatureMissing when no programs are pinned with the maps: nothing can be read then."""
        programs = _programs(pins)
        super().__init__(pins, _types(programs[_CONTROL]))
        self._programs = programs
        try:
            for pin in sorted(pins.maps.iterdir()):
                self._maps[pin.name] = syscall.obj_get(pin)
                self._declared[pin.name] = self._found(pin)
        except BaseException:
            self.close()
            raise

    def kind(self, name: str) -> int:
        """enum bpf_map_type of a map."""
        return self._declared[name].type

    def _found(self, pin: Path) -> Declared:
        info = syscall.map_info(self._maps[pin.name])
        return Declared(
            pin.name,
            info.type,
            info.key_size,
            info.value_size,
            info.max_entries,
            info.flags,
            info.btf_key_type_id,
            info.btf_value_type_id,
            pin,
            self._inner(pin.name) if info.type in MAPS_OF_MAPS else None,
        )

    def _inner(self, name: str) -> Declared:
        found = self.types.inner_map(name)
        if found is None:
            raise FeatureMissing(f"the pinned map {name} does not say what its tables are")
        key, value = (_size(self.types.dtype(number)) for number in (found.key, found.value))
        return Declared(name, found.type, key, value, found.entries, found.flags, found.key, found.value, None, None)

    def _layouts(self, name: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
        info = syscall.map_info(self._maps[name])
        if not info.btf_id:
            return U32, U32
        types = _parsed(info.btf_id)
        found = [types.dtype(number) for number in (info.btf_key_type_id, info.btf_value_type_id)]
        if found[0] is None or found[1] is None:
            raise FeatureMissing(f"the pinned map {name} has no fixed layout")
        return found[0], found[1]


def _size(layout: np.dtype[Any] | None) -> int:
    return 0 if layout is None else layout.itemsize


def _programs(pins: Pins) -> dict[str, int]:
    """Those that use these maps: of another generation, or of an object that was to come, some may be pinned too."""
    with _opened(pins.maps / "ports") as ports:
        wanted = syscall.map_info(ports).id
    for directory in sorted(pins.root.glob("programs-*")):
        if not (directory / _CONTROL).exists():
            continue
        with _opened(directory / _CONTROL) as program:
            fits = wanted in syscall.prog_maps(program)
        if fits:
            return {path.name: syscall.obj_get(path) for path in sorted(directory.iterdir())}
    raise FeatureMissing(
        f"no programs are pinned at {pins.root} for the maps there",
        hint="move the host's VMs away and reboot it; what is attached goes on until then",
    )


@contextlib.contextmanager
def _opened(pin: Path) -> Iterator[int]:
    fd = syscall.obj_get(pin)
    try:
        yield fd
    finally:
        os.close(fd)


def _types(program: int) -> btf.Btf:
    return _parsed(syscall.prog_info(program).btf_id)


@cache
def _parsed(btf_id: int) -> btf.Btf:
    return btf.parse(syscall.btf_data(btf_id))
