"""Addresses and ports of collectors as people write them: "192.0.2.1:2055" or "[2001:db8::1]:2055"."""

from __future__ import annotations

import contextlib
import ipaddress


def endpoint(text: str) -> tuple[str, int]:
    """(address, port). Raises ValueError that says what was expected."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    with contextlib.suppress(ValueError):
        address = str(ipaddress.ip_address(host))
        if port.isascii() and port.isdigit() and 0 < int(port) < 65536:
            return address, int(port)
    raise ValueError(f'expected a collector such as "192.0.2.1:2055" or "[2001:db8::1]:2055", not {text!r}')
