"""`migrator agent`, `migrator coordinator`, `migrator doctor`: the daemons and what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from migrator.cli.context import Command, Context, pass_context
from migrator.errors import ConfigInvalid, exit_code
from migrator.table import print_json, print_table

SOON_DAYS = 30
CERTIFICATES = frozenset({"certificate"})
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=Command)
@click.option("--config", type=_FILE, default=Path("/etc/migrator/agent.toml"), show_default=True, help="TOML file.")
def agent(config: Path) -> None:
    """Run this host's agent until SIGTERM. Ports go on passing frames when it ends."""
    from migrator.agent.main import run

    run(config)


@click.command(cls=Command)
@click.option("--config", type=_FILE, help="TOML file with a table [coordinator].")
@click.option("--listen", metavar="ADDR", multiple=True, help="host:port or unix:PATH; may be given several times.")
@click.option("--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Directory of the journal.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="Serve Prometheus metrics here; 0: do not.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least level to log.")
def coordinator(config: Path | None, listen: tuple[str, ...], **options: Any) -> int:
    """Run the cluster's coordinator until SIGTERM. Running VMs do not need it."""
    from migrator.coordinator.main import run

    return run(config, listen=list(listen) or None, **options)


@click.command(cls=Command)
@click.option("--config", type=_FILE, help="The agent's TOML file, for its driver and options.")
@click.option("--driver", help="Check for this driver instead of the one in the file.")
@pass_context
def doctor(context: Context, config: Path | None, driver: str | None) -> int:
    """Check what this host needs to run an agent, and say how to get what is missing."""
    from datapath.errors import FeatureMissing
    from datapath.registry import driver as find

    name, options = _driver_of(config)
    rows = [*find(driver or name).check(options), *_certificates(config)]
    if context.json:
        print_json([{"feature": feature, "present": present, "hint": hint} for feature, present, hint in rows])
    else:
        print_table(
            ("FEATURE", "", "WHAT TO DO"),
            [(f, "ok" if there else "missing", h if not there or f in CERTIFICATES else "") for f, there, h in rows],
        )
    return 0 if all(there for _, there, _ in rows) else exit_code(FeatureMissing(""))


def _certificates(config: Path | None) -> list[tuple[str, bool, str]]:
    """A row for the agent's certificate. One that is about to end is there, and says so."""
    if config is None:
        return []
    from datetime import UTC, datetime

    from migrator.agent.config import read_config
    from migrator.errors import CertificateInvalid
    from migrator.security.identity import Role
    from migrator.security.transport import Transport

    settings = read_config(config)
    try:
        material = Transport(settings.tls, Role.AGENT, settings.agent.host).material()
    except CertificateInvalid as error:
        return [("certificate", False, str(error))]
    if material is None:
        return [("certificate", True, "none: connections are not encrypted" if settings.tls.insecure else "")]
    left = (material.certificate.not_valid_after_utc - datetime.now(UTC)).days
    return [("certificate", True, f"ends in {left} days: renew it" if left < SOON_DAYS else "")]


def _driver_of(config: Path | None) -> tuple[str, dict[str, Any]]:
    """Name and options of the driver in an agent's configuration; the default driver without one."""
    if config is None:
        return "ebpf", {}
    if not config.exists():
        raise ConfigInvalid(f"{config}: no such file", hint="give the agent's file with --config")
    from migrator.agent.config import read_config

    section = read_config(config).driver
    return section.name, section.all_options
