# SPDX-License-Identifier: GPL-2.0-only
"""The hook is root's, started by libvirtd: what is around it changes nothing of what it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_hook import HOOK, XML, Agent

PLANTED = "import os\nopen(os.environ.get('MARK', 'mark'), 'w').write('ran')\n"


def run(configured: Path, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(configured), "shop", "prepare", "begin", "-"],
        input=XML,
        text=True,
        capture_output=True,
        cwd=directory,
        env={"PATH": str(directory), **environment},
        timeout=30,
        check=False,
    )


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """The hook, asking a socket of the test's."""
    made = tmp_path / "qemu"
    made.write_text(HOOK.read_text().replace("/etc/migrator/hook.conf", str(tmp_path / "hook.conf")))
    made.chmod(0o755)
    (tmp_path / "hook.conf").write_text(f"socket = {tmp_path / 'agent.sock'}\n")
    return made


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A directory with modules and a python of the attacker's, under each name that the hook needs."""
    directory = tmp_path / "planted"
    directory.mkdir()
    for module in ("json", "socket", "time", "signal", "syslog", "os", "sitecustomize", "usercustomize"):
        (directory / f"{module}.py").write_text(PLANTED)
    for name in ("python3", "env"):
        (directory / name).write_text(f"#!/bin/sh\necho ran > {directory}/mark\n")
        (directory / name).chmod(0o755)
    return directory


def test_nothing_of_the_directory_is_imported(configured: Path, planted: Path, tmp_path: Path) -> None:
    for name in planted.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())  # beside the hook itself, too
    agent = Agent(tmp_path / "agent.sock", lambda _: '{"ok": true}\n')
    try:
        ran = run(configured, planted, MARK=str(planted / "mark"))
    finally:
        agent.close()
    assert (ran.returncode, ran.stderr, len(agent.requests)) == (0, "", 1)
    assert not (planted / "mark").exists()


def test_the_environment_changes_nothing(configured: Path, planted: Path, tmp_path: Path) -> None:
    agent = Agent(tmp_path / "agent.sock", lambda _: '{"ok": true}\n')
    hostile = {
        "PYTHONPATH": str(planted),
        "PYTHONHOME": str(planted),
        "PYTHONSTARTUP": str(planted / "json.py"),
        "PYTHONINSPECT": "1",
        "PYTHONUSERBASE": str(planted),
        "MARK": str(planted / "mark"),
    }
    try:
        ran = run(configured, tmp_path, **hostile)
    finally:
        agent.close()
    assert (ran.returncode, ran.stderr, len(agent.requests)) == (0, "", 1)
    assert not (planted / "mark").exists()


def test_the_planted_modules_would_run(planted: Path) -> None:
    """By an interpreter that is not told to ignore them: else the tests above prove nothing."""
    subprocess.run(
        [sys.executable, "-c", "import syslog"],
        env={"PYTHONPATH": str(planted), "MARK": str(planted / "mark"), "PATH": os.defpath},
        timeout=30,
        check=False,
        capture_output=True,
    )
    assert (planted / "mark").exists()
