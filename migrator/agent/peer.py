"""The service that other agents call: Peer.Move brings a VM's state here, Peer.Ask tells what became of it."""

from __future__ import annotations

import asyncio
import hmac
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.destination import DestinationEnd
from migrator.agent.ends import Ends
from migrator.coordinator.rpc import reported
from migrator.errors import Forbidden
from migrator.faults import passing, reach
from migrator.lifecycle import destination_words as words
from migrator.security.identity import CALLER
from migrator.security.limits import Limits

BEGIN_S = 10.0
LOADING_MAX = 3
"""Sections that may wait to be loaded while the next is read: 4 MiB a migration at most."""
LIMITS = Limits(calls=256)
"""Of one other host. What is prepared here the coordinator has ordered; each of these streams holds 4 MiB at most."""
_SETTLED = (
    pb.FromDestination(ready=pb.Empty()),
    pb.FromDestination(opened=pb.Opened()),
    pb.FromDestination(settled=pb.Empty()),
)
"""What a source hears that lost the stream before it heard so the first time."""


class _Source:
    """What is to be written to one source. Nothing waits: the messages are few and small."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[pb.FromDestination | None] = asyncio.Queue()

    def send(self, message: pb.FromDestination) -> None:
        self._queue.put_nowait(message)

    def close(self) -> None:
        self._queue.put_nowait(None)

    async def messages(self) -> AsyncIterator[pb.FromDestination]:
        while (message := await self._queue.get()) is not None:
            yield message


class PeerService(rpc.PeerServicer):
    """`ends` knows the migrations that come here, and those that came."""

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._log = structlog.get_logger()

    async def Move(  # noqa: N802
        self, requests: AsyncIterator[pb.FromSource], context: Any
    ) -> AsyncIterator[pb.FromDestination]:
        begin = await _begin(requests)
        past = self._ends.past(begin.migration)
        if past is not None and past.opened:
            for message in _SETTLED:
                passing("destination.send", message)
                yield message
            return
        end = self._ends.destination(begin.migration)
        if end is None or begin.epoch != end.order.epoch or not hmac.compare_digest(begin.token, end.order.token):
            async with reported(context):
                raise Forbidden("no such migration is prepared here", hint="the coordinator prepares a destination")
        async with reported(context):
            CALLER.get().require_host(end.order.source, f"bring VM {end.vm}")
        source = _Source()
        reader = asyncio.create_task(self._receive(end, source, requests))
        end.attach(source)
        try:
            async for message in source.messages():
                passing("destination.send", message)
                yield message
        finally:
            reader.cancel()
            try:
                await asyncio.gather(reader, return_exceptions=True)
            finally:
                end.detach(source)

    async def _receive(self, end: DestinationEnd, source: _Source, requests: AsyncIterator[pb.FromSource]) -> None:
        loading: deque[asyncio.Future[None]] = deque()
        try:
            async for message in requests:
                passing("destination.got", message)
                if message.WhichOneof("message") == "section":
                    loading.append(end.load(message.section))
                while loading and (len(loading) > LOADING_MAX or not message.HasField("section")):
                    await loading.popleft()
                if not message.HasField("section"):
                    await end.receive(message)
        except Error as error:
            end.post(words.Failed(str(error)))
            await _drained(requests)
        except grpc.aio.AioRpcError as error:
            self._log.info("stream from source broke", migration=end.report.id, error=error.details())
        except Exception as error:
            self._log.exception("broken", migration=end.report.id)
            end.post(words.Failed(f"{type(error).__name__}: {error}"))
            await _drained(requests)
        finally:
            await asyncio.gather(*loading, return_exceptions=True)
            source.close()

    async def Ask(self, request: pb.MoveQuery, context: Any) -> pb.MoveState:  # noqa: N802
        reach("destination", "got.ask")
        end = self._ends.destination(request.migration)
        if end is None:
            answer = self._ends.past(request.migration) or await self._ends.found(request.vm, request.epoch)
        else:
            async with reported(context):
                CALLER.get().require_host(end.order.source, f"ask for VM {end.vm}")
            answer = await asyncio.wait_for(end.ask(), max(context.time_remaining() or BEGIN_S, 0.001))
        reach("destination", "send.answer")
        return answer


async def _begin(requests: AsyncIterator[pb.FromSource]) -> pb.Begin:
    """The first message; an empty one when none comes or it is another."""
    try:
        async with asyncio.timeout(BEGIN_S):
            message = await anext(aiter(requests))
            passing("destination.got", message)
            return message.begin
    except (TimeoutError, StopAsyncIteration):
        return pb.Begin()


async def _drained(requests: AsyncIterator[pb.FromSource]) -> None:
    """Read on without applying anything, so that the source hears why before the stream ends."""
    async for _ in requests:
        pass
