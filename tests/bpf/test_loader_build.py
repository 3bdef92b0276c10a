# SPDX-License-Identifier: GPL-2.0-only
"""A wheel brings its compiled BPF programs and generated code, and runs where there is no compiler."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from datapath.drivers.ebpf import btf, layout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built of a copy without compiled programs."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("datapath", "migrator", "hooks", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.o", "__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").touch()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, timeout=120)
    return next((tree / "dist").glob("*.whl"))


def test_a_wheel_contains_the_object_that_fits_its_code(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()  # below *.data/purelib: the wheel is for one kind of machine
        found = content.extract(next(n for n in names if n.endswith("datapath/bpf/switch.bpf.o")), tmp_path)
        assert any(name.endswith("datapath/drivers/ebpf/keeper_process.py") for name in names)
    layout.check(btf.read_object(Path(found)))


def test_an_installed_wheel_runs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    install = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install"]
    subprocess.run([*install, "--quiet", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    packages = next((venv / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # an editable install is not followed

    def migrator(*arguments: str) -> str:
        ran = subprocess.run(
            [venv / "bin/migrator", *arguments],
            cwd=tmp_path,
            env={"PATH": str(venv / "bin")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    assert "migrate" in migrator("--help")
    found = {row["feature"]: row for row in json.loads(migrator("doctor", "--json"))}
    assert found["BPF programs"]["present"]
    assert "conntrack" in migrator("inspect", str(ROOT / "tests/fixtures/format1-zstd.mgs"))
    where = [venv / "bin/python", "-c", "import datapath, migrator; print(datapath.__file__, migrator.__file__)"]
    files = subprocess.run(where, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert all(Path(file).is_relative_to(packages) for file in files)
