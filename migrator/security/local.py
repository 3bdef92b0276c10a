# SPDX-License-Identifier: GPL-2.0-only
"""A unix socket in front of a gRPC server, where the kernel says who connects (SO_PEERCRED).

gRPC shows its handlers nothing of a unix peer but the name that it is bound to. So whoever connects is looked at here
and then passed on, byte by byte, from a socket with a name that nobody else has; `identity(name)` tells who that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import secrets
import shutil
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from migrator.errors import ConfigInvalid
from migrator.security.identity import Identity, Role

CONNECTIONS = 256
CHUNK_BYTES = 1 << 18
SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h
GROUPS_BYTES = 1024  # more Python does not ask for: 256 groups
_CREDENTIALS = struct.Struct("3i")  # struct ucred


class LocalSocket:
    """Serves `path`. Root and the daemon's own user are operators, members of `group` have `role`, nobody else any.

    Raises ConfigInvalid for a path or a group that cannot be had.
    """

    def __init__(self, path: Path, group: str = "", role: Role = Role.VIEWER, key: str = "socket") -> None:
        self._path = path
        self._key = key
        self._group = _group(group, key)
        self._role = role
        self._inner = path.with_name(f".{path.name}.d") / "s"
        self._who: dict[str, Identity] = {}
        self._told: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._log = structlog.get_logger()

    def identity(self, name: str) -> Identity | None:
        """Who is behind a connection of this name."""
        return self._who.get(name)

    def bind(self, server: Any) -> None:
        """Before the server starts."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._inner.parent, ignore_errors=True)
            self._inner.parent.mkdir(mode=0o700)
            server.add_insecure_port(f"unix:{self._inner}")
        except (OSError, RuntimeError) as error:
            raise ConfigInvalid(f"{self._key}: cannot listen on {self._path}: {error}") from None

    async def start(self) -> None:
        """After the server has. An older socket of that name gives way, and is nobody's from its first moment."""
        new = self._inner.with_name("new")
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(new))
            os.chmod(new, 0o660 if self._group is not None else 0o600)  # noqa: PTH101
            if self._group is not None:
                os.chown(new, -1, self._group)
            listener.listen(CONNECTIONS)
            listener.setblocking(False)
            new.rename(self._path)
        except OSError as error:
            listener.close()
            raise ConfigInvalid(
                f"{self._key}: cannot listen on {self._path}: {error.strerror or error}", hint=self._hint(error)
            ) from None
        self._server = await asyncio.start_unix_server(self._connected, sock=listener)

    def _hint(self, error: OSError) -> str:
        needs = "the daemon has to be in its socket_group: SupplementaryGroups= in the unit"
        return needs if isinstance(error, PermissionError) and self._group is not None else ""

    async def stop(self) -> None:
        """Takes its files away, if they were made."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self._inner.parent, ignore_errors=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            identity = self._look(writer.get_extra_info("socket"))
            if identity is not None and len(self._tasks) <= CONNECTIONS:
                await self._pass_on(identity, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # one of both has gone, or we do
        finally:
            self._tasks.discard(task)
            writer.close()

    def _look(self, peer: socket.socket) -> Identity | None:
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, group = _CREDENTIALS.unpack(raw)
        if user in (0, os.geteuid()):
            return Identity(Role.OPERATOR, f"uid-{user}")
        if self._group is not None and self._group in {group, *_groups(peer)}:
            self._log.info("local caller", socket=str(self._path), uid=user, pid=process, role=str(self._role))
            return Identity(self._role, f"uid-{user}")
        if user not in self._told and len(self._told) < CONNECTIONS:
            self._told.add(user)
            self._log.warning("local caller refused", socket=str(self._path), uid=user, gid=group, pid=process)
        return None

    async def _pass_on(self, identity: Identity, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = f"migrator-{secrets.token_hex(8)}"
        inner = socket.socket(socket.AF_UNIX)
        inner.setblocking(False)
        self._who[name] = identity
        try:
            inner.bind(f"\0{name}")
            await asyncio.get_running_loop().sock_connect(inner, str(self._inner))
            inner_reader, inner_writer = await asyncio.open_unix_connection(sock=inner)
            try:
                await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
            finally:
                inner_writer.close()
        finally:
            del self._who[name]
            inner.close()


class Served:
    """A gRPC server and the sockets before it."""

    def __init__(self, server: Any, sockets: Sequence[LocalSocket]) -> None:
        self._server, self._sockets = server, sockets

    async def stop(self, grace_s: float) -> None:
        """Calls under way have `grace_s` seconds."""
        await self._server.stop(grace_s)
        for one in self._sockets:
            await one.stop()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one of both ends, which ends the other."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()


def _group(name: str, key: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigInvalid(f"{key}_group: no group {name!r} on this host", hint=f"groupadd --system {name}") from None


def _groups(peer: socket.socket) -> tuple[int, ...]:
    try:
        raw = peer.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_BYTES)
    except OSError:  # it has more
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)
