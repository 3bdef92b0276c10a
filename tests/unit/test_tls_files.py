# SPDX-License-Identifier: GPL-2.0-only
"""Certificates from the small authority, and each way in which files do not fit: what is said, and what to do."""

from __future__ import annotations

import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from migrator.agent.config import AgentConfig
from migrator.coordinator.settings import Settings
from migrator.errors import CertificateInvalid
from migrator.security import authority
from migrator.security.files import read
from migrator.security.identity import Identity, Role, of_certificate, parse
from migrator.security.settings import Tls, folder, is_local
from migrator.security.transport import Transport

H1 = Identity(Role.AGENT, "h1")


@pytest.fixture
def ca(tmp_path: Path) -> authority.Authority:
    return authority.create(tmp_path / "pki")


@pytest.mark.parametrize("role", ["agent", "coordinator", "operator", "viewer"])
def test_what_is_issued_is_read_as_whom_it_stands_for(ca: authority.Authority, tmp_path: Path, role: str) -> None:
    identity = authority.identity_of(role, "h1.example")
    ca.issue(identity, tmp_path / "out")
    material = read(folder(tmp_path / "out"))
    assert material.identity == identity
    assert str(identity) == f"migrator://{role}/h1.example"
    key = load_pem_private_key(material.key, None)
    assert key.public_key() == material.certificate.public_key()


def test_keys_are_their_owners_alone_and_the_authority_is_not_replaced(ca: authority.Authority, tmp_path: Path) -> None:
    ca.issue(H1, tmp_path / "out")
    for key in (tmp_path / "pki" / "ca.key", tmp_path / "out" / "tls.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for place in ("pki", "out"):
        assert stat.S_IMODE((tmp_path / place).stat().st_mode) == 0o700
    assert not list(tmp_path.rglob(".*"))
    before = (tmp_path / "pki" / "ca.key").read_bytes()
    with pytest.raises(CertificateInvalid, match="authority already"):
        authority.create(tmp_path / "pki")
    assert (tmp_path / "pki" / "ca.key").read_bytes() == before


def test_a_renewed_certificate_has_another_key_and_the_same_names(ca: authority.Authority, tmp_path: Path) -> None:
    old = ca.issue(H1, tmp_path / "out", names=["h1.example.org", "192.0.2.7"])
    new = authority.load(tmp_path / "pki").renew(tmp_path / "out")
    assert new.serial_number != old.serial_number and new.public_key() != old.public_key()

    def names(certificate: x509.Certificate) -> set[x509.GeneralName]:
        return set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)

    assert names(new) == names(old) and x509.DNSName("h1.example.org") in names(new)
    assert read(folder(tmp_path / "out")).certificate == new


def test_only_those_who_serve_can_be_servers(ca: authority.Authority, tmp_path: Path) -> None:
    server = x509.oid.ExtendedKeyUsageOID.SERVER_AUTH
    for role in (Role.AGENT, Role.COORDINATOR, Role.OPERATOR, Role.VIEWER):
        made = ca.issue(Identity(role, "x"), tmp_path / role)
        usages = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (server in usages) == (role in {Role.AGENT, Role.COORDINATOR})


def test_no_name_is_issued_that_passes_for_a_role(tmp_path: Path) -> None:
    for name in ("coordinator.migrator.internal", "h2.agent.MIGRATOR.internal"):
        with pytest.raises(CertificateInvalid, match=r"migrator\.internal"):
            authority.identity_of("agent", name)
    for name in ("", "../h1", "a b", "a/b", "-a", "a" * 70, "ü", "h1\n"):
        with pytest.raises(CertificateInvalid):
            authority.identity_of("agent", name)
    assert not list(tmp_path.iterdir())


def other_authority(out: Path) -> None:
    authority.create(out.parent / "other").issue(H1, out.parent / "others")
    (out / "tls.crt").write_bytes((out.parent / "others" / "tls.crt").read_bytes())
    (out / "tls.key").write_bytes((out.parent / "others" / "tls.key").read_bytes())


def other_key(out: Path) -> None:
    authority.load(out.parent / "pki").issue(H1, out.parent / "others")
    (out / "tls.key").write_bytes((out.parent / "others" / "tls.key").read_bytes())


def past(out: Path) -> None:
    begins = datetime.now(UTC) - timedelta(days=2)
    authority.load(out.parent / "pki").issue(H1, out, begins=begins, lifetime=timedelta(days=1))


def future(out: Path) -> None:
    authority.load(out.parent / "pki").issue(H1, out, begins=datetime.now(UTC) + timedelta(days=1))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no certificate": (
        lambda out: (out / "tls.crt").unlink(),
        r"tls\.certificate: .*tls\.crt: No such file.*pki issue",
    ),
    "no key": (lambda out: (out / "tls.key").unlink(), r"tls\.key: .*tls\.key: No such file"),
    "no authority": (lambda out: (out / "ca.crt").unlink(), r"tls\.ca: .*ca\.crt: No such file"),
    "a folder": (lambda out: ((out / "tls.key").unlink(), (out / "tls.key").mkdir()), r"tls\.key: .*directory"),
    "readable by all": (lambda out: (out / "tls.key").chmod(0o644), r"others may read.*mode 0644.*chmod 0600"),
    "writable by a group": (lambda out: (out / "tls.key").chmod(0o660), r"others may read.*mode 0660"),
    "not a key": (lambda out: (out / "tls.key").write_text("SECRET"), r"tls\.key: no private key in PEM"),
    "not a certificate": (lambda out: (out / "tls.crt").write_text("x"), r"tls\.crt: no certificate in PEM"),
    "empty": (lambda out: (out / "ca.crt").write_text(""), r"ca\.crt: no certificate in PEM"),
    "the key of another": (other_key, r"tls\.key: not the key of .*tls\.crt"),
    "of another authority": (other_authority, r"tls\.crt: not issued by the authority in .*ca\.crt"),
    "expired": (past, r"tls\.crt: expired at 20.*pki renew"),
    "not valid yet": (future, r"tls\.crt: not valid before 20.*clock"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_files_that_cannot_be_used_are_named_with_what_to_do(
    ca: authority.Authority, tmp_path: Path, case: str
) -> None:
    out = tmp_path / "out"
    ca.issue(H1, out)
    read(folder(out))
    breaks, says = BROKEN[case]
    breaks(out)
    with pytest.raises(CertificateInvalid, match=says) as caught:
        read(folder(out))
    assert "SECRET" not in str(caught.value) and "BEGIN" not in str(caught.value)


def test_a_key_that_a_group_may_read_is_taken(ca: authority.Authority, tmp_path: Path) -> None:
    ca.issue(H1, tmp_path / "out")
    (tmp_path / "out" / "tls.key").chmod(0o640)
    assert read(folder(tmp_path / "out")).identity == H1


def test_a_daemon_takes_no_certificate_of_another_role_or_host(ca: authority.Authority, tmp_path: Path) -> None:
    ca.issue(H1, tmp_path / "out")
    assert Transport(folder(tmp_path / "out"), Role.AGENT, "h1").identity == H1
    with pytest.raises(CertificateInvalid, match=r"agent/h1, not of role coordinator"):
        Transport(folder(tmp_path / "out"), Role.COORDINATOR)
    with pytest.raises(CertificateInvalid, match=r"agent/h1, but this is 'h2'.*agent\.host"):
        Transport(folder(tmp_path / "out"), Role.AGENT, "h2")


def own_certificate(ca: authority.Authority, common: str, *dns: str) -> x509.Certificate:
    """One as an operator's own authority may make it: without our URI."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)]),
        issuer_name=ca.certificate.subject,
        public_key=ca.certificate.public_key(),
        serial_number=1,
        not_valid_before=now,
        not_valid_after=now + timedelta(days=1),
    )
    if dns:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in dns]), False)
    return builder.sign(ca._key, ca.certificate.signature_hash_algorithm)  # type: ignore[arg-type]


MAPPING = {"ctl.example.org": "coordinator/ctl", "*.hosts.example.org": "agent/*", "alice": "operator/alice"}


def test_names_of_an_operators_own_certificates_are_mapped(ca: authority.Authority) -> None:
    def whose(common: str, *dns: str) -> str:
        return str(of_certificate(own_certificate(ca, common, *dns), MAPPING))

    assert whose("x", "ctl.example.org") == "migrator://coordinator/ctl"
    assert whose("x", "H7.hosts.example.org", "other.example.org") == "migrator://agent/h7"
    assert whose("alice") == "migrator://operator/alice"
    for common, dns in (
        ("alice", ["mallory.example.org"]),  # a common name counts only without DNS names
        ("bob", []),
        ("x", ["a.b.hosts.example.org"]),
        ("x", ["ctl.example.org", "h1.hosts.example.org"]),  # two at once
    ):
        with pytest.raises(CertificateInvalid, match="stands for"):
            whose(common, *dns)


def test_with_a_mapping_nothing_else_counts(ca: authority.Authority, tmp_path: Path) -> None:
    made = ca.issue(Identity(Role.OPERATOR, "mallory"), tmp_path / "out")
    assert of_certificate(made, {}).role is Role.OPERATOR
    with pytest.raises(CertificateInvalid, match="stands for nobody"):
        of_certificate(made, MAPPING)


@pytest.mark.parametrize("text", ["", "agent", "agent/", "anyone/x", "root/x", "agent/a/b", "migrator://agent/"])
def test_what_is_no_identity(text: str) -> None:
    with pytest.raises(CertificateInvalid):
        parse(text)


PATHS = {"ca": "/a", "certificate": "/b", "key": "/c"}


@pytest.mark.parametrize(
    ("tls", "says"),
    [
        ({"ca": "/a"}, "belong together"),
        ({**PATHS, "insecure": True}, "exclude each other"),
        ({**PATHS, "agent_name": "agents.example.org"}, "any agent passes for any other"),
        ({**PATHS, "identities": {"a": "root/x"}}, "no identity"),
        ({**PATHS, "certficate": "/x"}, "certficate"),
    ],
)
def test_wrong_tables_are_refused(tls: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Tls.model_validate(tls)


LOCAL = ["127.0.0.1:7400", "[::1]:1", "localhost:7400", "unix:/run/x.sock", "127.9.9.9:0"]
OPEN = ["0.0.0.0:7400", "10.0.0.1:7400", "[::]:7400", "h1:7400", "localhost.example.org:1", "127.0.0.1.example.org:1"]


@pytest.mark.parametrize("address", [*LOCAL, *OPEN])
def test_without_certificates_only_this_host_is_reached_unless_it_is_written(address: str) -> None:
    assert is_local(address) == (address in LOCAL)

    def coordinator(**tls: object) -> Settings:
        return Settings.model_validate({"listen": ["127.0.0.1:0", address], "tls": tls})

    def agent(where: str, **tls: object) -> AgentConfig:
        addresses = {"listen": "127.0.0.1:0", "coordinator": "unix:/x", where: address}
        return AgentConfig.model_validate({"agent": {"host": "h1", **addresses}, "tls": tls})

    if address in LOCAL:
        coordinator(), agent("listen"), agent("coordinator")
    else:
        for attempt in (coordinator, lambda: agent("listen"), lambda: agent("coordinator")):
            with pytest.raises(ValidationError, match=r"\[tls\].*insecure = true"):
                attempt()
    coordinator(insecure=True), agent("listen", insecure=True), agent("coordinator", insecure=True)
    coordinator(**PATHS), agent("listen", **PATHS), agent("coordinator", **PATHS)
