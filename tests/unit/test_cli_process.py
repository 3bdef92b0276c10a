"""The command as a process of its own: exit codes, signals, and a coordinator that is killed and started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DEADLINE_S = 30.0


class Daemon:
    """A coordinator as a process, on a unix socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "c.sock"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = self.spawn()
        deadline = time.monotonic() + DEADLINE_S
        while self.run("network", "list").returncode != 0:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()

    def spawn(self) -> subprocess.Popen[str]:
        options = ["--listen", f"unix:{self.socket}", "--state-dir", str(self.folder / "state")]
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(command("coordinator", *options), stderr=log, text=True)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        options = ("--coordinator", f"unix:{self.socket}")
        return subprocess.run(
            command(*options, *arguments), capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "migrator.cli.main", *arguments]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    try:
        made.start()
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.process.kill()
            made.process.wait(DEADLINE_S)


def test_what_was_applied_outlives_a_kill(daemon: Daemon) -> None:
    assert daemon.run("network", "add", "blue", "--kind", "local").returncode == 0
    assert daemon.end(signal.SIGKILL) == -signal.SIGKILL
    gone = daemon.run("network", "list")
    assert gone.returncode == 32
    assert gone.stderr.startswith("migrator: ") and gone.stderr.count("\n") == 1
    daemon.start()
    assert [network["name"] for network in json.loads(daemon.run("--json", "network", "list").stdout)] == ["blue"]


def test_it_stops_in_order_and_lets_the_journal_go(daemon: Daemon) -> None:
    watching = subprocess.Popen(
        command("--coordinator", f"unix:{daemon.socket}", "watch"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert watching.stdout is not None
        assert b"snapshot ends" in watching.stdout.readline()
        assert daemon.end(signal.SIGTERM) == 0
        assert watching.wait(DEADLINE_S) == 32
    finally:
        watching.kill()
        watching.communicate()
    assert not [line for line in daemon.log().splitlines() if "error" in line.lower() or "warning" in line]
    daemon.start()


def test_a_second_coordinator_is_refused(daemon: Daemon) -> None:
    second = daemon.spawn()
    assert second.wait(DEADLINE_S) == 6
    assert "another coordinator has it open" in daemon.log()
    assert daemon.run("network", "list").returncode == 0


def test_exit_codes_of_a_process(daemon: Daemon) -> None:
    assert daemon.run("network", "show", "none").returncode == 4
    assert daemon.run("network", "add", "x", "--kind", "overlay").returncode == 3
    assert daemon.run("no-such-command").returncode == 2
    assert daemon.run("migrate", "nobody", "--to", "h1").returncode == 35
    assert daemon.run("--help").returncode == 0


def test_output_into_a_closed_pipe_is_no_error(daemon: Daemon) -> None:
    options = ("--coordinator", f"unix:{daemon.socket}")
    for arguments in (("watch", "--help"), (*options, "network", "list"), (*options, "network", "list", "--json")):
        writer = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.close()
        writer.stdout = None
        _, said = writer.communicate(timeout=DEADLINE_S)
        assert (writer.returncode, said) == (0, b"")
