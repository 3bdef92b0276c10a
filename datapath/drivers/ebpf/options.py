"""The driver's table of the agent's configuration."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datapath.drivers.ebpf.devices import TUNNEL_PORT
from datapath.drivers.ebpf.tun import NAME_MAX
from datapath.errors import DatapathError

_SLOTS_LIMIT = 65_536


@dataclass(frozen=True)
class Options:
    """Defaults are for one switch on a host; several on one kernel (tests) differ in `instance` and `state_dir`."""

    host: str = ""  # this host's name in the cluster, as set_hosts has it
    instance: str = "0"  # in the name of the pins' directory and of hold taps
    bpffs: str = ""  # where a bpffs is or shall be mounted; "" the system's
    state_dir: str = "/var/lib/migrator/ebpf"
    underlay: str = ""  # this host's address between hosts; "" no overlay networks and no redirects
    underlay_mtu: int = 0  # 0: that of the interface with the underlay address
    uplinks: tuple[str, ...] = ()  # interfaces that networks may go out by
    tunnel: str = "mgr0"  # name of the vxlan device
    tunnel_port: int = TUNNEL_PORT
    slots: int = 1024  # ports + 1
    networks: int = 4096
    hosts: int = 4096
    l2: int = 262_144
    sweep_interval_s: float = 5.0
    keeper: bool = True  # a process keeps held frames while the agent is down

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Options:
        """Raises DatapathError naming the option that is not one, or that cannot be."""
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(table) - set(known))
        if unknown:
            raise _wrong(f"option {unknown[0]!r} of the ebpf driver", f"there are {', '.join(sorted(known))}")
        values = {name: _typed(name, value, getattr(cls(), name)) for name, value in table.items()}
        options = cls(**values)
        options._check()
        return options

    def _check(self) -> None:
        longest = len(f"{self.tap_prefix}{self.slots - 1}t")
        if not self.instance.isalnum() or not self.instance.isascii() or longest > NAME_MAX:
            room = len(self.instance) + NAME_MAX - longest
            raise _wrong(f"instance {self.instance!r}", f"up to {room} letters and digits: it is in names of devices")
        if self.underlay:
            try:
                ipaddress.ip_address(self.underlay)
            except ValueError as error:
                raise _wrong(f"underlay: {error}", "this host's address between hosts") from error
        if not 0 < len(self.tunnel) <= NAME_MAX:
            raise _wrong(f"tunnel {self.tunnel!r}", f"a device name has up to {NAME_MAX} characters")
        if not 2 <= self.slots <= _SLOTS_LIMIT:
            raise _wrong(f"slots {self.slots}", f"2..{_SLOTS_LIMIT}")
        if self.sweep_interval_s <= 0:
            raise _wrong(f"sweep_interval_s {self.sweep_interval_s}", "more than 0")

    @property
    def tap_prefix(self) -> str:
        """Of hold taps: a slot and a letter follow."""
        return f"mh{self.instance}-"

    @property
    def state(self) -> Path:
        return Path(self.state_dir)


def _typed(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        good = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        value = tuple(value) if good else value
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
    elif isinstance(default, str):
        good = isinstance(value, str | Path)
        value = str(value)
    else:
        good = type(value) is type(default)
    if not good:
        raise _wrong(f"option {name} of the ebpf driver is {value!r}", f"a {type(default).__name__}")
    return value


def _wrong(what: str, hint: str) -> DatapathError:
    return DatapathError(what, hint=hint)
