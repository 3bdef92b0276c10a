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


def unreachable(address: str, port: int) -> str:
    """Why this host cannot send to a collector (it has no route, no such family), "" if it can. Sends nothing."""
    try:
        with socket.socket(family_of(address), socket.SOCK_DGRAM) as one:
            one.connect((address, port))
    except OSError as error:
        return str(error.strerror)
    return ""


class Collectors:
    """One socket a family, in the network namespace of whoever makes this. Waits for nobody."""

    def __init__(self) -> None:
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # a host without the family reaches nobody by it
                self._sockets[family] = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

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
