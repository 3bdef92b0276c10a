"""The headers of one segment of a GSO frame as they are on the wire, from those of the whole frame.

What the kernel's segmentation does (net/ipv4/af_inet.c, net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c), but for the
checksum of the transport: that covers more than is known here, and stays what the frame had.
"""

from __future__ import annotations

import struct

_ETHERNET = 14
_TAGS = (b"\x81\x00", b"\x88\xa8")
_TCP, _UDP = 6, 17
_FIN_PSH, _CWR = 0x09, 0x80


def wire_header(frame: bytes, *, number: int, size: int, length: int, last: bool) -> bytes:
    """The first bytes of segment `number` (from 0), which carries up to `size` bytes and has `length` in all.

    `frame` begins with the headers of the whole frame; what is behind them is the segment's own and stays.
    """
    head = bytearray(frame)
    l3 = _ETHERNET + 4 if frame[12:14] in _TAGS else _ETHERNET
    kind = frame[l3 - 2 : l3]
    if kind == b"\x08\x00" and len(head) >= l3 + 20:
        protocol, l4 = _ipv4(head, l3, number, length)
    elif kind == b"\x86\xdd" and len(head) >= l3 + 40:
        struct.pack_into("!H", head, l3 + 4, (length - l3 - 40) & 0xFFFF)
        protocol, l4 = head[l3 + 6], l3 + 40
    else:
        return frame
    if protocol == _TCP and len(head) >= l4 + 14:
        _tcp(head, l4, number, size, last=last)
    elif protocol == _UDP and len(head) >= l4 + 6:
        struct.pack_into("!H", head, l4 + 4, (length - l4) & 0xFFFF)
    return bytes(head)


def _ipv4(head: bytearray, l3: int, number: int, length: int) -> tuple[int, int]:
    """Returns the protocol and where its header begins."""
    l4 = l3 + (head[l3] & 15) * 4
    identification = int.from_bytes(head[l3 + 4 : l3 + 6], "big") + number
    struct.pack_into("!HH", head, l3 + 2, (length - l3) & 0xFFFF, identification & 0xFFFF)
    if len(head) >= l4:
        head[l3 + 10 : l3 + 12] = b"\0\0"
        struct.pack_into("!H", head, l3 + 10, _checksum(head[l3:l4]))
    return head[l3 + 9], l4


def _tcp(head: bytearray, l4: int, number: int, size: int, *, last: bool) -> None:
    sequence = int.from_bytes(head[l4 + 4 : l4 + 8], "big") + number * size
    struct.pack_into("!I", head, l4 + 4, sequence & 0xFFFFFFFF)
    if not last:
        head[l4 + 13] &= ~_FIN_PSH & 0xFF
    if number:
        head[l4 + 13] &= ~_CWR & 0xFF


def _checksum(header: bytes | bytearray) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
