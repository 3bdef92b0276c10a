# SPDX-License-Identifier: GPL-2.0-only
"""The table `[tls]`, which the files of agents, coordinator and command share, and where one may listen without it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from migrator.errors import CertificateInvalid
from migrator.security.identity import DOMAIN, parse

FILES = ("ca.crt", "tls.crt", "tls.key")
"""Names of authority, certificate and key in a folder that `migrator pki issue` makes."""


class Tls(BaseModel):
    """Paths of PEM files: `ca` (one or several authorities), `certificate` (the chain, its own first) and `key`.

    `insecure`: plain connections over any network. `coordinator_name` and `agent_name` are the DNS names that the
    certificates of servers must have. `identities`: see migrator.security.identity.of_certificate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False
    coordinator_name: str = f"coordinator.{DOMAIN}"
    agent_name: str = f"{{host}}.agent.{DOMAIN}"
    identities: dict[str, str] = {}
    revoked: Path | None = None

    @property
    def there(self) -> bool:
        return self.ca is not None

    @field_validator("agent_name")
    @classmethod
    def _names_the_host(cls, value: str) -> str:
        if "{host}" not in value:
            raise ValueError("must contain {host}: else any agent passes for any other")
        return value

    @field_validator("identities")
    @classmethod
    def _are_identities(cls, value: dict[str, str]) -> dict[str, str]:
        for name, identity in value.items():
            try:
                parse(identity.replace("*", "x") if name.startswith("*.") else identity)
            except CertificateInvalid as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _all_or_none(self) -> Tls:
        given = [name for name in ("ca", "certificate", "key") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"ca, certificate and key belong together; given: {', '.join(given)}")
        if given and self.insecure:
            raise ValueError("insecure and certificates exclude each other")
        return self

    def require_for(self, addresses: Iterable[str], key: str) -> None:
        """Without certificates a daemon is reached and reaches out on this host only. Raises ValueError."""
        for address in addresses:
            if not (self.there or self.insecure or is_local(address)):
                raise ValueError(
                    f"{key}: {address} is not this host's own, so [tls] needs ca, certificate and key "
                    "(`migrator pki issue` makes them), or insecure = true on a network that is trusted"
                )


def folder(directory: Path) -> Tls:
    """The settings for a folder as `migrator pki issue` makes it."""
    ca, certificate, key = (directory / name for name in FILES)
    return Tls(ca=ca, certificate=certificate, key=key)


def is_unix(address: str) -> bool:
    return address.startswith("unix:")


def is_local(address: str) -> bool:
    """Does this address lead to this host for certain?"""
    host = address.rpartition(":")[0].removeprefix("ipv4:").removeprefix("ipv6:").strip("[]")
    if is_unix(address) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
