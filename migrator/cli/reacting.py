"""A command for each change: the change as JSON on its standard input, and in variables of its environment."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from datapath.errors import Error
from migrator.errors import ConfigInvalid

VALUE_MAX = 4096
"""Longer values are on the standard input only: an environment has its limits."""
SHELL = "/bin/sh"


@dataclass(frozen=True)
class Told:
    """A change as it is printed and given to commands. `op`, `sort`: for filters; `end`: the snapshot ends here.

    `shown` gives its line, `fields` what its variables are made of, by their prefix: only who needs them pays for them.
    """

    op: str
    sort: str
    body: Mapping[str, Any]
    shown: Callable[[], str]
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    snapshot: bool = False
    end: bool = False

    @property
    def line(self) -> str:
        return self.shown()

    @property
    def variables(self) -> dict[str, str]:
        return {
            name: text for prefix, values in self.fields.items() for name, text in variables(prefix, values).items()
        }


def variables(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Fields as variables: MIGRATOR_RECORD_LPORT=443. Lists, maps and truth values are JSON."""
    named = {f"MIGRATOR_{prefix}{name.upper().replace('-', '_')}": _text(value) for name, value in values.items()}
    return {name: text for name, text in named.items() if len(text) <= VALUE_MAX and "\0" not in text}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def command(text: str, *, shell: bool) -> list[str]:
    """What to run: words as a shell would split them, or, where it is asked for, the shell itself.

    Raises ConfigInvalid when there is no such program.
    """
    if shell:
        return [SHELL, "-c", text]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigInvalid(f"exec: {error}") from None
    if not words or shutil.which(words[0]) is None:
        program = words[0] if words else ""
        raise ConfigInvalid(f"exec: no program {program!r}", hint="--shell runs what is no single program")
    return words


class Reaction:
    """Runs the command for one change after the other, or `jobs` side by side, which keeps no order.

    `run` returns when there is room for the next: a slow command slows the watch down, which then is told of what
    became of the rest in the end. Each exit code that is not 0 is warned of.
    """

    def __init__(self, words: list[str], *, jobs: int, stop: bool, warn: Callable[[str], None]) -> None:
        self._words, self._stop, self._warn = words, stop, warn
        self._jobs = ThreadPoolExecutor(jobs, thread_name_prefix="exec") if jobs > 1 else None
        self._room = threading.Semaphore(jobs)
        self._failed = ""

    def run(self, told: Told) -> None:
        """Raises Error when a command has failed and the watch is to stop then."""
        if self._jobs is None:
            self._one(told)
        else:
            self._room.acquire()
            self._jobs.submit(self._beside, told)
        self._check()

    def finish(self) -> None:
        """Wait for what runs. Raises as `run`."""
        if self._jobs is not None:
            self._jobs.shutdown()
        self._check()

    def _beside(self, told: Told) -> None:
        try:
            self._one(told)
        finally:
            self._room.release()

    def _check(self) -> None:
        if self._failed and self._stop:
            raise Error(self._failed, hint="`--on-failure go-on` goes on")

    def _one(self, told: Told) -> None:
        given = json.dumps(told.body, ensure_ascii=False).encode() + b"\n"
        environment = {**_inherited(), **told.variables}
        try:
            done = subprocess.run(self._words, input=given, env=environment, check=False)
        except OSError as error:
            self._fail(f"the command could not be run: {error.strerror}", told)
            return
        if done.returncode < 0:
            self._fail(f"the command was ended by signal {-done.returncode}", told)
        elif done.returncode:
            self._fail(f"the command ended with exit code {done.returncode}", told)

    def _fail(self, why: str, told: Told) -> None:
        self._failed = f"{why}: {told.line}"
        if not self._stop:
            self._warn(self._failed)


def _inherited() -> dict[str, str]:
    """Our environment, without what could be taken for a part of the change."""
    ours = ("MIGRATOR_RECORD_", "MIGRATOR_WAS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}
