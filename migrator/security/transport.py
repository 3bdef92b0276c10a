# SPDX-License-Identifier: GPL-2.0-only
"""gRPC's channels and ports with the process's certificate, which is read again when its files have changed.

A server looks at each handshake, a client at each new channel. Files that do not fit (they are replaced one after the
other) change nothing: the ones before are used until they do. Unix sockets carry no TLS: the kernel says who is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog

from migrator.errors import CertificateInvalid, ConfigInvalid
from migrator.security.files import Material, read, serials
from migrator.security.identity import Identity, Role
from migrator.security.settings import Tls, is_unix

LOOK_S = 0.2
Options = Sequence[tuple[str, Any]]
_Stamp = tuple[tuple[int, int, int], ...]


class Transport:
    """How this process listens and connects. `role`, `name`: what its certificate has to stand for, "" for any name.

    Raises CertificateInvalid when its files cannot be used now.
    """

    def __init__(self, tls: Tls, role: Role | None = None, name: str = "") -> None:
        self.tls = tls
        self._expected = (role, name)
        self._lock = threading.Lock()
        self._looked = 0.0
        self._stamp: _Stamp = ()
        self._refused: _Stamp = ()
        self._material: Material | None = None
        self._log = structlog.get_logger()
        self._listed = (0, 0, 0)
        self._revoked: frozenset[int] = frozenset()
        if tls.there:
            self._stamp, self._material = self._files(), self._read()
            if tls.revoked:
                self._listed, self._revoked = _stamp(tls.revoked), serials(tls.revoked, self._material)

    @property
    def identity(self) -> Identity | None:
        """Of this process; None without TLS."""
        material = self.material()
        return material.identity if material else None

    def material(self) -> Material | None:
        """What is to be spoken with now; None without TLS. Never raises, and may be called by any thread."""
        if self._material is None:
            return None
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_S:
                self._looked = time.monotonic()
                self._look_again()
            return self._material

    def _look_again(self) -> None:
        stamp = self._files()
        if stamp in (self._stamp, self._refused):
            return
        try:
            self._material = self._read()
        except CertificateInvalid as error:
            self._log.warning("new certificate not used, the one before goes on", error=str(error))
            self._refused = stamp
            return
        self._stamp, self._refused = stamp, ()
        self._log.info("certificate read again", until=f"{self._material.certificate.not_valid_after_utc:%F %T}")

    def _files(self) -> _Stamp:
        return tuple(_stamp(path) for path in (self.tls.ca, self.tls.certificate, self.tls.key) if path)

    def _read(self) -> Material:
        material = read(self.tls)
        role, name = self._expected
        if role and material.identity.role is not role:
            raise CertificateInvalid(
                f"{self.tls.certificate}: of {material.identity}, not of role {role}",
                hint=f"`migrator pki issue {role}`",
            )
        if name and material.identity.name != name:
            raise CertificateInvalid(
                f"{self.tls.certificate}: of {material.identity}, but this is {name!r}",
                hint="the name in the certificate has to be `agent.host`",
            )
        return material

    def revoked(self) -> frozenset[int]:
        """Serial numbers that count no more. A list that cannot be read leaves the one before in force."""
        path = self.tls.revoked
        if path is None:
            return frozenset()
        with self._lock:
            if (stamp := _stamp(path)) != self._listed:
                self._listed = stamp
                try:
                    self._revoked = serials(path, self._material)
                except CertificateInvalid as error:
                    self._log.warning("list of revoked certificates not used, the one before goes on", error=str(error))
            return self._revoked

    # ---- servers ----

    def listen(self, server: Any, address: str, key: str = "listen") -> int:
        """Have a server listen; returns the port. Raises ConfigInvalid for an address that it cannot have."""
        try:
            if self._material is None or is_unix(address):
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._server_credentials())
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigInvalid(f"{key}: cannot listen on {address}", hint="is it this host's, and free?")
        return int(port)

    def _server_credentials(self) -> grpc.ServerCredentials:
        used = self.material()
        assert used is not None

        def newer() -> Any:
            """Asked by gRPC at each handshake, in a thread of its own; None: as before."""
            nonlocal used
            now = self.material()
            if now is used or now is None:
                return None
            used = now
            return _configuration(now)

        return grpc.dynamic_ssl_server_credentials(_configuration(used), newer, require_client_authentication=True)

    # ---- clients ----

    def to_coordinator(self, address: str, options: Options) -> Any:
        """An asynchronous channel."""
        return self._channel(address, self.tls.coordinator_name, options, grpc.aio)

    def to_agent(self, address: str, host: str, options: Options) -> Any:
        """An asynchronous channel to the agent of `host`, and to no other."""
        return self._channel(address, self.tls.agent_name.format(host=host), options, grpc.aio)

    def to_coordinator_blocking(self, address: str, options: Options) -> grpc.Channel:
        """The same as `to_coordinator` for a program without an event loop."""
        return self._channel(address, self.tls.coordinator_name, options, grpc)

    def _channel(self, address: str, name: str, options: Options, kind: Any) -> Any:
        material = self.material()
        if material is None or is_unix(address):
            return kind.insecure_channel(address, options=list(options))
        credentials = grpc.ssl_channel_credentials(material.authorities, material.key, material.chain)
        # Connections are not shared: one of another certificate would be somebody else.
        own = [("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1)]
        return kind.secure_channel(address, credentials, options=[*options, *own])


PLAIN = Transport(Tls())


def _configuration(material: Material) -> Any:
    return grpc.ssl_server_certificate_configuration([(material.key, material.chain)], material.authorities)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_ino, found.st_size)
