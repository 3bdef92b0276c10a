# SPDX-License-Identifier: GPL-2.0-only
"""A small certificate authority: a folder with its certificate and key. For labs, trials and small clusters.

Keys are ECDSA on P-256, which every TLS library speaks. A certificate's URI says whom it stands for, its DNS names how
a server is checked, its extended key usage whether it can be a server's at all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

from migrator.errors import CertificateInvalid
from migrator.security.files import certificates, check_dates
from migrator.security.identity import DOMAIN, Identity, Role, of_certificate, parse, server_names
from migrator.security.settings import FILES

CERTIFICATE, KEY, REVOKED = "ca.crt", "ca.key", "revoked.crl"
AUTHORITY_DAYS = 3650
DAYS = 365
CLOCKS_DIFFER = timedelta(minutes=5)
USAGES = {
    Role.AGENT: [Usage.SERVER_AUTH, Usage.CLIENT_AUTH],
    Role.COORDINATOR: [Usage.SERVER_AUTH],
    Role.OPERATOR: [Usage.CLIENT_AUTH],
    Role.VIEWER: [Usage.CLIENT_AUTH],
}


@dataclass(frozen=True)
class Authority:
    """An authority that is there: `create` makes one, `load` finds one."""

    directory: Path
    certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey

    def issue(
        self,
        identity: Identity,
        out: Path,
        *,
        lifetime: timedelta = timedelta(days=DAYS),
        names: Sequence[str] = (),
        begins: datetime | None = None,
    ) -> x509.Certificate:
        """A new key and its certificate in the folder `out`, beside the authority's own certificate.

        `names`: further DNS names or addresses of a server. Files that are there are replaced, each at once; they
        belong to whom the folder belongs to. Raises CertificateInvalid.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        begins = begins or datetime.now(UTC)
        certificate = (
            _builder(identity.name, self.certificate.subject, key.public_key(), begins, lifetime)
            .add_extension(x509.SubjectAlternativeName(_alternatives(identity, names)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(USAGES[identity.role]), critical=False)
            .sign(self._key, SHA256())
        )
        make_folder(out)
        contents = (_pem(self.certificate), _pem(certificate), _key_pem(key))
        for name, content in zip(FILES, contents, strict=True):
            write(out / name, content, secret=name.endswith(".key"))
        return certificate

    def renew(self, out: Path, *, lifetime: timedelta = timedelta(days=DAYS)) -> x509.Certificate:
        """A new key and certificate for whom the one in the folder `out` stands. Raises CertificateInvalid."""
        old = stored(out / FILES[1])
        identity = of_certificate(old, {})
        names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        given = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
        further = [name for name in given if name not in server_names(identity)]
        return self.issue(identity, out, lifetime=lifetime, names=further)

    def revoke(self, certificate: x509.Certificate) -> Path:
        """Put it on the authority's list, which daemons read by [tls] revoked; returns the list's file."""
        path = self.directory / REVOKED
        entries = list(x509.load_pem_x509_crl(path.read_bytes())) if path.exists() else []
        if certificate.serial_number not in {entry.serial_number for entry in entries}:
            new = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
            entries.append(new.revocation_date(datetime.now(UTC)).build())
        self.write_list(entries)
        return path

    def write_list(self, entries: Sequence[x509.RevokedCertificate]) -> None:
        """Sign and write the list of what is revoked. Raises CertificateInvalid."""
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(now).next_update(now + timedelta(days=AUTHORITY_DAYS))
        for entry in entries:
            builder = builder.add_revoked_certificate(entry)
        write(self.directory / REVOKED, builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM))


def create(directory: Path, name: str = "vm-netstate-migrator", *, days: int = AUTHORITY_DAYS) -> Authority:
    """A new authority. Raises CertificateInvalid when there is one already."""
    if (directory / KEY).exists():
        raise CertificateInvalid(f"{directory} is an authority already", hint="`migrator pki show` tells which")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, subject, key.public_key(), datetime.now(UTC), timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, SHA256())
    )
    make_folder(directory)
    write(directory / KEY, _key_pem(key), secret=True)
    write(directory / CERTIFICATE, _pem(certificate))
    made = Authority(directory, certificate, key)
    made.write_list([])
    return made


def load(directory: Path) -> Authority:
    """The authority in a folder. Raises CertificateInvalid."""
    certificate = stored(directory / CERTIFICATE)
    check_dates(certificate, str(directory / CERTIFICATE))
    try:
        key = load_pem_private_key((directory / KEY).read_bytes(), None)
    except OSError as error:
        raise CertificateInvalid(f"{directory / KEY}: {error.strerror}", hint="`migrator pki init` makes one") from None
    except (ValueError, TypeError):
        raise CertificateInvalid(f"{directory / KEY}: no private key in PEM, without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CertificateInvalid(f"{directory / KEY}: not the key of {directory / CERTIFICATE}")
    return Authority(directory, certificate, key)


def stored(path: Path) -> x509.Certificate:
    """The first certificate in a file. Raises CertificateInvalid."""
    try:
        return certificates(path.read_bytes(), path)[0]
    except OSError as error:
        raise CertificateInvalid(
            f"{path}: {error.strerror}", hint="`migrator pki init` and `issue` make them"
        ) from None


def identity_of(role: str, name: str) -> Identity:
    """Raises CertificateInvalid, also for a name that a server's would be taken for."""
    identity = parse(f"{role}/{name}")
    if identity.name.lower().endswith(DOMAIN):
        raise CertificateInvalid(f"{name}: names that end with {DOMAIN} say roles", hint="give the host's own name")
    return identity


def make_folder(directory: Path) -> None:
    """Its owner's alone, who is that of the folder it is in; all may enter those above. Raises CertificateInvalid."""
    try:
        for path in reversed([one for one in (directory, *directory.parents) if not one.exists()]):
            path.mkdir(mode=0o700 if path == directory else 0o755)
            _give(path)
    except OSError as error:
        raise CertificateInvalid(f"{directory}: {error.strerror}") from None


def write(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Replace a file at once; a key is its owner's alone from its first moment. Raises CertificateInvalid."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            new.unlink()
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, 0o600 if secret else 0o644)
            file.flush()
            os.fsync(descriptor)
        _give(new)
        new.replace(path)
    except OSError as error:
        raise CertificateInvalid(f"{path}: {error.strerror}") from None


def _give(path: Path) -> None:
    owner = path.parent.stat()
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def _builder(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begins: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - CLOCKS_DIFFER)
        .not_valid_after(begins + lifetime)
    )


def _alternatives(identity: Identity, names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(identity))]
    for name in (*server_names(identity), *names):
        try:
            found.append(x509.IPAddress(ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
