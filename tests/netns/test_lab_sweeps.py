# SPDX-License-Identifier: GPL-2.0-only
"""A lab whose process is killed leaves nothing either, once another lab begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from migrator.lab import netns
from migrator.lab.topology import Lab

SCRIPT = """
from migrator.lab.topology import Lab
with Lab(("h1",)) as lab:
    lab.worker("h1", "probe")
    print(lab.prefix, lab.directory, flush=True)
    input()
"""


@pytest.mark.alone  # or the lab of another test may sweep it before
def test_a_killed_lab_is_swept() -> None:
    killed = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with killed:
        assert killed.stdout is not None
        prefix, directory = killed.stdout.readline().split()
        killed.kill()
    assert Path(directory).exists() and list(netns.RUN.glob(f"{prefix}*"))
    with Lab(("h1",)):
        assert not Path(directory).exists()
        assert not list(netns.RUN.glob(f"{prefix}*"))
