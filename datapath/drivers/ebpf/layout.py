"""The switch's data model as NumPy dtypes and constants: datapath/bpf/lib/types.h, where every field is explained.

Layouts are declared here for readers and type checkers and compared with the object's BTF at load (`check`): sizes,
offsets, formats and byte order of every field. Constants are not repeated: `C.PORT_STAGED` is the enumerator in BTF.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from datapath.drivers.ebpf.btf import Btf, read_object
from datapath.errors import FeatureMissing

_Fields = list[tuple[str, str] | tuple[str, str, int] | tuple[str, np.dtype[Any]]]

STRUCTURES: dict[str, np.dtype[Any]] = {}
"""Name in C -> declared layout."""


def _structure(name: str, fields: _Fields) -> np.dtype[Any]:
    STRUCTURES[name] = np.dtype(fields, align=True)
    return STRUCTURES[name]


PORT = _structure(
    "port",
    [
        ("word", "<u8"),
        ("commit", "<u8"),
        ("gate", "<u8"),
        ("held_to", "<i8"),
        ("held_from", "<i8"),
        ("lease", "<u8"),
        ("time_base", "<u8"),
        ("time_floor", "<u8"),
        ("redirected", "<u8"),
        ("slot", "<u4"),
        ("ifindex", "<u4"),
        ("hold_to", "<u4"),
        ("hold_from", "<u4"),
        ("network", "<u4"),
        ("policy", "<u4"),
        ("channel", "<u4"),
        ("remote", "<u4"),
        ("learned", "<u4"),
        ("learned_max", "<u4"),
        ("mac", "u1", 6),
        ("mtu", "<u2"),
        ("timeouts", "<u4", 16),
        ("alarm_full", "<u4"),
        ("evicted", "<u4"),
        ("features", "<u4"),
        ("address", ">u4"),
    ],
)
DEVICE = _structure("device", [("slot", "<u4"), ("role", "<u4")])
ADDRESS_KEY = _structure("address_key", [("slot", "<u4"), ("addr", ">u4", 4)])
NETWORK = _structure(
    "network",
    [("kind", "<u4"), ("uplink", "<u4"), ("vni", "<u4"), ("vid", "<u2"), ("mtu", "<u2"), ("drops", "<u8")],
)
UPLINK_KEY = _structure("uplink_key", [("ifindex", "<u4"), ("vid", "<u2"), ("pad", "<u2")])
TRUNK_KEY = _structure("trunk_key", [("slot", "<u4"), ("vid", "<u2"), ("pad", "<u2")])
L2_KEY = _structure("l2_key", [("network", "<u4"), ("mac", "u1", 6), ("pad", "<u2")])
L2_ENTRY = _structure(
    "l2_entry",
    [
        ("kind", "u1"),
        ("flags", "u1"),
        ("vlan", "<u2"),
        ("target", "<u4"),
        ("seen", "<u8"),
        ("moves", "<u4"),
        ("away", "<u4"),
    ],
)
LEARNING = _structure("learning", [("count", "<u4"), ("max", "<u4")])
HOST = _structure("host", [("addr", ">u4", 4)])
CHANNEL = _structure("channel", [("from", ">u4", 4), ("slot", "<u4"), ("epoch", "<u4")])
MEMBER = _structure("member", [("kind", "u1"), ("pad", "u1"), ("vlan", "<u2"), ("target", "<u4")])
CT_KEY = _structure(
    "ct_key",
    [
        ("laddr", ">u4", 4),
        ("raddr", ">u4", 4),
        ("lport", ">u2"),
        ("rport", ">u2"),
        ("proto", "u1"),
        ("type", "u1"),
        ("from", "u1"),
        ("pad", "u1"),
    ],
)
CT_ENTRY = _structure(
    "ct_entry",
    [
        ("word", "<u8"),
        ("seen", "<u8"),
        ("id", "<u8"),
        ("judged", "<u4"),
        ("mark", "<u4"),
        ("packets", "<u8", 2),
        ("bytes", "<u8", 2),
        ("carried_packets", "<u8", 2),
        ("carried_bytes", "<u8", 2),
        ("began", "<u8"),
        ("tcp_flags", "<u4"),
        ("window", "<u4"),
        ("window_end", "<u4", 2),
        ("window_limit", "<u4", 2),
        ("window_acked", "<u4", 2),
        ("window_offered", "<u4", 2),
        ("label", ">u8", 2),
    ],
)
WINDOW_PORT = _structure("window_port", [("outside", "<u8", 2), ("count_only", "<u4"), ("pad", "<u4")])
FLOW_END = _structure("flow_end", [("id", "<u8"), ("key", CT_KEY), ("reason", "<u4"), ("pad", "<u4")])
FLOW_REPORT = _structure(
    "flow_report",
    [
        ("until", "<u8"),
        ("began", "<u8"),
        ("packets", "<u8", 2),
        ("bytes", "<u8", 2),
        ("tcp_flags", "<u4"),
        ("pad", "<u4"),
    ],
)
FLOW_EXPORTER = _structure(
    "flow_exporter",
    [(name, "<u8") for name in ("sequence", "began", "template", "datagrams", "records", "errors")],
)
FLOW_LOST = _structure("flow_lost", [("flows", "<u8"), ("packets", "<u8"), ("bytes", "<u8")])
REMAP_KEY = _structure(
    "remap_key", [("slot", "<u4"), ("addr", ">u4", 4), ("port", ">u2"), ("proto", "u1"), ("side", "u1")]
)
REMAP_ENTRY = _structure(
    "remap_entry",
    [
        ("addr", ">u4", 4),
        ("port", ">u2"),
        ("flags", "u1"),
        ("pad", "u1", 5),
        ("packets", "<u8"),
        ("bytes", "<u8"),
    ],
)
ACL_PREFIX = _structure("acl_prefix", [("length", "<u4"), ("direction", "u1"), ("pad", "u1", 3), ("addr", ">u4", 4)])
ACL_INTERVAL = _structure("acl_interval", [("start", "<u4"), ("row", "<u4")])
ACL_GROUP = _structure("acl_group", [("bits", "<u8", 4)])
ACL_SHAPE = _structure("acl_shape", [("rules", "<u4"), ("intervals", "<u4"), ("groups", "<u4"), ("pad", "<u4", 5)])
ACL_RULE = _structure("acl_rule", [("id", "<u4"), ("action", "u1"), ("log", "u1"), ("label", "<u2")])
ACL_LABEL = _structure(
    "acl_label",
    [
        *((name, ">u8", 2) for name in ("label", "label_mask", "set_label", "set_label_mask")),
        *((name, "<u4") for name in ("mark", "mark_mask", "set_mark", "set_mark_mask")),
    ],
)
HITS_KEY = _structure("hits_key", [("slot", "<u4"), ("rule", "<u4")])
HITS = _structure("hits", [("packets", "<u8"), ("bytes", "<u8")])
QOS = _structure(
    "qos",
    [
        ("due", "<u8"),
        ("interval", "<u8"),
        ("burst", "<u8"),
        ("dropped_packets", "<u8"),
        ("dropped_bytes", "<u8"),
        ("flags", "<u4"),
        ("priority", "<u4"),
        ("shaper", "<u4"),
        ("dscp", "u1"),
        ("pad", "u1", 3),
    ],
)
MIRROR = _structure(
    "mirror",
    [
        ("output", "u1"),
        ("directions", "u1"),
        ("vid", "<u2"),
        ("mark", "<u2"),
        ("filtered", "u1"),
        ("pad", "u1"),
        ("snap", "<u4"),
        ("target", "<u4"),
        ("id", "<u4"),
        ("remote", ">u4", 4),
        ("pad2", "<u4"),
        ("name", "<u8"),
        ("vlans", "<u8", 64),
    ],
)
MIRROR_COUNT = _structure("mirror_count", [("packets", "<u8"), ("bytes", "<u8"), ("dropped", "<u8")])
MIRROR_NAME = _structure("mirror_name", [("id", "<u4"), ("mark", "<u4")])
MIRROR_SLOTS = _structure("mirror_slots", [("newest", "<u4"), ("older", "<u4")])
COUNTERS = _structure(
    "counters",
    [
        ("packets", "<u8", 2),
        ("bytes", "<u8", 2),
        ("drops", "<u8", 64),
        ("would_drop", "<u8"),
        ("held", "<u8", 2),
        ("redirected", "<u8"),
        ("came", "<u8"),
    ],
)
EVENT = _structure(
    "event",
    [
        ("time", "<u8"),
        ("slot", "<u4"),
        ("epoch", "<u4"),
        ("ifindex", "<u4"),
        ("length", "<u4"),
        ("rule", "<u4"),
        ("type", "u1"),
        ("direction", "u1"),
        ("reason", "u1"),
        ("captured", "u1"),
        ("data", "u1", 128),
    ],
)
SAMPLING = _structure(
    "sampling",
    [
        *((name, "<u8") for name in ("pool", "next", "drops", "due")),
        *((name, "<u4") for name in ("rate", "header_bytes")),
        *((name, "<u8") for name in ("began", "datagrams", "unsent", "flow_samples", "counter_samples")),
    ],
)
SAMPLE = _structure(
    "sample",
    [
        *((name, "<u8") for name in ("pool", "drops")),
        *((name, "<u4") for name in ("slot", "epoch", "length", "segment")),
        *((name, "<u2") for name in ("size", "headers", "vlan")),
        *((name, "u1") for name in ("direction", "captured", "last")),
        ("pad", "u1", 7),
        ("data", "u1", 256),
    ],
)
SETTINGS = _structure("settings", [("tunnel", "<u4"), ("mtu", "<u4"), ("boot", "<u8")])


class Constants:
    """Enumerators of types.h by name, read from the object at first use.

    Macros that lib/abi.h names are here too, without its prefix. Raises FeatureMissing while the object is not built.
    """

    _PREFIX = "ABI_"

    @cached_property
    def _all(self) -> dict[str, int]:
        return {name.removeprefix(self._PREFIX): value for name, value in read_object().constants.items()}

    def __getattr__(self, name: str) -> int:
        if name.startswith("_") or name not in self._all:
            raise AttributeError(f"no enumerator or exported macro of types.h: {name}")
        return self._all[name]

    def named(self, prefix: str) -> dict[int, str]:
        """Value -> name without the prefix, of all that begin with it: named("DROP_")[8] == "POLICY"."""
        found = {name: value for name, value in self._all.items() if name.startswith(prefix)}
        return {value: name.removeprefix(prefix) for name, value in found.items()}


C = Constants()


def check(btf: Btf, declared: Mapping[str, np.dtype[Any]] = STRUCTURES, *, where: str = "the BPF object") -> None:
    """Compare declared layouts with BTF. Raises FeatureMissing that names each structure and field that differs."""
    found = [line for name, layout in declared.items() for line in differences(name, layout, btf.structures.get(name))]
    if found:
        shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
        raise FeatureMissing(
            f"layouts differ between {where} and this program: {shown}",
            hint="build both from one version: make bpf",
        )


def differences(name: str, ours: np.dtype[Any], theirs: np.dtype[Any] | None) -> list[str]:
    """What differs between two layouts of one structure, a phrase each; [] when they are the same."""
    if theirs is None:
        return [f"struct {name} is not there"]
    found = []
    if ours.itemsize != theirs.itemsize:
        found.append(f"{name} has {theirs.itemsize} bytes, not {ours.itemsize}")
    mine: Mapping[str, Any] = ours.fields or {}
    other: Mapping[str, Any] = theirs.fields or {}
    for field in [*mine, *(name for name in other if name not in mine)]:
        if field not in other or field not in mine:
            found.append(f"{name}.{field} is only {'here' if field in mine else 'there'}")
        elif mine[field][1] != other[field][1]:
            found.append(f"{name}.{field} is at {other[field][1]}, not {mine[field][1]}")
        elif mine[field][0] != other[field][0]:
            found.append(f"{name}.{field} is {_text(other[field][0])}, not {_text(mine[field][0])}")
    return found


def _text(dtype: np.dtype[Any]) -> str:
    return f"{dtype.base.str}{list(dtype.shape) if dtype.shape else ''}"
