# SPDX-License-Identifier: GPL-2.0-only
"""A coordinator on loopback that speaks TLS, and whoever wants to call it, with certificates of one authority."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc

from migrator._pb import migrator_pb2_grpc as rpc
from migrator.coordinator.cluster import Cluster
from migrator.coordinator.service import serve
from migrator.coordinator.sqlite import SqliteJournal
from migrator.security import authority
from migrator.security.identity import Identity, Role
from migrator.security.settings import Tls, folder
from migrator.security.transport import Transport

OPTIONS = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
TIMEOUT_S = 10.0


@dataclass
class Certified:
    """`stub(role, name)` calls the coordinator as that one."""

    directory: Path
    authority: authority.Authority
    cluster: Cluster
    port: int = 0
    _channels: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def tls(self, role: str, name: str = "x", **more: Any) -> Tls:
        """A certificate, made at the first call."""
        place = self.directory / f"{role}-{name}"
        if not place.exists():
            self.authority.issue(Identity(Role(role), name), place, **more)
        return folder(place)

    def channel(self, tls: Tls) -> Any:
        channel = Transport(tls).to_coordinator(self.address, OPTIONS)
        self._channels.append(channel)
        return channel

    def stub(self, role: str, name: str = "x") -> Any:
        return rpc.CoordinatorStub(self.channel(self.tls(role, name)))  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


@contextlib.asynccontextmanager
async def certified(directory: Path, lifetime: timedelta = timedelta(days=1), **tls: Any) -> AsyncIterator[Certified]:
    """The coordinator's own certificate is in `coordinator-ctl` below the directory."""
    async with contextlib.AsyncExitStack() as stack:
        journal = SqliteJournal(directory / "journal.sqlite")
        stack.callback(journal.close)
        cluster = Cluster(journal)
        cluster.start()
        stack.callback(cluster.stop)
        made = Certified(directory, authority.create(directory / "pki"), cluster)
        files = made.tls("coordinator", "ctl", lifetime=lifetime)
        own = Transport(files.model_copy(update=tls), Role.COORDINATOR)
        server, made.port = await serve(cluster, ["127.0.0.1:0"], own)
        stack.push_async_callback(server.stop, 0.1)
        stack.push_async_callback(made.close)
        yield made


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """How a call ends that has to fail."""
    try:
        async for _ in _answers(call):
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call was not refused")


async def _answers(call: Any) -> AsyncIterator[Any]:
    if hasattr(call, "__aiter__"):
        async for answer in call:
            yield answer
    else:
        yield await call
