# SPDX-License-Identifier: GPL-2.0-only
"""A TCP proxy between daemons, whose links can be made bad: started as a worker of the lab.

    python -m tests.netns.proxy '{"NAME": {"listen": [ADDRESS, PORT], "to": [ADDRESS, PORT]}, …}'

    mode {link, mode, value}    how it treats what passes from now on, and the connections that it has
    status {}                   by link: connections there are, bytes that passed, connections that were cut

Modes: `pass`; `cut` (reset what there is and what comes); `stall` (nothing passes, nothing ends); `delay` (ms for each
piece); `throttle` (bytes a second); `corrupt` (one bit of each piece is turned); `half` (end what there is in the
direction of the server only, new ones pass).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
from dataclasses import dataclass, field
from typing import Any

PIECE = 16384
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: the peer sees a reset
MODES = ("pass", "cut", "stall", "delay", "throttle", "corrupt", "half")


@dataclass(eq=False)
class Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter

    def reset(self) -> None:
        for writer in (self.client, self.server):
            _reset(writer)


@dataclass
class Link:
    """One address that stands for another."""

    to: tuple[str, int]
    mode: str = "pass"
    value: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    connections: set[Connection] = field(default_factory=set)
    passed: int = 0
    resets: int = 0

    def set(self, mode: str, value: float) -> None:
        if mode not in MODES:
            raise ValueError(f"no mode {mode!r}")
        self.mode, self.value = mode, value
        self.changed.set()
        self.changed = asyncio.Event()
        if mode == "cut":
            self.resets += len(self.connections)
            for connection in list(self.connections):
                connection.reset()
        if mode == "half":
            for connection in self.connections:
                with contextlib.suppress(OSError, RuntimeError):
                    connection.server.write_eof()

    async def serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self.mode == "cut":
            self.resets += 1
            return _reset(client)
        while self.mode == "stall":
            await self.changed.wait()
        try:
            answers, server = await asyncio.open_connection(*self.to)
        except OSError:
            return _reset(client)
        connection = Connection(client, server)
        self.connections.add(connection)
        try:
            await asyncio.gather(self._pump(reader, server), self._pump(answers, client), return_exceptions=True)
        finally:
            self.connections.discard(connection)
            for writer in (client, server):
                writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                data = await self._treat(data)
                if writer.is_closing():
                    return
                with contextlib.suppress(RuntimeError):  # half closed: what still comes in this direction is lost
                    writer.write(data)
                await writer.drain()
                self.passed += len(data)
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()

    async def _treat(self, data: bytes) -> bytes:
        while self.mode == "stall":
            await self.changed.wait()
        seconds = {"delay": self.value / 1e3, "throttle": len(data) / max(self.value, 1.0)}.get(self.mode, 0.0)
        if seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), seconds)
        if self.mode == "corrupt":
            middle = len(data) // 2
            return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
        return data


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


def obey(links: dict[str, Link], order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order; its answer."""
    try:
        if order["op"] == "mode":
            links[order["link"]].set(order["mode"], float(order.get("value", 0)))
            return {}
        return {
            name: {"connections": len(link.connections), "passed": link.passed, "resets": link.resets}
            for name, link in links.items()
        }
    except (KeyError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


async def run(setup: dict[str, Any]) -> None:
    """Until the end of the standard input."""
    links = {name: Link((one["to"][0], one["to"][1])) for name, one in setup.items()}
    for name, one in setup.items():
        await asyncio.start_server(links[name].serve, *one["listen"], reuse_address=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    while line := await orders.readline():
        print(json.dumps(obey(links, json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
