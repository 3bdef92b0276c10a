"""Kind `mirror`: copies of what passes a port, and where they go. One record a mirror.

Outputs, by the field `output`: "device" a network device of the host that the VM runs on; "port" the port of another
VM, wherever either of the two runs; "network" the VLAN of an uplink network; "remote" an address that takes VXLAN.
A record without a name, with output ACCEPT, is no mirror: it says that the port takes copies of others, which pass its
policy; one that does not say so gets none.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from datapath.state.document import TEXT_MAX, Document
from datapath.state.kind import Kind, Nature, Record

MIRRORS_MAX = 8
"""Of one port."""
SNAP_MIN = 64
ACCEPT = "accept"
VNI_MAX = (1 << 24) - 1


class Remote(BaseModel):
    """An address that takes VXLAN on the switch's tunnel port, and the VNI that copies get."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=TEXT_MAX)

    address: str
    vni: int = Field(ge=1, le=VNI_MAX)

    @model_validator(mode="after")
    def _is_address(self) -> Self:
        ipaddress.ip_address(self.address)
        return self


class Output(BaseModel):
    """Where copies go: exactly one of its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=TEXT_MAX)

    device: str = Field(default="", max_length=64)
    port: str = Field(
        default="", pattern=r"^$|^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/[0-9a-f]{2}(:[0-9a-f]{2}){5}$"
    )
    network: str = ""
    remote: Remote | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in ("device", "port", "network", "remote") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"one of device, port, network and remote was expected, not {' and '.join(given) or 'none'}"
            )
        return self

    def fields(self) -> Record:
        """As fields of a record."""
        vm, _, mac = self.port.partition("/")
        remote = self.remote or Remote(address="0.0.0.0", vni=1)
        fields: Record = {"device": self.device, "vm": vm, "mac": mac, "network": self.network}
        fields["output"] = next(name for name in ("device", "port", "network", "remote") if getattr(self, name))
        there = fields["output"] == "remote"
        return {**fields, "address": remote.address if there else "", "vni": remote.vni if there else 0}


def _size(value: object) -> object:
    """Bytes as people write them: 128, "128", "128B", "1KiB"."""
    found = re.fullmatch(r"(\d+)\s*(B|KiB)?", value) if isinstance(value, str) else None
    if isinstance(value, str) and found is None:
        raise ValueError(f'a number of bytes was expected, as 128 or "1KiB", not {value!r}')
    return int(found[1]) * (1024 if found[2] == "KiB" else 1) if found else value


Vlan = Annotated[int, Field(ge=0, le=4094)]


class Session(BaseModel):
    """One mirror. `vlans`: only frames with these tags, 0 those without one; all when none is named."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=TEXT_MAX)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,63}$")
    direction: Literal["from", "to", "both"] = "both"
    vlans: tuple[Vlan, ...] = ()
    snap: Annotated[int, BeforeValidator(_size)] = Field(default=0, le=65_535)
    output: Output

    @model_validator(mode="after")
    def _is_long_enough(self) -> Self:
        if 0 < self.snap < SNAP_MIN:
            raise ValueError(
                f"snap: {self.snap} bytes do not hold a frame's headers, {SNAP_MIN} were expected at least"
            )
        return self

    def record(self) -> Record:
        return {
            "name": self.name,
            "direction": self.direction,
            "vlans": sorted(set(self.vlans)),
            "snap_bytes": self.snap,
            **self.output.fields(),
        }


class MirrorDocument(Document):
    """`mirror` at a port: its mirrors, and whether it is the output of others."""

    sessions: tuple[Session, ...] = Field(default=(), max_length=MIRRORS_MAX)
    takes_copies: bool = False

    @model_validator(mode="after")
    def _are_distinct(self) -> Self:
        names = [session.name for session in self.sessions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"mirror {twice[0]} is there twice: each has a name of its own")
        return self

    def records(self) -> list[Record]:
        return [*(session.record() for session in self.sessions), *([_accept()] if self.takes_copies else [])]


def _accept() -> Record:
    texts = dict.fromkeys(("name", "device", "vm", "mac", "network", "address"), "")
    return {**texts, "direction": "to", "vlans": [], "snap_bytes": 0, "output": ACCEPT, "vni": 0}


MIRROR = Kind(
    name="mirror",
    version=1,
    nature=Nature.CONFIGURATION | Nature.ACCOUNTING,
    key=("name",),
    fields={
        "name": (str,),  # "" with output ACCEPT
        "direction": (str,),  # what the guest sends, what it gets, or both
        "vlans": (list,),  # ids of the tags on the guest's wire, 0 untagged; [] all
        "snap_bytes": (int,),  # so much of each frame is copied; 0 all
        "output": (str,),
        "device": (str,),  # output "device": name, or pattern of it with * and ?
        "vm": (str,),  # output "port": uuid
        "mac": (str,),
        "network": (str,),  # output "network": name of an uplink network; its VLAN is the copies' outer tag
        "address": (str,),  # output "remote"
        "vni": (int,),
        "packets": (int,),  # accounting: frames copied, segments of a GSO frame one by one
        "bytes": (int,),  # accounting: of these frames, before they were cut
        "dropped": (int,),  # accounting: frames that the output did not take
    },
    accounting=("packets", "bytes", "dropped"),
    defaults={"vlans": [], "snap_bytes": 0, "device": "", "vm": "", "mac": "", "network": "", "address": "", "vni": 0},
    choices={
        "direction": frozenset({"from", "to", "both"}),
        "output": frozenset({"device", "port", "network", "remote", ACCEPT}),
    },
    document=MirrorDocument,
)


def output_text(record: Record) -> str:
    """A mirror's output as an operator names it."""
    if record["output"] == "port":
        return f"port {record['vm']}/{record['mac']}"
    if record["output"] == "remote":
        return f"VNI {record['vni']} at {record['address']}"
    return f"{record['output']} {record[record['output']]}"


def copy_name(vm: str, mac: str) -> tuple[int, int]:
    """36 bits that stand for a port in a copy between hosts: tunnel id (24 bits, not 0) and port bits of the mark (12).

    The same on every host, so that nobody has to be told: whose mirror it is knows them, and so does where the port is.
    """
    digest = hashlib.blake2b(f"{vm}/{mac}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return (number & 0xFFFFFF) or 1, number >> 24 & 0xFFF
