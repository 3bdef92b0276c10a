"""Announcements, byte for byte."""

from __future__ import annotations

import ipaddress
import struct

from migrator.announce import VNET_HEADER, frames

MAC = "52:54:00:aa:bb:cc"
RAW = bytes.fromhex("525400aabbcc")


def record(*addresses: str, trunk: dict[str, str] | None = None) -> dict[str, object]:
    return {"mac": MAC, "addresses": list(addresses), "trunk": trunk or {}}


def bare(addresses: tuple[str, ...] = (), trunk: dict[str, str] | None = None) -> list[bytes]:
    found = frames(record(*addresses, trunk=trunk))
    assert all(frame.startswith(VNET_HEADER) and len(frame) >= len(VNET_HEADER) + 60 for frame in found)
    return [frame[len(VNET_HEADER) :] for frame in found]


def test_a_port_without_addresses_sends_a_reverse_request() -> None:
    (frame,) = bare()
    head = b"\xff" * 6 + RAW + b"\x80\x35"
    assert frame == (head + bytes.fromhex("0001080006040003") + RAW + bytes(4) + RAW + bytes(4)).ljust(60, b"\0")


def test_an_ipv4_address_is_claimed_by_request_and_reply() -> None:
    request, reply, _ = bare(("10.1.2.3",))
    address = bytes([10, 1, 2, 3])
    head = b"\xff" * 6 + RAW + b"\x08\x06" + bytes.fromhex("00010800060400")
    assert request[:42] == head + b"\x01" + RAW + address + bytes(6) + address
    assert reply[:42] == head + b"\x02" + RAW + address + b"\xff" * 6 + address


def test_an_ipv6_address_is_advertised_with_override() -> None:
    frame, _ = bare(("fd00::7",))
    assert frame[:14] == bytes.fromhex("333300000001") + RAW + b"\x86\xdd"
    ip, body = frame[14:54], frame[54:]
    assert struct.unpack("!IHBB", ip[:8]) == (6 << 28, 32, 58, 255)
    address = ipaddress.IPv6Address("fd00::7").packed
    assert ip[8:] == address + ipaddress.IPv6Address("ff02::1").packed
    assert body[:2] == b"\x88\x00" and body[4:8] == b"\x20\x00\x00\x00"
    assert body[8:32] == address + b"\x02\x01" + RAW
    words = ip[8:] + struct.pack("!II", 32, 58) + body[:32]
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF, "the checksum makes the sum all ones"


def test_every_tag_of_a_trunk_is_told() -> None:
    found = bare(("10.0.0.1",), trunk={"7": "red", "20": "green"})
    tags = [struct.unpack("!H", frame[14:16])[0] if frame[12:14] == b"\x81\x00" else 0 for frame in found]
    assert tags == [0] * 3 + [7] * 3 + [20] * 3


def test_a_prefix_length_is_no_part_of_the_address() -> None:
    assert bare(("10.1.2.3/24",)) == bare(("10.1.2.3",))
