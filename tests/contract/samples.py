"""Records of every kind that tests load, dump, store and compare. A new kind adds its row to SAMPLES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.registry import KINDS
from datapath.state.conntrack import ASSURED, INBOUND, REPLIED, STATES
from datapath.state.fdb import STATIC
from datapath.state.flow_export import COUNTS, FlowExportDocument
from datapath.state.flows import NEVER
from datapath.state.kind import Op, Record, Table, empty_columns

MAC = "02:00:00:00:00:01"
PORT_TIME_NS = 3_600_000_000_000
"""The port's clock in samples: an hour, so that no age reaches before its beginning."""


def sample(kind: str, count: int) -> Table:
    """A table to load with `count` records (one for a port) of `kind`: the same ones each time."""
    return SAMPLES[kind](count)


def port_record(**changes: Any) -> Record:
    """A port's record with every field, on network `blue`."""
    return {
        "mac": MAC,
        "network": "blue",
        "addresses": ["10.0.0.5", "2001:db8::5"],
        "antispoof": True,
        "learning": False,
        "trunk": {},
        "mtu": 1500,
        "connections_max": 65_536,
        "learned_max": 64,
        "timeouts_ms": {"udp": 45_000},
        "policy": "web",
        "revision": 7,
        **changes,
    }


def _port(count: int) -> Table:  # noqa: ARG001
    return Table("port", records=[port_record()], port_time_ns=PORT_TIME_NS)


def _acl(count: int) -> Table:
    protocols: list[Any] = ["tcp", "udp", "icmp", "any", 47]
    rules = [
        {
            "id": number + 1,
            "direction": ("to", "from")[number % 2],
            "priority": 100 + number // 4,
            "protocol": protocols[number % 5],
            "remote": [["10.0.0.0/8", "2001:db8::/32"], [], [f"192.0.2.{number % 256}/32"]][number % 3],
            "ports": [[80, 80], [8000 + number % 1000, 9000]] if number % 5 < 2 else [],
            "icmp": [8, 0] if number % 5 == 2 else [],
            "action": ("allow", "drop", "reject")[number % 3],
            "log": number % 7 == 0,
            "hits": number * 3,
            "hit_bytes": number * 300,
        }
        for number in range(count)
    ]
    return Table("acl", records=rules, port_time_ns=PORT_TIME_NS)


def _fdb(count: int) -> Table:
    columns = empty_columns(KINDS["fdb"], count)
    numbers = np.arange(count, dtype=">u4")
    macs = np.zeros((count, 6), dtype="u1")
    macs[:, 0], macs[:, 1] = 0x06, 0x11
    macs[:, 2:] = numbers.view("u1").reshape(count, 4)
    columns["mac"] = macs.view("V6").ravel()
    columns["flags"][::5] = STATIC
    columns["age_ns"] = (numbers.astype("<u8") % 200) * 1_000_000_000
    columns["moves"] = numbers.astype("<u4") % 3
    return Table("fdb", columns=columns, port_time_ns=PORT_TIME_NS)


def _remap(count: int) -> Table:
    """Whole addresses and ports of them in turn, of either family."""

    def rule(number: int) -> Record:
        pair, port = divmod(number, 2)
        v6, low = pair % 2, f"{pair >> 8 & 255}{'.:'[pair % 2]}{pair & 255}"
        return {
            "outside": f"2001:db8:1::{low}" if v6 else f"203.0.{low}",
            "inside": f"fd00::{low}" if v6 else f"10.0.{low}",
            "protocol": ("", "tcp")[port],
            "outside_port": 443 * port,
            "inside_port": 8443 * port,
            "packets_from": number,
            "packets_to": number * 2,
            "bytes_from": number * 100,
            "bytes_to": number * 200,
        }

    return Table("remap", records=[rule(number) for number in range(count)], port_time_ns=PORT_TIME_NS)


def _conntrack(count: int) -> Table:
    columns = empty_columns(KINDS["conntrack"], count)
    numbers = np.arange(count, dtype="<u4")
    tcp = numbers % 3 != 0
    columns["laddr"] = _mapped(np.full(count, 0x0A000005, dtype=">u4"))
    columns["raddr"] = _mapped((0x0B000000 + numbers).astype(">u4"))
    columns["lport"] = np.where(tcp, 443, 53).astype("<u2")
    columns["rport"] = _random(1, 1024, 65_536, count).astype("<u2")
    columns["proto"] = np.where(tcp, 6, 17).astype("u1")
    columns["state"] = np.where(tcp, STATES["ESTABLISHED"], STATES["REPLIED"]).astype("u1")
    columns["flags"] = np.where(numbers % 2, REPLIED | ASSURED | INBOUND, REPLIED | ASSURED).astype("u1")
    columns["age_ns"] = _random(2, 0, 20_000_000_000, count)
    columns["id"] = _random(3, 1, 1 << 63, count)
    columns["judged"] = np.full(count, 0xABCD1234, dtype="<u4")
    columns["mark"] = (numbers % 16).astype("<u4")
    columns["window_flags"] = (1 + numbers % 31).astype("u1")
    for name in ("window_scale_from", "window_scale_to", "window_ignored_scale"):
        columns[name] = (numbers % 16).astype("u1")
    columns["window_ignored_next"] = (numbers % 0x8000).astype("<u2")
    for seed, name in enumerate((name for name in columns if name.endswith(("_from", "_to"))), start=20):
        if columns[name].dtype == "<u4":
            columns[name] = _random(seed, 0, 1 << 32, count).astype("<u4")
    label = np.zeros((count, 2), ">u8")
    label[::3, 0], label[::5, 1] = 1 << 63, 0x77
    columns["label"] = label.view("V16").ravel()
    for seed, name in enumerate(("packets_from", "packets_to"), start=4):
        columns[name] = _random(seed, 1, 10_000, count)
    for seed, name in enumerate(("bytes_from", "bytes_to"), start=6):
        columns[name] = _random(seed, 64, 10_000_000, count)
    return Table("conntrack", columns=columns, port_time_ns=PORT_TIME_NS)


def _qos(count: int) -> Table:
    shared = {"priority": 3, "dropped_packets": 7, "dropped_bytes": 700, "debt_ns": 0}  # any other passes with time
    ways: list[Record] = [
        {"direction": "from", "mode": "shape", "rate_bps": 10**8, "burst_bytes": 10**6, "dscp": -1, **shared},
        {"direction": "to", "mode": "police", "rate_bps": 10**7, "burst_bytes": 8192, "dscp": 34, **shared},
    ]
    return Table("qos", records=ways[:count], port_time_ns=PORT_TIME_NS)


def _window(count: int) -> Table:
    record = {"protocol": "tcp", "check": "count", "outside_from": 5, "outside_to": 1 << 33}
    return Table("window", records=[record][:count], port_time_ns=PORT_TIME_NS)


def _mirror(count: int) -> Table:
    records = [
        {
            "name": f"m{number}",
            "direction": ("both", "from", "to")[number % 3],
            "vlans": [0, 7] if number % 2 else [],
            "snap_bytes": 128 if number == 4 else 0,
            "output": "device",
            "device": "lo",
            "vm": "",
            "mac": "",
            "network": "",
            "address": "",
            "vni": 0,
            "packets": number * 5,
            "bytes": number * 500,
            "dropped": number,
        }
        for number in range(count)
    ]
    return Table("mirror", records=records, port_time_ns=PORT_TIME_NS)


def _sampling(count: int) -> Table:  # noqa: ARG001
    record = {
        "sub_agent": 17,
        "agent": "10.0.0.1",
        "interface": 17,
        "network_interface": 1,
        "rate": 1000,
        "header_bytes": 128,
        "polling_s": 20,
        "collectors": [["127.0.0.1", 6343], ["::1", 6344]],
        "age_ns": 3_600_000_000_000,
        "pool": (1 << 33) + 5,
        "next": (1 << 33) + 900,
        "drops": 3,
        "datagrams": 4_000,
        "unsent": 1,
        "flow_samples": 8_000_000,
        "counter_samples": 180,
        "counters": {"packets_from": 1 << 33, "bytes_from": 1 << 40, "packets_to": 7, "bytes_to": 420},
    }
    return Table("sampling", records=[record], port_time_ns=PORT_TIME_NS)


def _flow_export(count: int) -> Table:
    records = FlowExportDocument(
        version="netflow", collectors=["192.0.2.9:2055", "[2001:db8::9]:4739"], source="192.0.2.99", active_timeout_s=30
    ).records()
    moving = {"sequence": 4711, "uptime_ms": 3_000_000, "template_age_ms": 20_000}
    counts = dict(zip(COUNTS, range(3, 99), strict=False))
    records = [{**record, **moving, **counts} for record in records[:count]]
    return Table("flow_export", records=records, port_time_ns=PORT_TIME_NS)


def _flows(count: int) -> Table:
    """Connections that have ended and are not all reported."""
    columns, known = empty_columns(KINDS["flows"], count), _conntrack(count).columns or {}
    for name in columns.keys() & known.keys():
        columns[name] = known[name]
    columns["ended"] = (np.arange(count) % 5 + 1).astype("u1")
    columns["lifetime_ns"] = columns["age_ns"] + np.uint64(60_000_000_000)
    columns["unreported_ns"] = np.where(np.arange(count) % 2, np.uint64(NEVER), columns["age_ns"])
    columns["tcp_flags_from"][::2], columns["tcp_flags_to"][::3] = 0x1B, 0x12
    for what in ("packets", "bytes"):
        for side in ("from", "to"):
            columns[f"reported_{what}_{side}"] = columns[f"{what}_{side}"] // np.uint64(3)
    return Table("flows", columns=columns, port_time_ns=PORT_TIME_NS)


def _random(seed: int, low: int, high: int, count: int) -> NDArray[np.uint64]:
    """Random numbers whose first ones are the same for every count."""
    return np.random.default_rng(seed).integers(low, high, count, dtype=np.uint64)


def _mapped(addresses: NDArray[Any]) -> NDArray[Any]:
    """IPv4 addresses (big-endian u4) as v4-mapped V16."""
    full = np.zeros((len(addresses), 16), dtype="u1")
    full[:, 10:12] = 0xFF
    full[:, 12:] = addresses.view("u1").reshape(-1, 4)
    return full.view("V16").ravel()


SAMPLES: dict[str, Callable[[int], Table]] = {
    "port": _port,
    "acl": _acl,
    "fdb": _fdb,
    "conntrack": _conntrack,
    "qos": _qos,
    "window": _window,
    "mirror": _mirror,
    "remap": _remap,
    "sampling": _sampling,
    "flow_export": _flow_export,
    "flows": _flows,
}


# ---- comparing ----


def keys_of(table: Table, *, op: Op = Op.DELETE) -> Table:
    """A table of the same records' keys, to delete them."""
    kind = KINDS[table.kind]
    if table.columns is not None:
        return Table(table.kind, op, columns={name: table.columns[name] for name in kind.key})
    return Table(table.kind, op, records=[{name: record[name] for name in kind.key} for record in table.records or ()])


def normal(tables: list[Table]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Records of `tables` by key, without ages, in a form that two hosts' dumps can be compared in."""
    records: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for table in tables:
        for row in _rows(table):
            key = tuple(row[name] for name in KINDS[table.kind].key)
            assert key not in records, f"{table.kind} {key} was dumped twice"
            records[key] = tuple(sorted((name, repr(value)) for name, value in row.items() if name != "age_ns"))
    return records


def ages(tables: list[Table]) -> dict[tuple[Any, ...], int]:
    """Nanoseconds since each record of `tables` was last seen, by key."""
    rows = [(KINDS[table.kind].key, row) for table in tables for row in _rows(table)]
    return {tuple(row[name] for name in key): row["age_ns"] for key, row in rows if "age_ns" in row}


def _rows(table: Table) -> list[dict[str, Any]]:
    if table.columns is None:
        return [dict(record) for record in table.records or ()]
    lists = {name: array.tolist() for name, array in table.columns.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
