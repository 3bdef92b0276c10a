"""Frames in one line: exact text for real frames, and nothing that it cannot take."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.packet import describe

A, B = "52:54:00:00:00:01", "52:54:00:00:00:02"
HEAD = bytes.fromhex((B + A).replace(":", ""))
ENDS = f"{A} > {B}"
V4 = ipaddress.ip_address("192.0.2.1").packed + ipaddress.ip_address("198.51.100.2").packed
V6 = ipaddress.ip_address("2001:db8::1").packed + ipaddress.ip_address("2001:db8::2").packed


def ipv4(protocol: int, body: bytes, fragment: int = 0) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, fragment, 64, protocol, 0)
    return b"\x08\x00" + head + V4 + body


def ipv6(protocol: int, body: bytes) -> bytes:
    return b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + V6 + body


TCP = struct.pack("!HHIIBBHHH", 40000, 443, 7, 9, 5 << 4, 0x12, 100, 0, 0)
UDP = struct.pack("!HHHH", 53, 5353, 12, 0) + b"abcd"
ECHO = struct.pack("!BBHHH", 8, 0, 0, 3, 4)
PINGS = "192.0.2.1 > 198.51.100.2"


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (ipv4(6, TCP + b"xyz"), "192.0.2.1.40000 > 198.51.100.2.443: TCP [S.], seq 7, ack 9, length 3"),
        (ipv4(17, UDP), "192.0.2.1.53 > 198.51.100.2.5353: UDP, length 4"),
        (ipv4(1, ECHO), f"{PINGS}: ICMP echo request, id 3, seq 4"),
        (ipv4(1, b"\x03\x04" + bytes(6)), f"{PINGS}: ICMP type 3 code 4"),
        (ipv4(17, UDP, 0x2000), "192.0.2.1.53 > 198.51.100.2.5353: UDP, length 4, first fragment"),
        (ipv4(17, UDP, 185), f"{PINGS}: UDP, fragment at 1480"),
        (ipv4(132, b""), f"{PINGS}: SCTP, length 0"),
        (ipv6(6, TCP), "2001:db8::1.40000 > 2001:db8::2.443: TCP [S.], seq 7, ack 9, length 0"),
        (ipv6(58, b"\x81" + ECHO[1:]), "2001:db8::1 > 2001:db8::2: ICMPv6 echo reply, id 3, seq 4"),
        (ipv6(0, bytes([6, 0, 0, 0, 0, 0, 0, 0]) + TCP), "TCP [S.], seq 7, ack 9, length 0"),
        (ipv6(44, bytes([17, 0, 0, 1, 0, 0, 0, 9]) + UDP), "UDP, length 4, first fragment"),
        (ipv6(44, bytes([17, 0, 0x05, 0xC8, 0, 0, 0, 9]) + UDP), "UDP, fragment at 1480"),
        (b"\x81\x00\x00\x14" + ipv4(17, UDP), "vlan 20, 192.0.2.1.53 > 198.51.100.2.5353: UDP, length 4"),
        (b"\x08\x06" + struct.pack("!HHBBH", 1, 2048, 6, 4, 1) + HEAD[6:] + V4[:4] + bytes(6) + V4[4:],
         "ARP who-has 198.51.100.2 tell 192.0.2.1"),
        (b"\x08\x06" + struct.pack("!HHBBH", 1, 2048, 6, 4, 2) + HEAD[6:] + V4[:4] + bytes(6) + V4[4:],
         f"ARP 192.0.2.1 is-at {A}"),
        (b"\x80\x35" + struct.pack("!HHBBH", 1, 2048, 6, 4, 3) + HEAD[6:] + bytes(4) + HEAD[6:] + bytes(4),
         f"RARP operation 3 of {A}"),
        (b"\x88\xcc" + bytes(20), "ethertype 0x88cc"),
    ],
)  # fmt: skip
def test_frames_as_people_read_them(frame: bytes, says: str) -> None:
    line = describe(HEAD + frame)
    assert line.startswith(ENDS)
    assert line.endswith(says)


@given(st.integers(0, 80))
def test_cut_off_frames_are_said_to_be(length: int) -> None:
    frame = (HEAD + ipv6(6, TCP))[:length]
    assert describe(frame).startswith(ENDS if length >= 14 + 40 + 14 else "cut off")


@given(st.binary(max_size=120))
def test_nothing_makes_it_fail(frame: bytes) -> None:
    assert "\n" not in describe(frame)
