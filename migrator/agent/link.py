"""The agent's stream to the coordinator: made again whenever it breaks. Nothing here waits for the coordinator."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.outgoing import Outgoing
from migrator.agent.stream import CHANNEL_OPTIONS
from migrator.coordinator.rpc import tls_hint
from migrator.faults import passing
from migrator.security.transport import PLAIN, Transport

PAUSE_FIRST_S = 0.1
PAUSE_LAST_S = 3.0
MESSAGE_BYTES = 256 << 20


class Link:
    """`hello()` opens each stream, `take(message)` gets what the coordinator says, in order."""

    def __init__(
        self,
        address: str,
        hello: Callable[[], Awaitable[pb.Hello]],
        take: Callable[[pb.ToAgent], Awaitable[None]],
        attached: Callable[[], None],
        transport: Transport = PLAIN,
    ) -> None:
        self._address = address
        self._hello = hello
        self._take = take
        self._attached = attached
        self._transport = transport
        self._outgoing: Outgoing | None = None
        self._greeting: Outgoing | None = None  # of a stream whose hello is made, or not answered yet
        self._why = ""
        self._log = structlog.get_logger()

    @property
    def connected(self) -> bool:
        return self._outgoing is not None

    def send(self, message: pb.FromAgent) -> None:
        """Lost while the coordinator is away: what matters is said again when it is back.

        What is said while a hello is under way goes behind it: it may know of a guest no more than that it ran.
        """
        outgoing = self._outgoing or self._greeting
        if outgoing is not None:
            outgoing.put(message)

    async def run(self) -> None:
        """Until cancelled."""
        pause = PAUSE_FIRST_S
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._attach()
            except grpc.aio.AioRpcError as error:
                self._missing(error.details() or "")
            except Error as error:
                self._log.warning("cannot greet the coordinator", address=self._address, error=str(error))
            except Exception:
                self._log.exception("broken", address=self._address)
            finally:
                if self._outgoing is not None:
                    self._log.info("coordinator lost", address=self._address)
                self._outgoing = self._greeting = None
            if asyncio.get_running_loop().time() - began > PAUSE_LAST_S:
                pause = PAUSE_FIRST_S
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, PAUSE_LAST_S)

    def _missing(self, why: str) -> None:
        """Said once for each reason: an outage is long, a certificate that does not fit is for ever."""
        log = self._log.debug if why == self._why else self._log.info
        self._why = why
        log("no coordinator", address=self._address, error=why, hint=tls_hint(why))

    async def _attach(self) -> None:
        options = [*CHANNEL_OPTIONS[2:], ("grpc.max_receive_message_length", MESSAGE_BYTES)]
        async with self._transport.to_coordinator(self._address, options) as channel:
            outgoing = self._greeting = Outgoing()
            hello = pb.FromAgent(hello=await self._hello())
            stub: Any = rpc.CoordinatorStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Attach()
            reader = asyncio.create_task(self._read(call, outgoing))
            beside = [
                asyncio.create_task(_write(call, hello, outgoing)),
                asyncio.create_task(self._watch(outgoing, reader)),
            ]
            try:
                await asyncio.wait({reader})
                if not reader.cancelled():  # else it was cut off, here
                    reader.result()
            finally:
                for task in (reader, *beside):
                    task.cancel()
                await asyncio.gather(reader, *beside, return_exceptions=True)
                call.cancel()

    async def _read(self, call: Any, outgoing: Outgoing) -> None:
        async for message in call:
            passing("agent.got", message)
            if self._outgoing is None:
                self._outgoing = outgoing
                self._log.info("coordinator attached", address=self._address)
                self._attached()
            await self._take(message)

    async def _watch(self, outgoing: Outgoing, reader: asyncio.Task[None]) -> None:
        """End the stream of a coordinator that reads nothing; the next one begins with all that it has to know."""
        await outgoing.full.wait()
        self._log.warning("coordinator reads nothing, cut off", address=self._address, waiting=len(outgoing))
        reader.cancel()


async def _write(call: Any, message: pb.FromAgent, outgoing: Outgoing) -> None:
    """`message`, then what is put. Until the stream breaks, which its reader notices."""
    while True:
        passing("agent.send", message)
        await call.write(message)
        message = await outgoing.get()
