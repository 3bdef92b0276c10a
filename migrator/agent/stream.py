"""The stream from a source agent to a destination agent, as the source sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.errors import DeadlineExceeded, PeerLost
from migrator.faults import passing, reach
from migrator.security.transport import PLAIN, Transport

MESSAGE_BYTES = 8 << 20
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
SERVER_OPTIONS = [
    *CHANNEL_OPTIONS[:5],
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
]


class PeerStream:
    """One call of Peer.Move, to the agent that the order names, which its certificate has to say.

    `on_message` gets what the destination says, `on_end` why the stream ended, once.
    """

    def __init__(
        self,
        order: pb.StartSource,
        on_message: Callable[[pb.FromDestination], None],
        on_end: Callable[[str], None],
        transport: Transport = PLAIN,
    ) -> None:
        self._channel = transport.to_agent(order.peer, order.destination, CHANNEL_OPTIONS)
        self._on_message = on_message
        self._on_end = on_end
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self.address = order.peer
        self.alive = False

    async def open(self, begin: pb.Begin, timeout_s: float) -> None:
        """Connect and send `begin`. Raises PeerLost."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._channel.channel_ready()
            stub: Any = rpc.PeerStub(self._channel)  # type: ignore[no-untyped-call]
            self._call = stub.Move()
            self.alive = True
            self._reader = asyncio.create_task(self._read())
            await self.send(pb.FromSource(begin=begin))
        except TimeoutError as error:
            raise PeerLost(
                f"{self.address} does not answer",
                hint="is the destination's agent running, with a certificate for its host? its log tells",
            ) from error

    async def send(self, message: pb.FromSource) -> None:
        """Write one message, waiting while the destination is behind. Raises PeerLost."""
        if not self.alive:
            raise PeerLost(f"no stream to {self.address}")
        async with self._lock:
            passing("source.send", message)
            try:
                await self._call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                raise PeerLost(f"the stream to {self.address} broke") from error

    async def _read(self) -> None:
        reason = "the destination closed the stream"
        try:
            async for message in self._call:
                passing("source.got", message)
                self._on_message(message)
        except grpc.aio.AioRpcError as error:
            reason = f"the stream to {self.address} broke: {error.details()}"
        except asyncio.CancelledError:
            if self._reader is None or self._reader.cancelling():
                raise
            reason = f"the stream to {self.address} was cancelled"
        finally:
            was_alive, self.alive = self.alive, False
        if was_alive:
            self._on_end(reason)

    async def finish(self, timeout_s: float = 1.0) -> None:
        """Say that nothing more comes, let the destination read it, and close."""
        was_alive, self.alive = self.alive, False
        if was_alive and self._reader is not None:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._call.done_writing()
                    await asyncio.shield(self._reader)
        await self.close()

    async def close(self) -> None:
        """End without telling `on_end`."""
        self.alive = False
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        if self._call is not None:
            self._call.cancel()
        await self._channel.close()


async def ask(
    order: pb.StartSource, query: pb.MoveQuery, timeout_s: float, transport: Transport = PLAIN
) -> pb.MoveState:
    """What the destination that the order names knows of a migration. Raises PeerLost, DeadlineExceeded."""
    address = order.peer
    async with transport.to_agent(address, order.destination, CHANNEL_OPTIONS) as channel:
        try:
            stub: Any = rpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            reach("source", "send.ask")
            state: pb.MoveState = await stub.Ask(query, timeout=timeout_s)
            reach("source", "got.answer")
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"{address} did not answer in {timeout_s:.0f} s") from error
            raise PeerLost(f"{address} does not answer: {error.details()}") from error
        return state
