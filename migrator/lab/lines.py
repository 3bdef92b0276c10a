# SPDX-License-Identifier: GPL-2.0-only
"""JSON lines on non-blocking descriptors, inside one epoll loop: what the vNIC and its control speak."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Message = dict[str, Any]


class LineReader:
    """Cuts what comes from a descriptor into JSON objects."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.ended = False
        self._buffer = b""

    def read(self) -> Iterator[Message]:
        """Objects that are complete by now; sets `ended` when the other side closed."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.handle, 65536)
            self.ended = not data
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if line.strip():
                yield json.loads(line)


class LineServer:
    """A unix socket whose clients send requests with an `id` and get replies and events.

    `greet()` is what a new client is told first; `serve(request)` answers one.
    """

    def __init__(self, path: Path, greet: Callable[[], Message], serve: Callable[[Message], Message]) -> None:
        self.path = path
        self.greet = greet
        self.serve = serve
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.setblocking(False)
        path.unlink(missing_ok=True)
        self.listener.bind(str(path))
        self.listener.listen(8)
        self.clients: dict[int, tuple[socket.socket, LineReader]] = {}

    def accept(self) -> int:
        """Take a new client and greet it; its descriptor."""
        client, _ = self.listener.accept()
        client.setblocking(False)
        self.clients[client.fileno()] = (client, LineReader(client.fileno()))
        self._send(client, self.greet())
        return client.fileno()

    def read(self, descriptor: int) -> bool:
        """Serve what a client asked; False when it has left: then `drop` it."""
        client, reader = self.clients[descriptor]
        try:
            for request in reader.read():
                self._send(client, {"id": request.get("id"), **self.serve(request)})
        except (OSError, ValueError):
            return False
        return not reader.ended

    def drop(self, descriptor: int) -> None:
        self.clients.pop(descriptor)[0].close()

    def tell(self, event: Message) -> None:
        """Send an event to all clients."""
        for client, _ in self.clients.values():
            self._send(client, event)

    def close(self) -> None:
        for client, _ in self.clients.values():
            client.close()
        self.listener.close()
        self.path.unlink(missing_ok=True)

    @staticmethod
    def _send(client: socket.socket, message: Message) -> None:
        with contextlib.suppress(OSError):  # a client that left is noticed when it is read
            client.sendall(json.dumps(message).encode() + b"\n")
