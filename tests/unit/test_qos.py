"""The document of kind `qos`: what people may write, what it comes to, and what is refused in which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from datapath.state.qos import SHAPE_BURST_MIN, QosDocument, fault
from datapath.state.quantity import rate_bps, size_bytes


def records(**ways: Any) -> list[dict[str, Any]]:
    return QosDocument.model_validate(ways).records()


def record(**fields: Any) -> dict[str, Any]:
    blank = {"direction": "from", "mode": "shape", "rate_bps": 10**8, "burst_bytes": 10**6, "priority": 0, "dscp": -1}
    return {**blank, **fields}


def test_a_rate_alone_shapes_with_fifty_milliseconds_of_burst() -> None:
    assert records(**{"from": {"rate": "100mbit"}}) == [record(burst_bytes=625_000)]
    assert records(**{"from": {"rate": "1mbit"}}) == [record(rate_bps=10**6, burst_bytes=SHAPE_BURST_MIN)]


def test_a_policer_has_half_a_second_of_burst() -> None:
    assert records(to={"rate": "100mbit", "mode": "police"})[0]["burst_bytes"] == 6_250_000


def test_both_directions_and_a_mark_without_rate() -> None:
    ways = {"from": {"dscp": "AF41", "priority": 5}, "to": {"mode": "police", "rate": 64000, "burst": "8KiB"}}
    assert records(**ways) == [
        record(mode="none", rate_bps=0, burst_bytes=0, priority=5, dscp=34),
        record(direction="to", mode="police", rate_bps=64_000, burst_bytes=8192),
    ]


def test_what_is_written_reads_the_same_again() -> None:
    document = QosDocument.model_validate({"from": {"rate": "1.5gbit/s", "burst": "2MB", "dscp": "ef"}})
    written = document.model_dump(mode="json", exclude_unset=True)
    assert written == {"from": {"rate": 1_500_000_000, "burst": 2_000_000, "dscp": 46}}
    assert QosDocument.model_validate(written) == document


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({"rate": "100mb"}, "expected a rate such as"),
        ({"rate": True}, "expected a rate such as"),
        ({"rate": "1mbit", "burst": "64 kibi"}, "expected a size such as"),
        ({"rate": "1kbit"}, "greater than or equal to 64000"),
        ({"rate": "1mbit", "burst": "64KiB"}, "256KiB or more to shape"),
        ({"burst": "1MiB"}, "expected a rate beside"),
        ({"mode": "police"}, "expected a rate beside"),
        ({}, "expected a rate, a dscp or a priority"),
        ({"dscp": "gold"}, "expected 0..63 or one of cs0"),
        ({"dscp": 64}, "less than or equal to 63"),
        ({"priority": 8}, "less than or equal to 7"),
        ({"rate": "1mbit", "limit": 3}, "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused(way: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        records(to=way)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate_bps": 0},
        {"burst_bytes": SHAPE_BURST_MIN - 1},
        {"mode": "police", "burst_bytes": 100},
        {"priority": -1},
        {"dscp": 64},
        {"debt_ns": -1},
    ],
)
def test_a_record_of_another_host_is_checked_as_well(wrong: dict[str, Any]) -> None:
    assert fault(record()) == ""
    assert fault(record(**wrong)).startswith(next(name for name in wrong if name != "mode"))


@pytest.mark.parametrize(("text", "value"), [("8 kbit", 8000), ("1.25gbit", 1_250_000_000), ("7", 7), (9, 9)])
def test_rates(text: object, value: int) -> None:
    assert rate_bps(text) == value


@pytest.mark.parametrize(("text", "value"), [("1KiB", 1024), ("1kb", 1000), ("0.5MiB", 524_288), ("12", 12), (3, 3)])
def test_sizes(text: object, value: int) -> None:
    assert size_bytes(text) == value
