# SPDX-License-Identifier: GPL-2.0-only
"""Who a certificate stands for: a role, and in it a name. An agent's name is that of its host."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from cryptography import x509
from cryptography.x509.oid import NameOID

from migrator.errors import CertificateInvalid, Forbidden

SCHEME = "migrator"
DOMAIN = "migrator.internal"
"""The names that servers are checked by end so. `.internal` is reserved for private use and resolves nowhere."""

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


class Role(StrEnum):
    AGENT = "agent"
    COORDINATOR = "coordinator"
    OPERATOR = "operator"
    VIEWER = "viewer"  # may look, and change nothing
    ANYONE = "anyone"  # without TLS nobody can be told from anybody: may do all, on a network that is trusted


@dataclass(frozen=True)
class Identity:
    """Written as its URI: migrator://agent/h1."""

    role: Role
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.role}/{self.name}"

    def require_host(self, host: str, what: str) -> None:
        """An agent speaks for its own host only. Raises Forbidden; other roles are not bound to a host."""
        if self.role is Role.AGENT and self.name != host:
            raise Forbidden(
                f"{self} may not {what} as host {host!r}", hint="`agent.host` has to be the name in the certificate"
            )


ANYONE = Identity(Role.ANYONE, "")
ROOT = Identity(Role.OPERATOR, "uid-0")
"""Who calls by a unix socket and could as well end the daemon."""
CALLER: ContextVar[Identity] = ContextVar("caller", default=ANYONE)
"""Whose call is being handled."""


def parse(text: str) -> Identity:
    """ROLE/NAME, or the URI. Raises CertificateInvalid."""
    role, _, name = text.removeprefix(f"{SCHEME}://").partition("/")
    if role not in set(Role) - {Role.ANYONE} or not NAME.fullmatch(name):
        known = ", ".join(sorted(set(Role) - {Role.ANYONE}))
        raise CertificateInvalid(f"{text!r} is no identity", hint=f"ROLE/NAME, where ROLE is one of {known}")
    return Identity(Role(role), name)


def server_names(identity: Identity) -> list[str]:
    """DNS names by which a server's certificate is checked, the one that says its role first; none for clients."""
    if identity.role is Role.AGENT:
        return [f"{identity.name}.agent.{DOMAIN}", identity.name]
    if identity.role is Role.COORDINATOR:
        return [f"coordinator.{DOMAIN}", identity.name]
    return []


def of_certificate(certificate: x509.Certificate, mapping: Mapping[str, str]) -> Identity:
    """Whose certificate it is.

    Without a `mapping` its one URI migrator://ROLE/NAME says so. With one, and then only by that, its DNS names, or its
    common name if it has none: a key is a name, or "*." and the end of names, whose first part is then the name where
    the value is "ROLE/*". Raises CertificateInvalid when nothing says who it is, or not clearly.
    """
    found = _mapped(certificate, mapping) if mapping else _written(certificate)
    if len(found) != 1:
        seen = ", ".join(sorted({str(one) for one in found})) or "nobody"
        raise CertificateInvalid(
            f"certificate {subject(certificate)} stands for {seen}",
            hint="it needs one name of [tls] identities" if mapping else "it needs one URI migrator://ROLE/NAME",
        )
    return found.pop()


def subject(certificate: x509.Certificate) -> str:
    """For people: what is written on it. Always one line."""
    return (
        repr(certificate.subject.rfc4514_string()) if certificate.subject else f"serial {certificate.serial_number:x}"
    )


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None


def _written(certificate: x509.Certificate) -> set[Identity]:
    names = _names(certificate)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    return {parse(uri) for uri in uris if uri.startswith(f"{SCHEME}://")}


def _mapped(certificate: x509.Certificate, mapping: Mapping[str, str]) -> set[Identity]:
    names = _names(certificate)
    dns = names.get_values_for_type(x509.DNSName) if names else []
    common = [str(one.value) for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return {identity for name in dns or common if (identity := _looked_up(name.lower(), mapping))}


def _looked_up(name: str, mapping: Mapping[str, str]) -> Identity | None:
    for pattern, value in mapping.items():
        if pattern.lower() == name:
            return parse(value)
    first, _, rest = name.partition(".")
    for pattern, value in mapping.items():
        if rest and pattern.lower() == f"*.{rest}":
            return parse(value.replace("*", first))
    return None
