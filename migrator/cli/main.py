"""`migrator`: the one command that everything is started with."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from datapath.errors import Error
from migrator.cli.context import Context, Group, shared_options
from migrator.errors import exit_code

COMMANDS = {
    # name -> (module below migrator.cli, attribute); modules are read when their command is asked for
    "agent": ("daemons", "agent"),
    "coordinator": ("daemons", "coordinator"),
    "doctor": ("daemons", "doctor"),
    "host": ("host", "host"),
    "network": ("network", "network"),
    "address-set": ("address_set", "address_set"),
    "acl": ("acl", "acl"),
    "policy": ("acl", "acl"),
    "port": ("port", "port"),
    "apply": ("apply", "apply"),
    "vm": ("vm", "vm"),
    "migrate": ("migrate", "migrate"),
    "migration": ("migration", "migration"),
    "watch": ("watch", "watch"),
    "trace": ("trace", "trace"),
    "conntrack": ("conntrack", "conntrack"),
    "checkpoint": ("snapshot", "checkpoint"),
    "restore": ("snapshot", "restore"),
    "inspect": ("snapshot", "inspect"),
    "diff": ("snapshot", "diff"),
    "libvirt": ("libvirt", "libvirt"),
    "pki": ("pki", "pki"),
    "version": ("version", "version"),
    "demo": ("demo", "demo"),
    "completion": ("completion", "completion"),
}
ALIASES = frozenset({"policy"})
INTERRUPTED = 130  # as shells say it of SIGINT


class _Lazy(Group):
    """Reads a command's module when it is asked for, so that each starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [name for name in COMMANDS if name not in ALIASES]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(f"migrator.cli.{module}"), attribute)
        return command


cli = _Lazy(
    name="migrator",
    help="Moves all network state of a virtual machine with it when it migrates.",
    params=shared_options(top=True),
    epilog="docs/cli.md tells all of it, and what the exit codes mean.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Every error is one line on standard error."""
    context = Context()
    try:
        given = list(arguments) if arguments is not None else None
        code = cli.main(args=given, prog_name="migrator", obj=context, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        return _usage(error)
    except Error as error:
        return _fail(str(error), exit_code(error))
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except (BrokenPipeError, SystemExit):  # click ends itself so when nobody reads its output any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if context.verbose > 1:
            traceback.print_exc()
        return _fail(f"internal error: {type(error).__name__}: {error} (-vv shows where)", 1)


def _usage(error: click.ClickException) -> int:
    ctx = getattr(error, "ctx", None)
    hint = f" (see `{ctx.command_path} --help`)" if ctx is not None else ""
    return _fail(" ".join(error.format_message().split()) + hint, error.exit_code)


def _fail(message: str, code: int) -> int:
    click.echo(f"migrator: {' '.join(message.split())}", err=True)
    return code


def main() -> None:
    """Entry point."""
    sys.exit(run())


if __name__ == "__main__":
    main()
