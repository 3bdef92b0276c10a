# SPDX-License-Identifier: GPL-2.0-only
"""Who a guest may say that it is, for the reference model: RFC 826, RFC 4861 and what docs/remap.md adds."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from .segments import ICMPV6, MAPPED, UDP, Packet, is_link_local, options_name

ZERO = bytes(16)


@dataclass(frozen=True)
class Identity:
    """What a guest has, and what it is known by. Addresses are 16 bytes, v4-mapped for IPv4."""

    mac: bytes
    addresses: AbstractSet[bytes]
    announced: AbstractSet[bytes] = frozenset()  # outside addresses: where the guest is, is told of them as well

    def spoofed(self, packet: Packet, source: bytes) -> str:
        """The reason for which a frame from `source` is not the guest's to send, "" for none."""
        if source != self.mac:
            return "spoof-mac"
        if serves_dhcp(packet):
            return "spoof-address"
        if packet.family == 4:
            return self._spoofed4(packet)
        if packet.family == 6:
            return self._spoofed6(packet, source)
        return self._spoofed_arp(packet, source) if packet.arp is not None else ""

    def _own_link_local(self, address: bytes) -> bool:
        """Guests make theirs up (RFC 7217), unless the port's addresses name one."""
        named = any(is_link_local(own) for own in self.addresses)
        return is_link_local(address) and (address in self.addresses or not named)

    def _spoofed4(self, packet: Packet) -> str:
        dhcp = (packet.proto, packet.lport, packet.rport, packet.part) == (UDP, 68, 67, "whole")  # RFC 2131
        unset = packet.laddr[12:] == bytes(4)
        return "" if packet.laddr in self.addresses or (unset and dhcp) else "spoof-address"

    def _spoofed6(self, packet: Packet, source: bytes) -> str:
        kind = packet.icmp_type if packet.proto == ICMPV6 and packet.part != "later" else -1
        if packet.laddr == ZERO:  # RFC 4862 (probes), RFC 4861 (6.3.7), RFC 3590 and RFC 3810 (5.2.13)
            first_type = packet.icmp_type if packet.proto == ICMPV6 else -1
            if first_type not in (131, 132, 133, 135, 143):
                return "spoof-address"
        elif not (
            self._own_link_local(packet.laddr)
            or packet.laddr in self.addresses
            or (kind == 136 and packet.laddr in self.announced)
        ):
            return "spoof-address"
        return self._spoofed_nd(packet, source, probe=packet.laddr == ZERO) if 133 <= kind <= 137 else ""

    def _spoofed_nd(self, packet: Packet, source: bytes, *, probe: bool) -> str:
        kind, body = packet.icmp_type, packet.payload
        if packet.part != "whole" or kind in (134, 137):  # RFC 6980; RFC 6105: a guest is no router
            return "spoof-nd"
        if kind == 133:
            return "" if options_name(body[8:], source) else "spoof-nd"
        if packet.hops != 255 or len(body) < 24:  # RFC 4861, 7.1
            return "spoof-nd"
        target = body[8:24]
        claims = kind == 136 or probe
        if claims and not self._own_link_local(target) and target not in self.addresses | self.announced:
            return "spoof-nd"
        return "" if options_name(body[24:], source) else "spoof-nd"

    def _spoofed_arp(self, packet: Packet, source: bytes) -> str:
        """RFC 826 and RFC 903; a probe (RFC 5227) has no sender address."""
        body = packet.arp or b""
        if len(body) < 28 or body[:6] != b"\0\1\x08\0\6\4" or body[8:14] != source:
            return "spoof-arp"
        sender = body[14:18]
        return "" if sender == bytes(4) or MAPPED + sender in self.addresses | self.announced else "spoof-arp"


def serves_dhcp(packet: Packet) -> bool:
    """RFC 7610: what a guest says as a server would go past the policies of others."""
    ports = {4: (67, 68), 6: (547, 546)}.get(packet.family)
    return packet.proto == UDP and packet.part != "later" and (packet.lport, packet.rport) == ports
