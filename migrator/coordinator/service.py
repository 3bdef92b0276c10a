"""The gRPC service Coordinator on top of a Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc
from migrator.coordinator.cluster import Cluster
from migrator.coordinator.roster import Session
from migrator.coordinator.rpc import reported
from migrator.coordinator.watch import watch
from migrator.errors import ConfigInvalid, Forbidden
from migrator.faults import passing
from migrator.security.guard import Guard
from migrator.security.identity import CALLER, Identity, Role
from migrator.security.local import LocalSocket, Served
from migrator.security.settings import is_unix
from migrator.security.transport import PLAIN, Transport

OPTIONS = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 2048),
    ("grpc.server_handshake_timeout_ms", 10_000),
)
"""An agent whose host has gone without a word is noticed after 15 s; one whose process ended, at once."""

HELLO_TIMEOUT_S = 10.0

log = structlog.get_logger()


class CoordinatorService(migrator_pb2_grpc.CoordinatorServicer):
    """See proto/migrator/v1/migrator.proto."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[pb.ToAgent]:  # noqa: N802
        async with reported(context):
            hello = await _hello(requests)
            CALLER.get().require_host(hello.host, "attach")
            session = self._cluster.join(hello)
            reader = asyncio.get_running_loop().create_task(self._read(session, requests))
            try:
                async for message in session.messages():
                    passing("coordinator.send", message)
                    yield message
            finally:
                reader.cancel()
                self._cluster.leave(session)

    async def _read(self, session: Session, requests: Any) -> None:
        try:
            async for message in requests:
                passing("coordinator.got", message)
                if session.open:
                    self._cluster.receive(session, message)
        except grpc.RpcError as error:
            log.debug("stream of an agent broke", host=session.host, error=str(error))
        except Exception:
            log.exception("an agent's message could not be handled", host=session.host)
        finally:
            session.close()

    async def Apply(self, request: pb.ApplyRequest, context: Any) -> pb.ApplyReply:  # noqa: N802
        async with reported(context):
            return self._cluster.apply(request)

    async def Remove(self, request: pb.Removal, context: Any) -> pb.ApplyReply:  # noqa: N802
        async with reported(context):
            return self._cluster.remove(request)

    async def Show(self, request: pb.Empty, context: Any) -> pb.Config:  # noqa: N802, ARG002
        async with reported(context):
            return self._cluster.store.catalog.config(self._cluster.store.revision)

    async def Hosts(self, request: pb.Empty, context: Any) -> pb.HostList:  # noqa: N802, ARG002
        async with reported(context):
            return self._cluster.hosts()

    async def Migrate(self, request: pb.MigrateRequest, context: Any) -> AsyncIterator[pb.Migration]:  # noqa: N802
        async with reported(context):
            if CALLER.get().role is Role.AGENT:
                _brings(CALLER.get(), request)
            migration = await self._cluster.migrations.migrate(request)
            async for report in self._cluster.migrations.follow(migration):
                yield report

    async def Migrations(self, request: pb.Empty, context: Any) -> pb.MigrationList:  # noqa: N802, ARG002
        async with reported(context):
            known = (report for report in self._cluster.migrations.reports() if _concerns(CALLER.get(), report))
            reports = sorted(known, key=lambda report: report.started_at)
            return pb.MigrationList(migrations=reports)

    async def Follow(self, request: pb.MigrationRef, context: Any) -> AsyncIterator[pb.Migration]:  # noqa: N802
        async with reported(context):
            self._require_part(request.id)
            async for report in self._cluster.migrations.follow(request.id):
                yield report

    def _require_part(self, migration: str) -> None:
        """An agent has to do with migrations from and to its host only. Raises Forbidden."""
        caller = CALLER.get()
        for report in self._cluster.migrations.reports():
            if report.id == migration and not _concerns(caller, report):
                raise Forbidden(f"{caller} has no part in migration {migration}")

    async def Abort(self, request: pb.MigrationRef, context: Any) -> pb.Migration:  # noqa: N802
        async with reported(context):
            self._require_part(request.id)
            return self._cluster.migrations.abort(request.id, request.reason)

    async def Resolve(self, request: pb.ResolveRequest, context: Any) -> pb.Migration:  # noqa: N802
        async with reported(context):
            return await self._cluster.migrations.resolve(request.id, request.guest_at)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Change]:  # noqa: N802
        async with reported(context):
            async for change in watch(self._cluster.store, request.from_revision, request.sorts):
                yield change

    async def Declare(self, request: pb.DeclareRequest, context: Any) -> pb.ApplyReply:  # noqa: N802
        async with reported(context):
            CALLER.get().require_host(request.host, "declare ports")
            return await self._cluster.declarations.declare(request)


def _concerns(caller: Identity, report: pb.Migration) -> bool:
    return caller.role is not Role.AGENT or caller.name in {report.source, report.destination}


def _brings(caller: Identity, request: pb.MigrateRequest) -> None:
    """An agent asks for what its own hypervisor is about to receive, and nothing else. Raises Forbidden."""
    caller.require_host(request.to, "bring a VM")
    if not request.ordered_elsewhere or request.dry_run or request.without_state:
        raise Forbidden(f"{caller} may not order a migration", hint="an operator may: `migrator migrate`")


async def _hello(requests: Any) -> pb.Hello:
    try:
        first: pb.FromAgent | None = await asyncio.wait_for(anext(aiter(requests), None), HELLO_TIMEOUT_S)
    except TimeoutError:
        first = None
    if first is not None:
        passing("coordinator.got", first)
    if first is None or first.WhichOneof("message") != "hello":
        raise ConfigInvalid("an agent's first message must be its Hello")
    return first.hello


async def serve(
    cluster: Cluster, listen: Sequence[str], transport: Transport = PLAIN, group: str = "", role: Role = Role.VIEWER
) -> tuple[Served, int]:
    """Start serving; returns the server and the port of its last address, 0 for a path. Raises ConfigInvalid.

    `group` and `role`: see LocalSocket.
    """
    sockets = [LocalSocket(Path(one.removeprefix("unix:")), group, role) for one in listen if is_unix(one)]

    def behind(name: str) -> Identity | None:
        return next((found for one in sockets if (found := one.identity(name))), None)

    server = grpc.aio.server(options=OPTIONS, interceptors=[Guard(transport, behind)])
    migrator_pb2_grpc.add_CoordinatorServicer_to_server(CoordinatorService(cluster), server)  # type: ignore[no-untyped-call]
    port = 0
    try:
        for one in sockets:
            one.bind(server)
        for address in listen:
            port = 0 if is_unix(address) else transport.listen(server, address)
        await server.start()
        for one in sockets:
            await one.start()
    except BaseException:
        await Served(server, sockets).stop(0)
        raise
    return Served(server, sockets), port
