# SPDX-License-Identifier: GPL-2.0-only
"""An IP packet with another end: what a translator has to make of its bytes (RFC 3022, 4.1 to 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

from .frames import checksum
from .segments import ICMP, ICMPV6, TCP, UDP, Packet

DCCP, UDPLITE = 33, 136
# RFC 9293, RFC 768, RFC 4340, RFC 3828, RFC 792, RFC 4443: where the checksum is, from the transport header on
CHECK_AT = {TCP: 16, UDP: 6, DCCP: 6, UDPLITE: 6, ICMP: 2, ICMPV6: 2}
ICMP_HEADER = 8
_TARGET = slice(8, 24)  # of neighbour discovery, RFC 4861, 4.3 and 4.4


class CutOff(Exception):
    """The packet ends before its checksum."""


@dataclass(frozen=True)
class End:
    """Of a packet: 16 bytes, v4-mapped for IPv4, and a port (0: there is none, or it stays)."""

    address: bytes
    port: int = 0


def readdressed(
    ip: bytes,
    packet: Packet,
    *,
    source: End | None = None,
    target: End | None = None,
    carried: bytes | None = None,
    asked: bytes | None = None,
    cut: bool = False,
) -> bytes:
    """The IP packet `ip`, without padding, which `packet` describes, with other ends and the checksums over them.

    `carried`: an ICMP error's packet, as long as it was. `asked`: the target of neighbour discovery. `cut`: it is what
    an error carries, and may end before its checksum. Raises CutOff.
    """
    made, start = bytearray(ip), packet.transport_at
    for end, (v4, v6), port_at in ((source, (12, 8), start), (target, (16, 24), start + 2)):
        if end is None:
            continue
        if packet.family == 4:
            made[v4 : v4 + 4] = end.address[12:]
        else:
            made[v6 : v6 + 16] = end.address
        if end.port and packet.part != "later":
            made[port_at : port_at + 2] = end.port.to_bytes(2)
    if carried is not None:
        made[start + ICMP_HEADER :] = carried
    if asked is not None:
        made[start + _TARGET.start : start + _TARGET.stop] = asked
    return ip if made == ip else _balanced(ip, made, packet, cut=cut)


def _balanced(before: bytes, made: bytearray, packet: Packet, *, cut: bool) -> bytes:
    if packet.family == 4:
        words = (before[0] & 0xF) * 4
        _renew(made, 10, _without(before[:words], 10), _without(made[:words], 10))
    field = CHECK_AT.get(packet.proto)
    if field is None or packet.part == "later":
        return bytes(made)
    at = packet.transport_at + field
    if at + 2 > len(made):
        if cut:
            return bytes(made)
        raise CutOff
    if packet.proto in (UDP, UDPLITE) and before[at : at + 2] == bytes(2):  # RFC 768, RFC 6935: it has none
        return bytes(made)
    _renew(made, at, _covered(before, packet, at), _covered(made, packet, at))
    if packet.proto in (UDP, UDPLITE) and made[at : at + 2] == bytes(2):  # RFC 768, RFC 3828
        made[at : at + 2] = b"\xff\xff"
    return bytes(made)


def _without(data: bytes | bytearray, at: int) -> bytes:
    return bytes(data[:at]) + bytes(2) + bytes(data[at + 2 :])


def _covered(ip: bytes | bytearray, packet: Packet, at: int) -> bytes:
    """What a transport checksum is over, itself as zero: the pseudo-header, too, but of ICMP."""
    segment = _without(ip, at)[packet.transport_at :]
    if packet.proto == ICMP:
        return segment
    addresses = bytes(ip[12:20] if packet.family == 4 else ip[8:40])
    return addresses + len(segment).to_bytes(4) + packet.proto.to_bytes(4) + segment


def _renew(made: bytearray, at: int, before: bytes, after: bytes) -> None:
    """The checksum at `at` of what was `before` and is `after`. One that was right is right again; one that was wrong
    stays as wrong as it was, so that nothing that broke a packet on its way is hidden (RFC 1624)."""
    old, there, here = int.from_bytes(made[at : at + 2]), checksum(before), checksum(after)
    if before == after:
        return
    total = (~old & 0xFFFF) + there + (~here & 0xFFFF)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    made[at : at + 2] = (here if old == there else ~total & 0xFFFF).to_bytes(2)
