"""The coordinator's process: journal, service, metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import start_http_server

from migrator import logs, notify
from migrator.coordinator.cluster import Cluster
from migrator.coordinator.service import serve
from migrator.coordinator.settings import Settings, load
from migrator.coordinator.sqlite import SqliteJournal
from migrator.errors import ConfigInvalid
from migrator.security.identity import Role
from migrator.security.transport import Transport

GRACE_S = 1.0

log = structlog.get_logger()


def run(config: Path | None = None, **options: Any) -> int:
    """Serve until SIGTERM or SIGINT. `options` replace those of the file (`migrator.coordinator.settings.Settings`).

    Raises ConfigInvalid, CertificateInvalid, JournalFailed.
    """
    settings = load(config, **options)
    logs.configure(settings.log_level, as_json=settings.log_json)
    asyncio.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    transport = Transport(settings.tls, Role.COORDINATOR)
    journal = _open_journal(settings.state_dir)
    try:
        cluster = Cluster(journal, settings.deadlines)
        cluster.start()
        server, port = await serve(
            cluster, settings.listen, transport, settings.socket_group, Role(settings.socket_role)
        )
        if settings.metrics_port:
            start_http_server(settings.metrics_port, settings.metrics_address)
        log.info("coordinator serves", listen=settings.listen, port=port, revision=cluster.store.revision)
        notify.ready()
        await stop.wait()
        log.info("coordinator stops")
        cluster.stop()
        await server.stop(GRACE_S)
    finally:
        journal.close()


def _open_journal(state_dir: Path) -> SqliteJournal:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigInvalid(f"state_dir {state_dir}: {error.strerror}") from None
    return SqliteJournal(state_dir / "journal.sqlite")
