"""What libvirt's lock driver reads, under gcc's sanitizers: seeds, and inputs that were findings."""

from __future__ import annotations

import subprocess
from pathlib import Path

from . import native


def test_replay(tmp_path: Path) -> None:
    program = native.replay_program(tmp_path)
    paths = native.written(tmp_path)
    done = subprocess.run([program, *paths], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(paths) >= 8
