"""UDP to the hosts that collect what the switch exports."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable

Endpoint = tuple[str, int]
"""Address and UDP port."""


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET


def unreachable(address: str, port: int, source: str = "") -> str:
    """Why this host cannot send to a collector (it has no route, no such family), "" if it can. Sends nothing."""
    try:
        with _opened(family_of(address), source) as one:
            one.connect((address, port))
    except OSError as error:
        return str(error.strerror)
    return ""


def _opened(family: socket.AddressFamily, source: str) -> socket.socket:
    """`source`: address that datagrams of its family come from, which need not be this host's; "" any."""
    made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if source and family_of(source) is family:
            made.setsockopt(*_TRANSPARENT[family], 1)
            made.bind((source, 0))
    except OSError:
        made.close()
        raise
    return made


_TRANSPARENT = {socket.AF_INET: (socket.IPPROTO_IP, 19), socket.AF_INET6: (socket.IPPROTO_IPV6, 75)}
"""IP_TRANSPARENT, IPV6_TRANSPARENT (linux/in.h, linux/in6.h), which the socket module does not know."""


class Collectors:
    """One socket a family, in the network namespace of whoever makes this. Waits for nobody.

    `source`: address that datagrams come from on every host, "" this host's own.
    """

    def __init__(self, source: str = "") -> None:
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # a host without the family reaches nobody by it
                self._sockets[family] = _opened(family, source)

    def close(self) -> None:
        for one in self._sockets.values():
            one.close()
        self._sockets.clear()

    def send(self, datagram: bytes, endpoints: Iterable[Endpoint]) -> int:
        """To each of them; returns how many it could not be sent to."""
        failed = 0
        for endpoint in endpoints:
            try:
                self._sockets[family_of(endpoint[0])].sendto(datagram, endpoint)
            except (OSError, KeyError):
                failed += 1
        return failed
