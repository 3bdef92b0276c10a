# SPDX-License-Identifier: GPL-2.0-only
"""`migrator pki`: a development authority, and certificates of agents, coordinator, operators and viewers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.cli.context import Context, Group, pass_context
from migrator.table import print_fields, print_json

if TYPE_CHECKING:
    from cryptography import x509

DIRECTORY = Path("/etc/migrator/pki")
_FOLDER = click.Path(path_type=Path, file_okay=False)
_ca = click.option("--ca", type=_FOLDER, default=DIRECTORY, show_default=True, help="Folder of the authority.")
_days = click.option("--days", type=click.IntRange(1, 36500), default=365, show_default=True, help="Valid for so long.")


@click.group(cls=Group)
def pki() -> None:
    """Certificates from an authority of our own, for labs, trials and small clusters."""


@pki.command()
@_ca
@click.option("--name", default="vm-netstate-migrator", show_default=True, help="What it is called.")
@click.option("--days", type=click.IntRange(1, 36500), default=3650, show_default=True, help="Valid for so long.")
@pass_context
def init(context: Context, ca: Path, name: str, days: int) -> None:
    """Make an authority. Whoever reads its key can be anyone: keep the folder where no agent runs."""
    from migrator.security.authority import create

    _print(context, create(ca, name, days=days).certificate)


@pki.command()
@click.argument("role", type=click.Choice(["agent", "coordinator", "operator", "viewer"]))
@click.argument("name")
@_ca
@_days
@click.option("--out", type=_FOLDER, help="Folder for ca.crt, tls.crt and tls.key; default: NAME in the authority's.")
@click.option("--alt", "names", metavar="NAME", multiple=True, help="A further DNS name or address; may be repeated.")
@pass_context
def issue(
    context: Context, role: str, name: str, ca: Path, days: int, out: Path | None, names: tuple[str, ...]
) -> None:
    """Make a key and a certificate. NAME of an agent is its host's, as in `agent.host`."""
    from migrator.security.authority import identity_of, load

    identity = identity_of(role, name)
    made = load(ca).issue(identity, out or ca / name, lifetime=timedelta(days=days), names=names)
    _print(context, made)


@pki.command()
@click.argument("folder", type=_FOLDER)
@_ca
@_days
@pass_context
def renew(context: Context, folder: Path, ca: Path, days: int) -> None:
    """Make a new key and certificate in place of those in FOLDER, for the same name. Daemons take them up at once."""
    from migrator.security.authority import load

    _print(context, load(ca).renew(folder, lifetime=timedelta(days=days)))


@pki.command()
@click.argument("certificate", type=click.Path(path_type=Path))
@_ca
@pass_context
def revoke(context: Context, certificate: Path, ca: Path) -> None:
    """Put CERTIFICATE (a file or folder) on the authority's list, which daemons read by [tls] revoked."""
    from migrator.security.authority import load, stored

    made = load(ca).revoke(stored(_file(certificate)))
    print_json({"list": str(made)}) if context.json else click.echo(made)


@pki.command()
@click.argument("certificate", type=click.Path(path_type=Path), default=DIRECTORY)
@pass_context
def show(context: Context, certificate: Path) -> None:
    """Say what CERTIFICATE (a file or folder) is: whose, from whom, until when. Never a key."""
    from migrator.security.authority import stored

    _print(context, stored(_file(certificate)))


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    return next((path / name for name in ("tls.crt", "ca.crt") if (path / name).exists()), path / "tls.crt")


def _print(context: Context, certificate: x509.Certificate) -> None:
    fields = described(certificate)
    print_json(fields) if context.json else print_fields(fields)


def described(certificate: x509.Certificate) -> dict[str, Any]:
    """What a certificate says, for people and programs."""
    from cryptography import x509

    from migrator.errors import CertificateInvalid
    from migrator.security.identity import of_certificate

    try:
        identity = str(of_certificate(certificate, {}))
    except CertificateInvalid:
        identity = ""
    names: list[str] = []
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]
    except x509.ExtensionNotFound:
        pass
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    return {
        "identity": identity,
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "names": ", ".join(names),
        "serial": f"{certificate.serial_number:x}",
        "begins": f"{certificate.not_valid_before_utc:%F %T}",
        "ends": f"{certificate.not_valid_after_utc:%F %T}",
        "days_left": max(left.days, 0),
    }
