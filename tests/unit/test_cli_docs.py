"""docs/cli.md says exactly what --help says: every command, every option, every exit code, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from migrator.cli.main import ALIASES, cli
from migrator.errors import EXTERNAL, OUTCOMES

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
SHARED = {"--coordinator", "--agent", "--tls", "--json", "-v", "--verbose", "-h", "--help"}


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    ctx = click.Context(command)
    for name in command.list_commands(ctx):
        child = command.get_command(ctx, name)
        assert child is not None
        if not (path[1:] and name == "apply"):  # every noun's apply is the same command
            yield from leaves(child, (*path, name))


COMMANDS = dict(leaves(cli, ("migrator",)))
SECTIONS = {
    re.match(r"(migrator(?: [a-z-]+)+)", heading)[1]: body
    for heading, body in re.findall(r"^### (.*)\n((?:.*\n)*?)(?=^##|\Z)", TEXT, flags=re.M)
}


def options(command: click.Command) -> set[str]:
    names = {name for param in command.params if isinstance(param, click.Option) for name in param.opts}
    return names | {name for p in command.params if isinstance(p, click.Option) for name in p.secondary_opts}


def test_every_command_is_described_and_no_other() -> None:
    assert set(SECTIONS) == set(COMMANDS)
    assert all(f"`{alias}`" in TEXT for alias in ALIASES)


@pytest.mark.parametrize("path", sorted(COMMANDS))
def test_every_option_is_described_and_no_other(path: str) -> None:
    described = set(re.findall(r"`(--?[a-z][a-z-]*)[^`]*`", SECTIONS[path]))
    assert described - SHARED == options(COMMANDS[path]) - SHARED


def test_shared_options_are_described() -> None:
    head = TEXT[: TEXT.index("## Exit codes")]
    assert all(f"`{name}" in head for name in SHARED)


def test_every_exit_code_is_described_and_no_other() -> None:
    table = TEXT[TEXT.index("## Exit codes") : TEXT.index("## Daemons")]
    described = {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.M)}
    assert described == {code for _, code in EXTERNAL.values()} | set(OUTCOMES.values()) | {2, 130}
