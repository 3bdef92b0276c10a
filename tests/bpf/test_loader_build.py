# SPDX-License-Identifier: GPL-2.0-only
"""A wheel brings its compiled BPF programs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from datapath.drivers.ebpf import btf, layout

ROOT = Path(__file__).resolve().parents[2]


def test_a_wheel_contains_the_object_that_fits_its_code(tmp_path: Path) -> None:
    for name in ("datapath", "migrator"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.o", "__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        found = wheel.extract("datapath/bpf/switch.bpf.o", tmp_path / "wheel")
        assert "datapath/drivers/ebpf/keeper_process.py" in wheel.namelist()
    layout.check(btf.read_object(Path(found)))
