"""What an operator writes for the mirrors of a port, and the records that it comes to."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from datapath.state.check import checked_records
from datapath.state.kind import Table
from datapath.state.mirror import MIRROR, MIRRORS_MAX, MirrorDocument, copy_name, output_text

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
MAC = "52:54:00:00:00:01"


def records(*sessions: dict[str, Any]) -> list[dict[str, Any]]:
    return MirrorDocument.model_validate({"sessions": list(sessions)}).records()


@pytest.mark.parametrize(
    ("output", "expected", "text"),
    [
        ({"device": "mon*"}, {"output": "device", "device": "mon*"}, "device mon*"),
        ({"port": f"{VM}/{MAC}"}, {"output": "port", "vm": VM, "mac": MAC}, f"port {VM}/{MAC}"),
        ({"network": "span"}, {"output": "network", "network": "span"}, "network span"),
        (
            {"remote": {"address": "2001:db8::9", "vni": 77}},
            {"output": "remote", "address": "2001:db8::9", "vni": 77},
            "VNI 77 at 2001:db8::9",
        ),
    ],
    ids=["device", "port", "network", "remote"],
)
def test_each_output_is_a_whole_record(output: dict[str, Any], expected: dict[str, Any], text: str) -> None:
    (record,) = records({"name": "ids", "output": output})
    assert {name: record[name] for name in expected} == expected
    others = {"device", "vm", "mac", "network", "address", "vni"} - set(expected)
    assert not any(record[name] for name in others)
    assert checked_records(MIRROR, Table("mirror", records=[record])) == [record]  # complete, of the right types
    assert output_text(record) == text


def test_what_is_not_said_is_everything() -> None:
    (record,) = records({"name": "ids", "output": {"device": "mon0"}})
    assert (record["direction"], record["vlans"], record["snap_bytes"]) == ("both", [], 0)


@pytest.mark.parametrize(("written", "size"), [(128, 128), ("128", 128), ("96B", 96), ("1KiB", 1024), (0, 0)])
def test_a_snap_length_is_written_as_people_do(written: object, size: int) -> None:
    assert records({"name": "ids", "snap": written, "output": {"device": "mon0"}})[0]["snap_bytes"] == size


def test_vlans_are_a_set() -> None:
    assert records({"name": "ids", "vlans": [20, 0, 20], "output": {"device": "mon0"}})[0]["vlans"] == [0, 20]


GOOD: dict[str, Any] = {"name": "ids", "output": {"device": "mon0"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"output": {}}, "one of device, port, network and remote was expected, not none"),
        ({"output": {"device": "mon0", "network": "span"}}, "not device and network"),
        ({"output": {"port": "monitor"}}, "pattern"),
        ({"output": {"remote": {"address": "there", "vni": 1}}}, "IPv4 or IPv6"),
        ({"output": {"remote": {"address": "192.0.2.1", "vni": 0}}}, "greater than or equal to 1"),
        ({"snap": "1 MB"}, "a number of bytes was expected"),
        ({"snap": 32}, "64 were expected at least"),
        ({"vlans": [4095]}, "less than or equal to 4094"),
        ({"direction": "up"}, "'from', 'to' or 'both'"),
        ({"name": "a b"}, "pattern"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_errors_say_what_was_expected(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        records({**GOOD, **changes})
    assert expected in str(caught.value)


def test_a_port_that_takes_copies_is_no_mirror() -> None:
    (record,) = MirrorDocument.model_validate({"takes_copies": True}).records()
    assert (record["name"], record["output"]) == ("", "accept")
    assert checked_records(MIRROR, Table("mirror", records=[record])) == [record]
    assert MirrorDocument.model_validate({}).records() == []


def test_a_name_is_a_mirrors_own() -> None:
    with pytest.raises(ValidationError, match="mirror ids is there twice"):
        records(GOOD, GOOD)
    with pytest.raises(ValidationError, match=f"at most {MIRRORS_MAX}"):
        records(*({**GOOD, "name": f"m{n}"} for n in range(MIRRORS_MAX + 1)))


def test_a_copy_names_its_port_the_same_everywhere() -> None:
    name = copy_name(VM, MAC)
    assert name == copy_name(VM, MAC)
    assert 0 < name[0] < 1 << 24 and 0 <= name[1] < 1 << 12
    others = {copy_name(VM, f"52:54:00:00:{n >> 8:02x}:{n & 255:02x}") for n in range(5000)}
    assert len(others) == 5000
