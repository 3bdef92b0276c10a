"""The document of kind `sampling`: what people may write, what it comes to, and what is refused in which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from datapath.state.check import checked_records
from datapath.state.kind import Table
from datapath.state.sampling import SAMPLING, SamplingDocument, endpoint, fault
from tests.contract.samples import sample

LEAST = {"rate": 1000, "agent": "10.0.0.1", "sub_agent": 17, "collectors": ["192.0.2.9"]}


def record(**fields: Any) -> dict[str, Any]:
    (made,) = SamplingDocument.model_validate({**LEAST, **fields}).records()
    return made


def test_what_is_not_said_is_sflows_default() -> None:
    assert record() == {
        "sub_agent": 17,
        "agent": "10.0.0.1",
        "interface": 17,
        "network_interface": 0,
        "rate": 1000,
        "header_bytes": 128,
        "polling_s": 20,
        "collectors": [["192.0.2.9", 6343]],
    }
    assert checked_records(SAMPLING, Table("sampling", records=[record()])) == [record()]


def test_everything_may_be_said() -> None:
    collectors = ["192.0.2.9:7000", "[2001:db8::9]:7001", "2001:DB8::a", "192.0.2.9:7000"]
    made = record(collectors=collectors, interface=5, network_interface=1, header="64B", polling="5s")
    assert made["collectors"] == [["192.0.2.9", 7000], ["2001:db8::9", 7001], ["2001:db8::a", 6343]]
    assert (made["interface"], made["network_interface"]) == (5, 1)
    assert (made["header_bytes"], made["polling_s"]) == (64, 5)
    assert fault(made) == ""


def test_what_is_written_reads_the_same_again() -> None:
    document = SamplingDocument.model_validate({**LEAST, "polling": "5s"})
    written = document.model_dump(mode="json", exclude_unset=True)
    assert SamplingDocument.model_validate(written).records() == document.records()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rate": 0}, "greater than or equal to 1"),
        ({"collectors": []}, "at least 1"),
        ({"collectors": ["collector.example"]}, "expected an IPv4 or IPv6 address"),
        ({"collectors": ["192.0.2.9:"]}, "expected a port"),
        ({"collectors": ["192.0.2.9:70000"]}, "expected a port"),
        ({"collectors": ["[2001:db8::9]x"]}, "expected a port"),
        ({"agent": "h1"}, "expected an IPv4 or IPv6 address"),
        ({"sub_agent": 1 << 24}, "less than or equal to 16777215"),
        ({"header": "1KiB"}, "less than or equal to 128"),
        ({"polling": "soon"}, "valid integer"),
        ({"samples": 1}, "Extra inputs"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        record(**fields)


@pytest.mark.parametrize("text", ["", ":", "[", "[]:1", "1.2.3.4:0", "1.2.3.4:x", "[::1]:99999999", "::1:x"])
def test_an_endpoint_is_an_address_and_a_port(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        endpoint(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"rate": 0},
        {"header_bytes": 129},
        {"interface": 0},
        {"pool": -1},
        {"next": 1 << 63},
        {"collectors": []},
        {"collectors": [["192.0.2.9", 0]]},
        {"collectors": [["nobody", 6343]]},
        {"collectors": ["192.0.2.9"]},
        {"agent": ""},
        {"counters": {"packets_from": -1}},
        {"counters": {"others": 1}},
    ],
    ids=str,
)
def test_a_record_of_another_host_is_looked_at(fields: dict[str, Any]) -> None:
    (whole,) = sample("sampling", 1).records or ()
    assert fault(whole) == ""
    assert fault({**whole, **fields})
