"""What sub-agents send, read back by the specification; and headers of segments as the kernel would cut them."""

from __future__ import annotations

import struct

import pytest

from datapath.export import sflow
from datapath.export.segment import wire_header
from tests.bpf.frames import IPV6, TCP, checksum, datagram, ethernet, ipv4, ipv6, mac, udp
from tests.sflow import read

A, B, GROUP = mac(1), mac(2), "01:00:5e:00:00:01"
AGENT = sflow.SubAgent("10.0.0.1", 17, 5, 1, 1000)
UNKNOWN = 0xFFFFFFFF


def flow(agent: sflow.SubAgent = AGENT, *, header: bytes = b"x" * 60, from_guest: bool = True, pool: int = 7) -> bytes:
    vlans = (0, 100) if from_guest else (100, 0)
    return sflow.flow_sample(agent, 3, pool, 2, from_guest=from_guest, length=1514, header=header, vlans=vlans)


@pytest.mark.parametrize("size", [60, 61, 62, 63, 128])
def test_a_flow_sample(size: int) -> None:
    header = datagram(B, A, bytes(200))[:size]
    told = read(sflow.datagram(AGENT.head(), 9, 12_345, [flow(header=header)]))
    assert (told.agent, told.sub_agent, told.sequence, told.uptime_ms) == ("10.0.0.1", 17, 9, 12_345)
    (one,) = told.flows
    assert (one.sequence, one.source, one.rate, one.pool, one.drops) == (3, 5, 1000, 7, 2)
    assert (one.input, one.output) == (5, 1)
    assert (one.frame_length, one.stripped, one.header) == (1518, 4, header)
    assert (one.vlans, one.priorities) == ((0, 100), (0, 0))


def test_what_goes_to_the_guest_and_what_goes_to_many() -> None:
    to_guest, to_many = datagram(A, B), datagram(GROUP, A)
    told = read(sflow.datagram(AGENT.head(), 1, 0, [flow(header=to_guest, from_guest=False), flow(header=to_many)]))
    assert [(one.input, one.output) for one in told.flows] == [(1, 5), (5, 0x80000000)]
    assert told.flows[0].vlans == (100, 0)


def test_an_agent_with_an_ipv6_address() -> None:
    agent = sflow.SubAgent("2001:db8::1", 3, 3, 0, 10)
    assert read(sflow.datagram(agent.head(), 1, 0, [flow(agent)])).agent == "2001:db8::1"


def test_numbers_wrap() -> None:
    data = sflow.datagram(AGENT.head(), (1 << 32) + 4, (1 << 32) + 5, [flow(pool=(1 << 32) + 6)])
    told = read(data)
    assert (told.sequence, told.uptime_ms, told.flows[0].pool) == (4, 5, 6)


def test_a_counter_sample() -> None:
    counted = {"bytes_from": 1 << 40, "packets_from": (1 << 32) + 1, "bytes_to": 420, "packets_to": 7, "drop_policy": 9}
    told = read(sflow.datagram(AGENT.head(), 1, 0, [sflow.counter_sample(AGENT, 8, counted, up=True)]))
    (one,) = told.counters
    assert (one.sequence, one.source) == (8, 5)
    values = one.values
    assert (values["index"], values["type"], values["direction"], values["status"]) == (5, 6, 1, 3)
    assert (values["in_octets"], values["in_unicast"]) == (1 << 40, 1)
    assert (values["out_octets"], values["out_unicast"]) == (420, 7)
    assert {values[f"{way}_{name}"] for way in ("in", "out") for name in ("multicast", "errors", "discards")} == {
        UNKNOWN
    }


# ---- segments ----

SIZE = 1000


def tcp_frame(payload: int, *, version: int) -> bytes:
    segment = struct.pack("!HHIIBBHHH", 1000, 2000, 0xFFFFFF00, 1, 5 << 4, 0x99, 1000, 0xABCD, 0) + bytes(payload)
    if version == 4:
        return ethernet(B, A, 0x0800, ipv4("10.0.0.1", "10.0.0.2", TCP, segment))
    return ethernet(B, A, IPV6, ipv6("fd00::1", "fd00::2", TCP, segment))


@pytest.mark.parametrize("version", [4, 6])
def test_a_tcp_segment_has_a_length_and_a_sequence_of_its_own(version: int) -> None:
    whole = tcp_frame(2500, version=version)
    l3, l4 = 14, 14 + (20 if version == 4 else 40)
    for number, carried in enumerate((1000, 1000, 500)):
        last = number == 2
        head = wire_header(whole[:128], number=number, size=SIZE, length=l4 + 20 + carried, last=last)
        assert len(head) == 128
        if version == 4:
            total, identification = struct.unpack_from("!HH", head, l3 + 2)
            assert (total, identification) == (40 + carried, 1 + number)
            assert checksum(head[l3:l4]) == 0
        else:
            assert struct.unpack_from("!H", head, l3 + 4)[0] == 20 + carried
        assert struct.unpack_from("!I", head, l4 + 4)[0] == (0xFFFFFF00 + number * SIZE) & 0xFFFFFFFF
        assert head[l4 + 13] == {0: 0x90, 1: 0x10, 2: 0x19}[number]  # CWR first, FIN and PSH last
        assert head[l4 + 16 : l4 + 18] == b"\xab\xcd"


@pytest.mark.parametrize("tagged", [False, True])
def test_a_udp_segment_has_a_length_of_its_own(tagged: bool) -> None:
    whole = datagram(B, A, bytes(2500), vlan=5 if tagged else 0)
    l3 = 18 if tagged else 14
    head = wire_header(whole[:128], number=2, size=SIZE, length=l3 + 28 + 500, last=True)
    assert struct.unpack_from("!H", head, l3 + 2)[0] == 528
    assert struct.unpack_from("!H", head, l3 + 24)[0] == 508


@pytest.mark.parametrize("size", range(14, 60))
def test_a_header_that_is_cut_off_is_no_trouble(size: int) -> None:
    for whole in (tcp_frame(2500, version=4), tcp_frame(2500, version=6), datagram(B, A, bytes(2500))):
        assert len(wire_header(whole[:size], number=1, size=SIZE, length=1054, last=False)) == size


def test_what_is_not_ip_stays() -> None:
    frame = ethernet(B, A, 0x88B5, bytes(100))
    assert wire_header(frame, number=1, size=10, length=60, last=False) == frame
    other = ethernet(B, A, 0x0800, ipv4("10.0.0.1", "10.0.0.2", 47, udp(1, 2, bytes(100))))
    assert wire_header(other, number=0, size=50, length=len(other), last=False)[34:] == other[34:]
