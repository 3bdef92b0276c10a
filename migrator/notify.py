"""Words for systemd: sd_notify(3), for units of Type=notify."""

from __future__ import annotations

import os
import socket


def ready() -> None:
    """This process serves. Nothing when no unit waits for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(b"READY=1")
