# SPDX-License-Identifier: GPL-2.0-only
"""Stands before each method of a gRPC server: who calls, may they, and not too often. Handlers find who in CALLER."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
from cryptography import x509

from migrator.coordinator.rpc import reported
from migrator.errors import CertificateInvalid
from migrator.security.files import check_dates
from migrator.security.identity import ANYONE, CALLER, Identity, of_certificate, subject
from migrator.security.limits import Limits, Meter
from migrator.security.roles import require_role
from migrator.security.transport import Transport

KNOWN_MAX = 1024
LASTING = frozenset({"/migrator.v1.Peer/Move"})
"""Not ended when the caller's certificate ends: what a migration has begun it brings to its end."""


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """`local` tells who is behind a peer's name on a unix socket, None for one that is not known."""

    def __init__(
        self,
        transport: Transport,
        local: Callable[[str], Identity | None] = lambda _: None,
        limits: Limits | None = None,
    ) -> None:
        self._transport = transport
        self._local = local
        self._meter = Meter(limits)
        self._known: OrderedDict[bytes, tuple[x509.Certificate, Identity]] = OrderedDict()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        return handler and self._guarded(details.method, handler)

    def _guarded(self, method: str, handler: Any) -> Any:
        arguments = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            kind = "stream_stream" if handler.request_streaming else "unary_stream"
            answers = self._stream(method, getattr(handler, kind))
        else:
            kind = "stream_unary" if handler.request_streaming else "unary_unary"
            answers = self._single(method, getattr(handler, kind))
        return getattr(grpc, f"{kind}_rpc_method_handler")(answers, *arguments)

    def _single(self, method: str, handle: Any) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            async with self._admitted(method, context):
                return await handle(request, context)

        return answer

    def _stream(self, method: str, handle: Any) -> Any:
        async def answers(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._admitted(method, context), aclosing(handle(request, context)) as stream:
                async for answer in stream:
                    yield answer

        return answers

    @asynccontextmanager
    async def _admitted(self, method: str, context: Any) -> AsyncIterator[None]:
        """While the call goes on; it ends with the certificate that it was begun with."""
        async with reported(context):
            certificate, identity = self._who(context)
            require_role(identity, method)
            CALLER.set(identity)
            with self._meter.call(identity):
                if certificate is None or method in LASTING:
                    yield
                    return
                left = (certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds()
                limit = asyncio.timeout(left)
                try:
                    async with limit:
                        yield
                except TimeoutError:
                    if not limit.expired():
                        raise
                    check_dates(certificate, str(identity))

    def _who(self, context: Any) -> tuple[x509.Certificate | None, Identity]:
        """Raises CertificateInvalid."""
        peer: str = context.peer()
        if peer.startswith("unix"):
            identity = self._local(peer.partition(":")[2])
            if identity is None:
                raise CertificateInvalid("a connection past the socket that tells who is there")
            return None, identity
        shown = context.auth_context().get("x509_pem_cert", [])
        if not shown:
            if self._transport.tls.there:
                raise CertificateInvalid("the caller has shown no certificate")
            return None, ANYONE
        certificate, identity = self._read(bytes(shown[0]))
        check_dates(certificate, f"certificate of {identity}")  # of a connection that was made before its end
        if certificate.serial_number in self._transport.revoked():
            raise CertificateInvalid(f"{subject(certificate)} of {identity} was revoked", hint="`migrator pki issue`")
        return certificate, identity

    def _read(self, pem: bytes) -> tuple[x509.Certificate, Identity]:
        if pem not in self._known:
            certificate = x509.load_pem_x509_certificate(pem)
            self._known[pem] = certificate, of_certificate(certificate, self._transport.tls.identities)
            while len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
        return self._known[pem]
