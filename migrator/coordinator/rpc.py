"""Errors over gRPC: status code, message, and in the trailing metadata the error's name and hint.

Servers wrap their handlers in `reported`, clients turn what they catch back into an error with `received`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from prometheus_client import Counter

from datapath.errors import Error
from migrator.errors import (
    EXTERNAL,
    AccessError,
    DeadlineExceeded,
    MigrationError,
    PeerLost,
    ResourceExhausted,
    error_name,
    grpc_status,
    rebuild,
)

NAME_KEY = "migrator-error"
HINT_KEY = "migrator-hint-bin"
AGAIN_S = 60.0
TOLD_MAX = 256
REFUSED = Counter("migrator_calls_refused", "Calls of who may not, or not so often.", ["reason"])

_told: dict[str, float] = {}

log = structlog.get_logger()


@asynccontextmanager
async def reported(context: Any) -> AsyncIterator[None]:
    """Ends the call with the status that stands for an error of ours: the one place where a handler logs it."""
    try:
        yield
    except Error as error:
        metadata = ((NAME_KEY, error_name(error)), (HINT_KEY, error.hint.encode()))
        error.hint = ""
        message = str(error)
        _note(error, message)
        await context.abort(getattr(grpc.StatusCode, grpc_status(error)), message, metadata)


NOT_TAKEN = "if it speaks TLS, our certificate is missing, expired or of another authority; its log says which"
HANDSHAKES = {
    # what gRPC says -> what to do about it
    "Hostname Verification": "its certificate is not of who should be there: [tls] coordinator_name and agent_name",
    "WRONG_VERSION_NUMBER": "it speaks no TLS: is that its right address, and has its file a [tls]?",
    "andshake failed": "its certificate is not from the authority in our [tls] ca, or has expired: `migrator pki show`",
    "Socket closed": NOT_TAKEN,
    "onnection reset": NOT_TAKEN,
}


def tls_hint(message: str) -> str:
    """What to look at when a connection could not be made, "" when it was not refused."""
    return next((hint for said, hint in HANDSHAKES.items() if said in message), "")


def _note(error: Error, message: str) -> None:
    """Who is not let in is told of once a minute: a caller must not be able to fill a log."""
    if not isinstance(error, AccessError):
        log.info("call refused", name=error_name(error), message=message)
        return
    REFUSED.labels(error_name(error)).inc()
    now = time.monotonic()
    if now - _told.get(message, -AGAIN_S) >= AGAIN_S:
        if len(_told) >= TOLD_MAX:
            _told.clear()
        _told[message] = now
        log.warning("caller refused", name=error_name(error), message=message)


def received(error: grpc.RpcError, target: str) -> Error:
    """The error that a call ended with; `target` says who was called."""
    metadata = dict(error.trailing_metadata() or ())
    message = error.details() or error.code().name
    name, hint = metadata.get(NAME_KEY, ""), metadata.get(HINT_KEY, b"")
    if name in {kind.__name__ for kind in EXTERNAL}:
        return rebuild(name, message, hint.decode(errors="replace"))
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return PeerLost(f"{target} does not answer: {message}", hint=tls_hint(message))
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ResourceExhausted(f"{target}: {message}")
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{target} did not answer in time")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return MigrationError(f"{target} does not know this call: its version is older", hint="upgrade it first")
    return MigrationError(f"{target}: {error.code().name}: {message}")
