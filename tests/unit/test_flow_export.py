# SPDX-License-Identifier: GPL-2.0-only
"""Documents of kind flow_export, the encoders, and what is due of which connection."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from datapath.export import ipfix, netflow
from datapath.export.flow import FLOW, Moment
from datapath.export.remainder import ACTIVE, CONNECTION, ENDED, FORCED, IDLE, due, marked, records
from datapath.state.conntrack import STATES
from datapath.state.flow_export import FLOW_EXPORT, FlowExportDocument, domain_of

S = 10**9
NOW = (1 << 60) + 1000 * S
TEMPLATE_IDS = {0, 2}


def address(text: str) -> bytes:
    one = ipaddress.ip_address(text)
    return one.packed if one.version == 6 else bytes(10) + b"\xff\xff" + one.packed


def connection(**fields: Any) -> Any:
    """A TCP connection that began 100 s and was seen 1 s ago; 5 packets from the guest, 7 to it, nothing reported."""
    made = np.zeros(1, CONNECTION)
    values = {
        "id": 77,
        "laddr": np.void(address("10.0.0.5")),
        "raddr": np.void(address("192.0.2.9")),
        "lport": 443,
        "rport": 50_000,
        "proto": 6,
        "state": STATES["ESTABLISHED"],
        "tcp_flags": (0x1B, 0x12),
        "began": NOW - 100 * S,
        "seen": NOW - S,
        "packets": (5, 7),
        "bytes": (500, 7000),
        **fields,
    }
    for name, value in values.items():
        made[name] = value
    return made


# ---- documents ----


def test_a_document_and_its_record() -> None:
    made = FlowExportDocument(version="netflow", collectors=["192.0.2.1:2055", "[2001:db8::1]:4739"])
    (record,) = made.records()
    assert record["version"] == 9 and record["collectors"] == ["192.0.2.1:2055", "[2001:db8::1]:4739"]
    assert set(record) == set(FLOW_EXPORT.fields) - set(FLOW_EXPORT.live) - set(FLOW_EXPORT.accounting)
    assert FlowExportDocument(collectors=["192.0.2.1:1"]).version == 10


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"collectors": []}, "at least 1"),
        ({"collectors": ["192.0.2.1"]}, "expected a collector such as"),
        ({"collectors": ["collector:2055"]}, "expected a collector such as"),
        ({"collectors": ["192.0.2.1:70000"]}, "expected a collector such as"),
        ({"collectors": ["2001:db8::1:4739"]}, "expected a collector such as"),
        ({"collectors": ["192.0.2.1:1", "192.0.2.1:1"]}, "each collector once"),
        ({"collectors": ["192.0.2.1:1"], "version": 5}, "9"),
        ({"collectors": ["192.0.2.1:1"], "source": "here"}, "expected an address"),
        ({"collectors": ["192.0.2.1:1"], "active_timeout_s": 0}, "greater than or equal to 1"),
        ({"collectors": ["192.0.2.1:1"], "colour": "red"}, "not permitted"),
    ],
)
def test_documents_that_are_refused_say_why(document: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        FlowExportDocument(**document)


def test_the_domain_is_the_ports_own_wherever_it_is() -> None:
    record = FlowExportDocument(collectors=["192.0.2.1:1"]).records()[0]
    assert domain_of(record, "02:00:00:00:00:01") == domain_of(record, "02:00:00:00:00:01") != 0
    assert domain_of(record, "02:00:00:00:00:01") != domain_of(record, "02:00:00:00:00:02")
    assert domain_of({**record, "domain": 9}, "02:00:00:00:00:01") == 9


# ---- what is due ----


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ACTIVE),
        ({"began": NOW - 59 * S}, 0),
        ({"until": NOW - 59 * S}, 0),
        ({"until": NOW - 60 * S}, ACTIVE),
        ({"seen": NOW - 15 * S}, IDLE),
        ({"state": STATES["TIME_WAIT"], "began": NOW - S}, ENDED),
        ({"state": STATES["CLOSE"], "began": NOW - S}, ENDED),
        ({"proto": 17, "state": STATES["CLOSE"], "began": NOW - S}, 0),
        ({"ended": FORCED}, FORCED),
        ({"ended": IDLE}, IDLE),
        ({"ended": IDLE, "state": STATES["TIME_WAIT"]}, ENDED),
        ({"reported_packets": (5, 7), "reported_bytes": (500, 7000)}, 0),
        ({"reported_packets": (5, 7), "ended": FORCED}, 0),
        ({"reported_packets": (5, 6)}, ACTIVE),
        ({"packets": (0, 0), "bytes": (60, 0)}, 0),
        ({"seen": NOW + S, "began": NOW + S}, 0),
    ],
)
def test_when_a_record_is_due(fields: dict[str, Any], expected: int) -> None:
    assert due(connection(**fields), NOW, 60 * S, 15 * S).tolist() == [expected]


def test_a_record_for_each_direction() -> None:
    found = records(
        connection(reported_packets=(2, 0), reported_bytes=(200, 0), until=NOW - 30 * S), np.array([2]), NOW
    )
    assert found["packets"].tolist() == [3, 7] and found["bytes"].tolist() == [300, 7000]
    assert found["direction"].tolist() == [0, 1] and found["tcp_flags"].tolist() == [0x1B, 0x12]
    assert [bytes(one) for one in found["source"]] == [address("10.0.0.5"), address("192.0.2.9")]
    assert found["source_port"].tolist() == [443, 50_000] and found["target_port"].tolist() == [50_000, 443]
    assert found["start_ago_ns"].tolist() == [30 * S] * 2 and found["end_ago_ns"].tolist() == [S] * 2


def test_what_was_reported_leaves_nothing() -> None:
    before = connection()
    after = marked(before, NOW)
    assert due(after, NOW + 999 * S, S, S).tolist() == [0]
    assert len(records(after, np.array([2]), NOW)) == 0
    assert after["until"][0] == NOW
    after["packets"] += np.uint64(1)
    assert records(after, np.array([2]), NOW)["packets"].tolist() == [1, 1]


def test_bytes_whose_packet_is_not_counted_yet_are_told_with_it() -> None:
    half = connection(packets=(5, 0), bytes=(500, 60))
    after = marked(half, NOW)
    assert after["reported_bytes"].tolist() == [[500, 0]]
    after["packets"][0][1] = 1
    assert records(after, np.array([2]), NOW)["bytes"].tolist() == [60]


@pytest.mark.parametrize(
    ("proto", "rport", "expected"),
    [
        (1, 0, [8 << 8, 0]),
        (1, 0x8000, [0, 8 << 8]),
        (58, 0, [128 << 8, 129 << 8]),
        (58, 0x8000, [129 << 8, 128 << 8]),
        (1, 13, [13 << 8, 14 << 8]),
    ],
)
def test_queries_have_their_type_for_a_port(proto: int, rport: int, expected: list[int]) -> None:
    found = records(connection(proto=proto, lport=7, rport=rport), np.array([2]), NOW)
    assert (found["source_port"].tolist(), found["target_port"].tolist()) == ([0, 0], expected)


# ---- encoders ----


def rows(*sources: str) -> Any:
    made = np.zeros(len(sources), FLOW)
    for row, source in zip(made, sources, strict=True):
        row["source"] = np.void(address(source))
        row["target"] = np.void(address("192.0.2.9" if ":" not in source else "2001:db8::9"))
    made["source_port"], made["target_port"], made["proto"], made["tcp_flags"] = 443, 50_000, 6, 0x1B
    made["packets"], made["bytes"], made["reason"], made["id"] = 1 << 40, 1 << 50, 2, 77
    made["start_ago_ns"], made["end_ago_ns"] = 60 * S, S
    return made


def sets(body: bytes) -> list[tuple[int, bytes]]:
    found = []
    while body:
        number, size = struct.unpack_from("!HH", body)
        assert size % 4 == 0 and size <= len(body)
        found.append((number, body[4:size]))
        body = body[size:]
    return found


def decoded(parts: list[tuple[int, bytes]]) -> list[dict[int, int]]:
    """Records by the templates among the sets, as a collector does it: element -> value."""
    known: dict[int, list[tuple[int, int]]] = {}
    found = []
    for number, body in parts:
        at = 0
        while number in TEMPLATE_IDS and at < len(body):
            template, count = struct.unpack_from("!HH", body, at)
            known[template] = [struct.unpack_from("!HH", body, at + 4 + 4 * i) for i in range(count)]  # type: ignore[misc]
            at += 4 + 4 * count
        size = sum(length for _, length in known.get(number, ()))
        while size and len(body) - at >= size:
            record = {}
            for element, length in known[number]:
                record[element] = int.from_bytes(body[at : at + length], "big")
                at += length
            found.append(record)
    return found


MOMENT = Moment(now_ms=1_700_000_000_123, uptime_ms=100_000, sequence=(1 << 32) + 5, domain=4711)


def test_netflow() -> None:
    made = netflow.datagram(rows("10.0.0.5", "2001:db8::5"), MOMENT, templates=True)
    assert struct.unpack_from("!HHIIII", made) == (9, 4, 100_000, 1_700_000_000, 5, 4711)
    one, other = decoded(sets(made[20:]))
    assert one[8] == int(ipaddress.ip_address("10.0.0.5")) and other[27] == int(ipaddress.ip_address("2001:db8::5"))
    expected = {7: 443, 11: 50_000, 4: 6, 6: 0x1B, 61: 0, 136: 2, 2: 1 << 40, 1: 1 << 50, 22: 40_000, 21: 99_000}
    assert expected.items() <= one.items() and expected.items() <= other.items()
    assert [number for number, _ in sets(made[20:])] == [0, 256, 257]
    assert netflow.following(41, 16) == 42


def test_netflow_of_what_began_before_its_exporter() -> None:
    made = netflow.datagram(rows("10.0.0.5"), Moment(10**12, 30_000, 0, 1), templates=True)
    (one,) = decoded(sets(made[20:]))
    assert (one[22], one[21]) == (0, 29_000)


def test_netflow_whose_uptime_has_wrapped() -> None:
    made = netflow.datagram(rows("10.0.0.5"), Moment(10**12, (1 << 32) + 10_000, 0, 1), templates=True)
    assert struct.unpack_from("!I", made, 4) == (10_000,)
    (one,) = decoded(sets(made[20:]))
    assert (one[22], one[21]) == ((1 << 32) - 50_000, 9_000)


def test_ipfix() -> None:
    made = ipfix.datagram(rows("10.0.0.5", "10.0.0.6", "2001:db8::5"), MOMENT, templates=True)
    assert struct.unpack_from("!HHIII", made) == (10, len(made), 1_700_000_000, 5, 4711)
    found = decoded(sets(made[16:]))
    assert len(found) == 3
    times = {152: 1_700_000_000_123 - 60_000, 153: 1_700_000_000_123 - 1_000, 148: 77}
    assert all(times.items() <= one.items() for one in found)
    assert ipfix.following(41, 16) == 57


@pytest.mark.parametrize("encoder", [netflow, ipfix])
def test_without_templates(encoder: Any) -> None:
    with_templates = encoder.datagram(rows("10.0.0.5"), MOMENT, templates=True)
    without = encoder.datagram(rows("10.0.0.5"), MOMENT, templates=False)
    assert len(with_templates) - len(without) == len(encoder.TEMPLATES)
    assert all(number >= 256 for number, _ in sets(without[20 if encoder is netflow else 16 :]))


@pytest.mark.parametrize("encoder", [netflow, ipfix])
def test_a_full_datagram_fits_an_ethernet_frame(encoder: Any) -> None:
    full = encoder.datagram(rows(*["2001:db8::5"] * 16), MOMENT, templates=True)
    assert len(full) <= 1500 - 40 - 8
