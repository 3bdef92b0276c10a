"""Logging of the daemons: one line an event on standard error, JSON for machines or text for people."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str, *, as_json: bool) -> None:
    """Set up structlog once for the process. `level` is a name of logging's."""
    chain: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        chain += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        # Without the values of variables, which a traceback for people would show: keys and tokens are among them.
        plain = structlog.dev.plain_traceback
        chain.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=chain,
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    switches = logging.getLogger("datapath")  # switches know the library's logging only
    switches.handlers = [_Forward()]
    switches.setLevel(threshold)


class _Forward(logging.Handler):
    """What a switch has to say, in the same form as all else."""

    def emit(self, record: logging.LogRecord) -> None:
        error = {"exc_info": record.exc_info} if record.exc_info else {}
        structlog.get_logger().log(record.levelno, record.getMessage(), **error)
