"""The unix socket on which libvirt's hook and its lock driver speak to the agent.

One JSON object a line, one JSON object back, then the connection ends. Only root may connect: by the socket's mode and,
whoever passes that, by SO_PEERCRED. What comes is bounded in size, number and time; who hangs up is no longer served.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from datapath.errors import Error
from migrator.agent import metrics
from migrator.errors import ConfigInvalid

LINE_BYTES = 8 << 20
"""4 MiB of XML, and what JSON adds to it."""
READ_S = 5.0
CONNECTIONS = 64

Request = Mapping[str, str]
Reply = dict[str, Any]
Handler = Callable[[Request], Awaitable[Reply]]
"""Answers a request whose values are all text: {"ok": bool, "reason"?: str, ...}. Raises Error for a refusal."""

_CREDENTIALS = struct.Struct("3i")  # struct ucred


class HookSocket:
    """Serves `path`; `handlers` has one for each `op`."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    async def start(self) -> None:
        """Raises ConfigInvalid when the socket cannot be made."""
        try:
            listener = _listener(self._path)
        except OSError as error:
            raise ConfigInvalid(
                f"guests.hook_socket: {self._path}: {error.strerror or error}", hint="its directory must be root's"
            ) from error
        self._server = await asyncio.start_unix_server(self._connected, sock=listener, limit=LINE_BYTES)

    async def stop(self) -> None:
        """Who is being served finds its connection closed, which refuses what may be refused."""
        if self._server is None:
            return
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if _uid(writer) == 0:
                await self._serve(reader, writer)
            else:
                self._log.warning("hook socket: not root", uid=_uid(writer))
        except (OSError, asyncio.CancelledError):
            pass  # it went away, or we do
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began = time.monotonic()
        request: Request = {}
        try:
            if len(self._tasks) > CONNECTIONS:
                raise ConfigInvalid(f"more than {CONNECTIONS} requests at once", hint="try again")
            request = await _read(reader)
            reply = await self._answer(request, reader)
        except ConfigInvalid as error:
            reply = {"ok": False, "reason": str(error)}
        if reply is not None:
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        self._note(request, reply, time.monotonic() - began)

    async def _answer(self, request: Request, reader: asyncio.StreamReader) -> Reply | None:
        """None when the asker hung up before there was an answer."""
        handler = self._handlers.get(request.get("op", ""))
        if handler is None:
            raise ConfigInvalid(f"op: expected one of {', '.join(sorted(self._handlers))}, not {request.get('op')!r}")
        work = asyncio.ensure_future(_guarded(handler, request))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            for task in (work, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(work, gone, return_exceptions=True)

    def _note(self, request: Request, reply: Reply | None, seconds: float) -> None:
        names = ("domain", "operation", "sub", "uuid")
        result = "gone" if reply is None else "ok" if reply.get("ok") else "refused"
        operation = request.get("operation") or request.get("op") or "?"
        if request.get("op") in self._handlers:
            metrics.HOOKS.labels(operation[:16], result).observe(seconds)
        self._log.log(
            20 if result == "ok" else 30,
            "hook",
            op=request.get("op", ""),
            **{name: request[name] for name in names if name in request},
            result=result,
            ms=round(seconds * 1e3, 1),
            **({"reason": reply["reason"]} if reply and reply.get("reason") else {}),
        )


async def _guarded(handler: Handler, request: Request) -> Reply:
    try:
        return await handler(request)
    except Error as error:
        return {"ok": False, "reason": str(error)}
    except Exception as error:
        structlog.get_logger().exception("broken", op=request.get("op"))
        return {"ok": False, "reason": f"internal error of the agent: {type(error).__name__}: {error}"}


async def _read(reader: asyncio.StreamReader) -> Request:
    """Raises ConfigInvalid for what is no object of texts in one line."""
    try:
        line = await asyncio.wait_for(reader.readline(), READ_S)
        request = json.loads(line)
    except TimeoutError as error:
        raise ConfigInvalid(f"no request within {READ_S:.0f} s") from error
    except RecursionError as error:
        raise ConfigInvalid("the request is nested too deeply") from error
    except ValueError as error:  # also a line that is too long, and text that is no UTF-8
        raise ConfigInvalid(f"the request is not one line of JSON of at most {LINE_BYTES} bytes: {error}") from error
    if not isinstance(request, dict) or not all(isinstance(value, str | int) for value in request.values()):
        raise ConfigInvalid("the request is not an object of texts")
    return {key: str(value) for key, value in request.items()}


def _listener(path: Path) -> socket.socket:
    """A listening socket that is root's from its first moment and takes the place of an older one without a gap."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(made))
        made.chmod(0o600)
        listener.listen(CONNECTIONS)
        made.rename(path)
    except BaseException:
        listener.close()
        made.unlink(missing_ok=True)
        raise
    return listener


def _uid(writer: asyncio.StreamWriter) -> int:
    raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])
