"""Load the switch, or take over the one that runs: maps are reused by their pins, programs are replaced.

While it loads the old programs go on with the same maps; `attach.py` then flips each link to the new ones. Maps of
another layout cannot be reused: `differences` says so before anything is loaded, and `takeover.py` brings their
contents into maps of their own generation.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datapath.drivers.ebpf import btf, layout, libbpf, syscall
from datapath.drivers.ebpf.bpffs import MAPS, Pins, clear
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Handle, Mapped, Outer, Table, Template
from datapath.errors import FeatureMissing, KernelError

_BUILD_HINT = "build it from the same version: make bpf"
_LAYOUT_HINT = "start with the options and version that made it; an agent takes maps over: docs/upgrades.md"

_BY_SLOT = (
    *("ports", "devices", "counters", "addresses", "trunks", "channels", "conntracks", "dirty", "policies"),
    *("acl_tries", "acl_lines", "acl_rows", "acl_rules", "acl_labels", "qos", "samplings"),
    *("flow_ends", "flow_reports", "flow_exporters", "flow_lost"),
    *("mirrors", "mirror_counts", "mirror_ports"),
)
_BY_NETWORK = ("networks", "uplinks", "vnis", "floods", "learning")
_BY_HOST = ("hosts", "host_index")


@dataclass(frozen=True)
class Sizes:
    """Room of the maps. None: as the object declares it."""

    slots: int | None = None  # ports, slot 0 included; what hangs off a port grows with it
    networks: int | None = None
    hosts: int | None = None
    l2: int | None = None

    def of(self, name: str, declared: int) -> int:
        """Entries that a map gets."""
        for names, wanted, default in (
            (_BY_SLOT, self.slots, "SLOTS_DEFAULT"),
            (_BY_NETWORK, self.networks, "NETWORKS_DEFAULT"),
            (_BY_HOST, self.hosts, "HOSTS_DEFAULT"),
        ):
            if wanted is not None and name in names:
                return declared * wanted // int(getattr(C, default))
        return self.l2 if name == "l2" and self.l2 is not None else declared


class Switch:
    """The loaded switch: typed handles of its maps and descriptors of its programs.

    `fresh`: the maps were made now, so no port of an earlier run is in them.
    """

    def __init__(self, pins: Pins, types: btf.Btf) -> None:
        self.pins = pins
        self.types = types
        self.fresh = False
        self.pinned = pins.root  # directory of the programs' pins
        self._declared: dict[str, libbpf.Declared] = {}
        self._maps: dict[str, int] = {}
        self._programs: dict[str, int] = {}

    def table(self, name: str) -> Table:
        """A handle of its own; the caller closes it."""
        self._map(name)
        return Table(_duplicate(self._maps[name]), *self._layouts(name), name)

    def outer(self, name: str) -> Outer:
        return Outer(_duplicate(self._maps[name]), self.template(name), name)

    def mapped(self, name: str) -> Mapped:
        self._map(name)
        return Mapped(_duplicate(self._maps[name]), self._layouts(name)[1], name)

    def template(self, name: str) -> Template:
        """How inner maps of a map of maps are made."""
        inner = self._map(name).inner
        if inner is None:
            raise FeatureMissing(f"map {name} holds no maps")
        key, value = self._dtype(inner.key_type), self._dtype(inner.value_type)
        types = syscall.MapTypes(self._btf_id(), inner.key_type, inner.value_type)
        return Template(inner.type, key, value, inner.entries, inner.flags, types)

    def map_fd(self, name: str) -> int:
        """The switch's own descriptor, for epoll and for BPF_PROG_RUN."""
        self._map(name)
        return self._maps[name]

    def program(self, name: str) -> int:
        """Descriptor of a program, the switch's own."""
        if name not in self._programs:
            raise FeatureMissing(
                f"the BPF object has no program {name}", hint="build it from the same version: make bpf"
            )
        return self._programs[name]

    @property
    def programs(self) -> Mapping[str, int]:
        return self._programs

    @property
    def maps(self) -> list[str]:
        return sorted(self._maps)

    def structure(self, name: str) -> np.dtype[Any]:
        """Layout of a structure that the object has, such as the context of a SYSCALL program."""
        if name not in self.types.structures:
            raise FeatureMissing(f"the BPF object has no struct {name}", hint="name it in lib/abi.h")
        return self.types.structures[name]

    def call(self, name: str, context: np.ndarray[Any, np.dtype[Any]]) -> int:
        """Run a SYSCALL program on one record of its context, which it may write. Returns its result, signed."""
        run = syscall.prog_run(self.program(name), ctx=context.ctypes.data, ctx_size=context.nbytes)
        return run.retval - (1 << 32) if run.retval >> 31 else run.retval

    def keep_own_programs(self) -> None:
        """Unpin programs of all other objects."""
        self.pins.keep_programs(self.pinned.name.removeprefix("programs-"))

    def close(self) -> None:
        """Give descriptors back. What is pinned goes on."""
        for fd in (*self._maps.values(), *self._programs.values()):
            os.close(fd)
        self._maps.clear()
        self._programs.clear()

    def _btf_id(self) -> int:
        """The object's types as the kernel has them; they live as long as its programs."""
        return syscall.prog_info(next(iter(self._programs.values()))).btf_id

    def _layouts(self, name: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Of keys and values."""
        made = self._map(name)
        return self._dtype(made.key_type), self._dtype(made.value_type)

    def _map(self, name: str) -> libbpf.Declared:
        if name not in self._declared:
            raise FeatureMissing(f"the BPF object has no map {name}", hint=_BUILD_HINT)
        return self._declared[name]

    def _dtype(self, number: int) -> np.dtype[Any]:
        dtype = self.types.dtype(number)
        if dtype is None:
            raise FeatureMissing(f"type {number} of the BPF object has no fixed layout")
        return dtype


def load(pins: Pins, sizes: Sizes | None = None, path: Path = btf.OBJECT) -> Switch:
    """Load the object at `path`; maps pinned under `pins` are reused, and so are programs of the very same object.

    Raises FeatureMissing (not built; layouts differ, named), KernelError (with libbpf's last lines; a pinned map that
    does not fit, named). A load that fails leaves pins and running programs as they were.
    """
    types = btf.read_object(path)
    layout.check(types)
    opened = libbpf.Object(path, pins.maps)
    switch = Switch(pins, types)
    try:
        _resize(opened, sizes or Sizes())
        switch._declared = {one.name: one for one in opened.maps() if one.pin}
        found = [line for declared in switch._declared.values() for line in _pinned_differences(declared, types)]
        if found:
            raise KernelError("; ".join(found[:8]), errno.EINVAL, hint=_LAYOUT_HINT)
        switch.fresh = not (pins.maps / "settings").exists()
        programs = switch.pinned = pins.programs(_digest(path, switch._declared))
        if not _take_over(switch, opened, programs):
            _load(opened, running=not switch.fresh)
            switch._maps = {name: _duplicate(opened.map_fd(name)) for name in switch._declared}
            switch._programs = {name: _duplicate(fd) for name, fd in opened.programs().items()}
            _pin_programs(switch, programs)
        _mark_boot(switch)
    except BaseException:
        switch.close()
        raise
    finally:
        opened.close()
    return switch


def _resize(opened: libbpf.Object, sizes: Sizes) -> None:
    for declared in list(opened.maps()):
        entries = sizes.of(declared.name, declared.entries)
        if entries != declared.entries:
            opened.resize(declared.name, entries)


def differences(pins: Pins, sizes: Sizes | None = None, path: Path = btf.OBJECT) -> list[str]:
    """Why pinned maps cannot be reused by the object at `path`, a phrase each; [] when they can, or none are there."""
    types = btf.read_object(path)
    opened = libbpf.Object(path, pins.maps)
    try:
        _resize(opened, sizes or Sizes())
        declared = [one for one in opened.maps() if one.pin]
        return [line for one in declared for line in _pinned_differences(one, types)]
    finally:
        opened.close()


def _pinned_differences(declared: libbpf.Declared, types: btf.Btf) -> list[str]:
    """How shape, layouts and meanings of the pinned map, if there is one, differ from what the object wants."""
    if declared.pin is None or not declared.pin.exists():
        return []
    with _opened(declared.pin) as fd:
        there = syscall.map_info(fd)
    shape = (there.type, there.key_size, there.value_size, there.max_entries, there.flags)
    wanted = (declared.type, declared.key_size, declared.value_size, declared.entries, declared.flags)
    if shape != wanted:
        text = "(type, key size, value size, entries, flags)"
        return [f"pinned map {declared.name} is {shape}, not {wanted} {text}"]
    if not there.btf_id:
        return []
    pinned = btf.parse(syscall.btf_data(there.btf_id))
    found = [] if declared.name != "ports" else _revisions(pinned, types)
    for ours, theirs in ((declared.key_type, there.btf_key_type_id), (declared.value_type, there.btf_value_type_id)):
        mine, other = types.dtype(ours), pinned.dtype(theirs)
        found += layout.differences(types.types[ours].name, mine, other) if mine is not None else []
    return [f"pinned map {declared.name}: {line}" for line in found]


def _revisions(pinned: btf.Btf, types: btf.Btf) -> list[str]:
    """Programs of versions that understand the same layouts otherwise share no maps."""
    there, here = (one.constants.get("ABI_REVISION", 1) for one in (pinned, types))
    return [f"revision {there}, not {here}"] if there != here else []


def _load(opened: libbpf.Object, *, running: bool) -> None:
    """Raises KernelError; `running`: programs of an earlier run go on then."""
    try:
        opened.load()
    except KernelError as error:
        if running:
            error.hint += "; the programs that were here go on"
        raise


def _digest(path: Path, declared: Mapping[str, libbpf.Declared]) -> str:
    """Stands for an object and the sizes of its maps."""
    sizes = ",".join(f"{name}={one.entries}" for name, one in sorted(declared.items()))
    return hashlib.sha256(path.read_bytes() + sizes.encode()).hexdigest()[:16]


def _take_over(switch: Switch, opened: libbpf.Object, programs: Path) -> bool:
    """Use the pinned maps and programs of this very object: the verifier's seconds are spared. False: not all there."""
    pins = {name: one.pin for name, one in switch._declared.items() if one.pin and one.pin.exists()}
    if len(pins) != len(switch._declared) or not programs.is_dir():
        return False
    switch._maps = {name: syscall.obj_get(pin) for name, pin in pins.items()}
    switch._programs = {name: syscall.obj_get(programs / name) for name in opened.programs()}
    return True


def _pin_programs(switch: Switch, programs: Path) -> None:
    """The directory appears with all programs in it."""
    unfinished = programs.with_name(f"{programs.name}-new")
    clear(unfinished)
    unfinished.mkdir()
    for name, fd in switch._programs.items():
        syscall.obj_pin(fd, unfinished / name)
    clear(programs)
    unfinished.rename(programs)
    if switch.pins.generation == MAPS:
        switch.keep_own_programs()


def _mark_boot(switch: Switch) -> None:
    """A number that tells these maps from those before a reboot or a destroy."""
    with switch.table("settings") as settings:
        record = settings.get(0)
        if record is not None and not record["boot"]:
            record["boot"] = secrets.randbits(63) | 1
            settings.set(0, record)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = Handle()
    handle.fd = syscall.obj_get(path)
    with handle:
        yield handle.fd


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
