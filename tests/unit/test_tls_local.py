# SPDX-License-Identifier: GPL-2.0-only
"""The agent's unix socket: root, a group, and whoever else gets at it. Processes of other users really connect."""

from __future__ import annotations

import asyncio
import grp
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.errors import ConfigInvalid
from migrator.security.guard import Guard
from migrator.security.identity import CALLER, Identity, Role
from migrator.security.local import CONNECTIONS, LocalSocket, Served
from migrator.security.transport import PLAIN

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users")
NOBODY = 65534
DEADLINE_S = 60.0

CALL = """
import grpc, os, sys
path, user, groups, method = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
os.setgroups(groups); os.setgid(65534); os.setuid(user)
channel = grpc.insecure_channel(f"unix:{path}")
try:
    kind = channel.unary_stream if method == "Trace" else channel.unary_unary
    answer = kind(f"/migrator.v1.Agent/{method}")(b"", timeout=30)
    list(answer) if method == "Trace" else answer
    print("OK")
except grpc.RpcError as error:
    print(error.code().name)
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that every user may enter, as /run/migrator is."""
    with tempfile.TemporaryDirectory(prefix="migrator-local-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


class Seen(rpc.AgentServicer):
    """Notes who calls."""

    def __init__(self) -> None:
        self.callers: list[Identity] = []

    async def Status(self, request: pb.Empty, context: Any) -> pb.AgentStatus:  # noqa: N802, ARG002
        self.callers.append(CALLER.get())
        return pb.AgentStatus()

    async def Trace(self, request: pb.TraceRequest, context: Any) -> AsyncIterator[pb.TraceEvent]:  # noqa: N802, ARG002
        self.callers.append(CALLER.get())
        yield pb.TraceEvent()


class Front:
    """A server behind a local socket."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.socket = LocalSocket(directory / "a.sock", **options)
        self.path = directory / "a.sock"
        self.seen = Seen()

    async def __aenter__(self) -> Front:
        server = grpc.aio.server(interceptors=[Guard(PLAIN, self.socket.identity)])
        rpc.add_AgentServicer_to_server(self.seen, server)  # type: ignore[no-untyped-call]
        self.served = Served(server, [self.socket])
        self.socket.bind(server)
        await server.start()
        await self.socket.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.served.stop(0)

    async def call(
        self, user: int, groups: tuple[int, ...] = (), method: str = "Status", path: Path | None = None
    ) -> str:
        """By a process of that user: its gRPC status."""
        command = [sys.executable, "-c", CALL, str(path or self.path), str(user), repr(list(groups)), method]
        ran = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=DEADLINE_S)
        assert ran.stdout, ran.stderr
        return str(ran.stdout.strip())


def test_root_is_an_operator_and_no_other_user_gets_to_the_socket(directory: Path) -> None:
    async def scenario() -> None:
        async with Front(directory) as front:
            assert stat.S_IMODE(front.path.stat().st_mode) == 0o600
            assert await front.call(0) == "OK"
            assert front.seen.callers == [Identity(Role.OPERATOR, "uid-0")]
            assert await front.call(NOBODY) == "UNAVAILABLE"
        assert not list(directory.iterdir()), "nothing is left"

    asyncio.run(scenario())


def test_who_gets_past_the_sockets_mode_is_known_by_the_kernel(directory: Path) -> None:
    """Somebody has opened the socket to all: the kernel still says who connects, and the log who that was."""

    async def scenario() -> None:
        async with Front(directory) as front:
            front.path.chmod(0o666)
            assert await front.call(NOBODY) == "UNAVAILABLE"
            assert await front.call(NOBODY) == "UNAVAILABLE"
            assert not front.seen.callers

    with capture_logs() as logs:
        asyncio.run(scenario())
    refused = [line for line in logs if line["event"] == "local caller refused"]
    assert [(line["uid"], line["gid"]) for line in refused] == [(NOBODY, NOBODY)], "once for each user"


@pytest.mark.parametrize("role", [Role.VIEWER, Role.OPERATOR])
def test_members_of_the_group_are_what_was_said_of_them(directory: Path, role: Role) -> None:
    group = grp.getgrnam("games")

    async def scenario() -> None:
        async with Front(directory, group=group.gr_name, role=role) as front:
            found = front.path.stat()
            assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, group.gr_gid)
            assert await front.call(NOBODY, (group.gr_gid,)) == "OK"
            allowed = "OK" if role is Role.OPERATOR else "PERMISSION_DENIED"
            assert await front.call(NOBODY, (group.gr_gid,), "Trace") == allowed
            assert await front.call(NOBODY) == "UNAVAILABLE"
            assert {str(one) for one in front.seen.callers} == {f"migrator://{role}/uid-{NOBODY}"}

    asyncio.run(scenario())


def test_the_socket_behind_is_root_s_and_tells_nobody_apart(directory: Path) -> None:
    """Whoever is root could connect there; without having been looked at it is nobody."""

    async def scenario() -> None:
        async with Front(directory) as front:
            inner = directory / ".a.sock.d" / "s"
            assert stat.S_IMODE(inner.parent.stat().st_mode) == 0o700
            assert await front.call(NOBODY, path=inner) == "UNAVAILABLE"
            assert await front.call(0, path=inner) == "UNAUTHENTICATED"
            assert not front.seen.callers

    asyncio.run(scenario())


def test_a_daemon_that_was_killed_leaves_a_socket_that_the_next_one_replaces(directory: Path) -> None:
    async def scenario() -> None:
        first = Front(directory)
        await first.__aenter__()
        first.socket._server, serving = None, first.socket._server  # as if it were gone, with its files in place
        assert serving is not None
        async with Front(directory) as second:
            serving.close()
            assert await second.call(0) == "OK" and second.seen.callers
        await first.served._server.stop(0)

    asyncio.run(scenario())


def test_connections_beyond_number_are_closed_and_cost_no_other_theirs(directory: Path) -> None:
    async def scenario() -> None:
        async with Front(directory) as front:
            opened = [await asyncio.open_unix_connection(str(front.path)) for _ in range(CONNECTIONS + 20)]
            closed = asyncio.gather(*(reader.read() for reader, _ in opened[CONNECTIONS:]))
            assert b"".join(await asyncio.wait_for(closed, DEADLINE_S)) == b""
            for _, writer in opened:
                writer.close()
            await asyncio.sleep(0)
            deadline = asyncio.get_running_loop().time() + DEADLINE_S
            while front.socket._tasks:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.01)
            assert await front.call(0) == "OK"

    asyncio.run(scenario())


def test_a_group_that_is_not_there_and_a_place_that_cannot_be_had_are_said(directory: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"agent\.socket_group: no group 'no-such-group'.*groupadd"):
        LocalSocket(directory / "a.sock", "no-such-group", key="agent.socket")
    (directory / "file").write_text("")
    with pytest.raises(ConfigInvalid, match=r"cannot listen on .*a\.sock"):
        LocalSocket(directory / "file" / "a.sock").bind(None)
