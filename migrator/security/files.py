# SPDX-License-Identifier: GPL-2.0-only
"""A process's certificate, its key and the authorities it trusts, as read from files and found to fit."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from migrator.errors import CertificateInvalid
from migrator.security.identity import Identity, of_certificate
from migrator.security.settings import Tls

BYTES_MAX = 1 << 20
RENEW = "`migrator pki renew`, or your own authority"
OTHERS = stat.S_IRWXO | stat.S_IWGRP
"""Rights on a key that nobody but its owner may have; a group may read it."""


@dataclass(frozen=True)
class Material:
    """What TLS is spoken with. The key never appears in a repr."""

    authorities: bytes
    chain: bytes
    key: bytes = field(repr=False)
    identity: Identity
    certificate: x509.Certificate = field(repr=False)


def read(tls: Tls, now: datetime | None = None) -> Material:
    """All three files, checked against each other and the clock. Raises CertificateInvalid: which file, what to do."""
    assert tls.ca and tls.certificate and tls.key
    authorities, chain = _bytes(tls.ca, "ca"), _bytes(tls.certificate, "certificate")
    trusted, own = certificates(authorities, tls.ca), certificates(chain, tls.certificate)
    key = _key(tls.key, own[0], tls.certificate)
    check_dates(own[0], str(tls.certificate), now)
    if not _issued(own, trusted):
        raise CertificateInvalid(
            f"{tls.certificate}: not issued by the authority in {tls.ca}, but by {own[-1].issuer.rfc4514_string()!r}",
            hint="both files come from one `migrator pki init`; intermediate authorities stand behind the certificate",
        )
    return Material(authorities, chain, key, of_certificate(own[0], tls.identities), own[0])


def check_dates(certificate: x509.Certificate, name: str, now: datetime | None = None) -> None:
    """Raises CertificateInvalid for one that is not valid yet or no longer."""
    now = now or datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateInvalid(f"{name}: expired at {certificate.not_valid_after_utc:%F %T} UTC", hint=RENEW)
    if now < certificate.not_valid_before_utc:
        raise CertificateInvalid(
            f"{name}: not valid before {certificate.not_valid_before_utc:%F %T} UTC", hint="is this host's clock right?"
        )


def certificates(pem: bytes, path: Path | str) -> list[x509.Certificate]:
    """All certificates of a PEM file, at least one. Raises CertificateInvalid."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise CertificateInvalid(f"{path}: no certificate in PEM: {error}") from None


def serials(path: Path, material: Material | None) -> frozenset[int]:
    """Serial numbers on a list of what one of the authorities has revoked. Raises CertificateInvalid."""
    pem = _bytes(path, "revoked")
    try:
        found = x509.load_pem_x509_crl(pem)
    except ValueError as error:
        raise CertificateInvalid(f"tls.revoked: {path}: no list in PEM: {error}") from None
    trusted = certificates(material.authorities, "tls.ca") if material else []
    if not any(found.is_signature_valid(one.public_key()) for one in trusted):  # type: ignore[arg-type]
        raise CertificateInvalid(f"tls.revoked: {path}: signed by none of the authorities in tls.ca")
    return frozenset(entry.serial_number for entry in found)


def _bytes(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(BYTES_MAX)
    except OSError as error:
        raise CertificateInvalid(
            f"tls.{what}: {path}: {error.strerror}", hint="`migrator pki issue` makes one; its owner runs the daemon"
        ) from None


def _key(path: Path, certificate: x509.Certificate, certificate_path: Path) -> bytes:
    pem = _bytes(path, "key")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & OTHERS:
        raise CertificateInvalid(
            f"tls.key: {path}: others may read or change it (mode {mode:04o})", hint=f"chmod 0600 {path}"
        )
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):  # the library's words may show what is in the file
        raise CertificateInvalid(f"tls.key: {path}: no private key in PEM, without a password") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise CertificateInvalid(
            f"tls.key: {path}: not the key of {certificate_path}", hint="both are made anew together"
        )
    return pem


def _issued(chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate]) -> bool:
    return all(_by(one, issuer) for one, issuer in pairwise(chain)) and any(_by(chain[-1], one) for one in trusted)


def _by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return certificate == authority
    return True
