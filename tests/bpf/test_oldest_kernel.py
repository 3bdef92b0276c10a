# SPDX-License-Identifier: GPL-2.0-only
"""The switch loads and passes frames on the oldest Linux that is promised, in a virtual machine of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "oldest_kernel.py"
PROGRAMS = ROOT / "datapath" / "bpf"
_UNAVAILABLE = 69  # EX_UNAVAILABLE, the tool's own
_BOOTED_S = 240  # twenty seconds of one CPU, when it has one


def _programs() -> list[str]:
    text = "".join(source.read_text() for source in PROGRAMS.glob("*.bpf.c"))
    return sorted(re.findall(r'^SEC\("\w+"\)\nint (\w+)\(', text, re.M))


@pytest.mark.slow
@pytest.mark.timeout(_BOOTED_S + 60)
def test_the_switch_runs_on_the_oldest_kernel() -> None:
    guest = [sys.executable, "-m", "tests.bpf.oldest_kernel_guest"]
    command = [sys.executable, str(TOOL), "--deadline", str(_BOOTED_S), *guest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BOOTED_S + 30)
    if done.returncode == _UNAVAILABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr}"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    seen = json.loads(line)
    assert seen.pop("release").startswith("6.1.")
    assert seen == {
        "attachments": "ClsactAttachments",
        "programs": _programs(),
        "inner": {"conntracks": True, "floods": True, "dirty": True, "acl_tries": True},
        "passed": True,
        "counted": 1,
    }
