"""sFlow version 5 datagrams (https://sflow.org/sflow_version_5.txt), as one sub-agent sends them.

A datagram holds samples: flow samples (the beginning of a frame, and where it passed) and counter samples (an
interface's totals). Everything is XDR: big-endian, in multiples of 4 bytes. Numbers that grow wrap at 2^32.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PORT = 6343
"""Where collectors listen (IANA: sflow)."""
DATAGRAM_BYTES = 1400
"""A datagram has at most so many: none is cut into fragments on its way."""
FCS_BYTES = 4
UNKNOWN_INTERFACE = 0
MANY_INTERFACES = 2 << 30
"""Output of a frame to a group: to how many ports is not known (format 2, number 0)."""

_VERSION = 5
_FLOW_SAMPLE, _COUNTER_SAMPLE = 1, 2
_SAMPLED_HEADER, _EXTENDED_SWITCH, _GENERIC_COUNTERS = 1, 1001, 1
_ETHERNET = 1  # header_protocol
_U32 = 0xFFFFFFFF
_UNKNOWN32 = _U32

# flow_sample up to and with the length of the header: data_format, length; sequence, source, rate, pool, drops, input,
# output, records; data_format, length; protocol, frame_length, stripped, header length
_FLOW = struct.Struct("!16I")
_SWITCH = struct.Struct("!6I")
_COUNTERS = struct.Struct("!2I3I2I2IQ2IQ6IQ6I")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


@dataclass(frozen=True)
class SubAgent:
    """Who sends. One VM port is one sub-agent; `interface` is its ifIndex, in 1..2^24-1, and its data source."""

    address: str  # of the agent: what a collector knows the switch by, on whichever host it runs
    number: int
    interface: int
    beyond: int = UNKNOWN_INTERFACE  # ifIndex of what is at the other side of the switch
    rate: int = 0

    def head(self) -> bytes:
        """The beginning of each datagram."""
        packed = ipaddress.ip_address(self.address).packed
        return struct.pack("!II", _VERSION, 1 if len(packed) == 4 else 2) + packed + struct.pack("!I", self.number)


def datagram(head: bytes, sequence: int, uptime_ms: int, samples: Sequence[bytes]) -> bytes:
    """`head`: of the sub-agent; `sequence`: of the datagram, one more each time."""
    return head + struct.pack("!III", sequence & _U32, uptime_ms & _U32, len(samples)) + b"".join(samples)


def flow_sample(
    agent: SubAgent,
    sequence: int,
    pool: int,
    drops: int,
    *,
    from_guest: bool,
    length: int,
    header: bytes,
    vlans: tuple[int, int],
) -> bytes:
    """One sampled frame.

    `pool`: frames that could have been sampled, with this one; `drops`: samples that were lost. `length`: bytes of the
    frame on the wire without FCS; `header`: its first ones. `vlans`: its 802.1Q ids where it came in and where it
    went out, 0 untagged.
    """
    captured = len(header)
    padding = _PADDING[captured & 3]
    opaque = 16 + captured + len(padding)
    if from_guest:
        to_many = captured and header[0] & 1
        output = MANY_INTERFACES if to_many else agent.beyond
        input_ = agent.interface
    else:
        input_, output = agent.beyond, agent.interface
    return b"".join(
        (
            _FLOW.pack(
                *(_FLOW_SAMPLE, 32 + 8 + opaque + _SWITCH.size),
                *(sequence & _U32, agent.interface, agent.rate, pool & _U32, drops & _U32, input_, output, 2),
                *(_SAMPLED_HEADER, opaque, _ETHERNET, length + FCS_BYTES, FCS_BYTES, captured),
            ),
            header,
            padding,
            _SWITCH.pack(_EXTENDED_SWITCH, 16, vlans[0], 0, vlans[1], 0),
        )
    )


def counter_sample(agent: SubAgent, sequence: int, counters: Mapping[str, int], *, up: bool) -> bytes:
    """The port's totals as generic interface counters (if_counters, RFC 2233).

    `counters` has packets_from, bytes_from, packets_to, bytes_to of the guest: what comes from it comes in. Frames to
    groups are counted with those to one receiver; what the switch does not count is said to be unknown.
    """
    unknown = (_UNKNOWN32,) * 5  # multicast, broadcast, discards, errors; unknown protocols or promiscuous mode
    return _COUNTERS.pack(
        *(_COUNTER_SAMPLE, 12 + 8 + 88, sequence & _U32, agent.interface, 1),
        *(_GENERIC_COUNTERS, 88),
        *(agent.interface, 6, 0, 1, 3 if up else 1),  # ethernetCsmacd, speed unknown, full duplex, admin and oper
        *(counters.get("bytes_from", 0), counters.get("packets_from", 0) & _U32, *unknown),
        *(counters.get("bytes_to", 0), counters.get("packets_to", 0) & _U32, *unknown),
    )
