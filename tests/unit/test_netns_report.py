# SPDX-License-Identifier: GPL-2.0-only
"""A failed test of tests/netns shows what the daemons wrote, even if the cluster is gone before its report is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CONFTEST = """
import contextlib
import shutil
from types import SimpleNamespace

import pytest

from tests.netns.conftest import pytest_runtest_makereport, world

@pytest.fixture(scope="session")
def cluster_box(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cluster")
    log = directory / "coordinator.log"
    log.write_text("of another test\\n")
    daemon = SimpleNamespace(name="coordinator", log=log)
    cluster = SimpleNamespace(coordinator=daemon, agents={}, host_names=[], workers=[])
    cluster.scope = contextlib.nullcontext
    cluster.withdraw = lambda: None
    yield SimpleNamespace(get=lambda: cluster)
    shutil.rmtree(directory)
"""
CASES = """
def test_teardown(world):
    with world.cluster.coordinator.log.open("a") as log:
        log.write("THE LAST WORDS\\n")

def test_call(world):
    test_teardown(world)
    raise AssertionError
"""


@pytest.mark.parametrize("case", ["test_teardown", "test_call"])
def test_the_logs_outlive_the_cluster(tmp_path: Path, case: str) -> None:
    """A line that no daemon's log should have fails the test at its end, and `-x` ends the session with it."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'made'}"]
    done = subprocess.run(
        [*command, f"{tmp_path}/test_cases.py::{case}"], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    shown = done.stdout.partition(" daemons ")[2]
    assert "==== coordinator\nTHE LAST WORDS" in shown, done.stdout
    assert "of another test" not in shown
