"""Start the agent as a daemon."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from prometheus_client import start_http_server

from migrator import logs, notify
from migrator.agent.config import AgentConfig, read_config
from migrator.agent.daemon import Agent
from migrator.agent.quiet import PRIORITY

SWITCH_INTERVAL_S = 0.0005
"""How long a thread of Python may keep another one waiting: the default of 5 ms is a whole switchover."""


def run(config_path: Path | str) -> None:
    """Run until SIGTERM or SIGINT. The switch is not touched at the end.

    Raises ConfigInvalid, FeatureMissing, and what the driver raises at its start.
    """
    config = read_config(Path(config_path))
    logs.configure(config.agent.log_level, as_json=config.agent.log_json)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    PRIORITY.may_rise = True
    asyncio.run(_run(config))


async def _run(config: AgentConfig) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if config.agent.metrics_port:
        start_http_server(config.agent.metrics_port, addr="127.0.0.1")
    agent = Agent(config)
    try:
        await agent.start()
        notify.ready()
        await stopped.wait()
    finally:
        await agent.stop()
