"""`migrator libvirt install | uninstall | status` on a directory of the test's own, and what a wheel brings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from migrator.agent.libvirt import installation
from migrator.cli.main import run

TREE = Path(__file__).parents[2]


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    (tmp_path / "libvirt").mkdir()
    return tmp_path / "libvirt" / "hooks"


def migrator(hooks: Path, *words: str) -> int:
    return run(["libvirt", *words, "--directory", str(hooks)])


def test_install_is_whole_executable_and_repeatable(hooks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert migrator(hooks, "install", "--dry-run") == 0
    assert not hooks.exists() and "would be installed" in capsys.readouterr().out
    assert migrator(hooks, "install") == 0
    path = hooks / "qemu.d" / "90-migrator"
    assert path.stat().st_mode & 0o777 == 0o755
    assert path.read_bytes() == (TREE / "hooks" / "qemu").read_bytes()
    assert [item.name for item in path.parent.iterdir()] == ["90-migrator"]
    assert "installed" in capsys.readouterr().out
    assert migrator(hooks, "install", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path), "changed": False, "notes": []}


def test_an_older_one_is_replaced_and_keeps_the_time_since_when_libvirtd_knows_it(hooks: Path) -> None:
    assert migrator(hooks, "install") == 0
    path = hooks / "qemu.d" / "90-migrator"
    path.write_bytes(path.read_bytes() + b"# of another version\n")
    assert installation.state(hooks) == "different"
    since = path.stat().st_mtime
    assert migrator(hooks, "install") == 0
    assert installation.state(hooks) == "current" and path.stat().st_mtime == since


def test_other_hooks_and_dispatchers_stay(hooks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    below = hooks / "qemu.d" / "shop" / "prepare" / "begin"
    below.mkdir(parents=True)
    for path, text in (
        (hooks / "qemu", "#!/bin/sh\nfor f in qemu.d/$1/$2/$3/*; do"),
        (hooks / "qemu.d/10-x", "#!/bin/sh"),
    ):
        path.write_text(text)
        path.chmod(0o755)
    (below / "run").write_text("#!/bin/sh")
    assert migrator(hooks, "install", "--json") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == [
        f"{hooks}/qemu is run as well and may call ours a second time, which does no harm",
        f"{hooks}/qemu.d/10-x is run as well",
    ]
    assert migrator(hooks, "uninstall") == 0
    assert sorted(p.name for p in hooks.rglob("*") if p.is_file()) == ["10-x", "qemu", "run"]
    assert migrator(hooks, "uninstall") == 0


def test_what_is_not_ours_is_left_alone(hooks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hooks / "qemu.d" / "90-migrator"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    assert migrator(hooks, "install") == 3 == migrator(hooks, "uninstall")
    assert "another program's" in capsys.readouterr().err
    assert path.read_text() == "#!/bin/sh\n"


def test_a_host_without_libvirt_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert migrator(tmp_path / "none" / "hooks", "install") == 16
    assert f"{tmp_path}/none does not exist" in capsys.readouterr().err


def test_status_names_each_problem(
    hooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "CONFIG", tmp_path / "hook.conf")
    (tmp_path / "hook.conf").write_text(f"socket = '{tmp_path}/hook.sock'  # here\n")
    uri = f"qemu+unix:///system?socket={tmp_path}/none"
    assert migrator(hooks, "status", "--json", "--uri", uri) == 16
    body = json.loads(capsys.readouterr().out)
    assert body["hook"]["state"] == "absent" and body["agent"] == {"socket": f"{tmp_path}/hook.sock", "ok": False}
    problems = "\n".join(body["problems"])
    assert "the hook is absent" in problems and "no agent answers" in problems and "libvirt: " in problems
    assert migrator(hooks, "install") == 0
    assert migrator(hooks, "status", "--uri", uri) == 16
    said = capsys.readouterr().out
    assert "90-migrator: current" in said and "the hook is" not in said


def test_the_wheel_brings_the_hook(tmp_path: Path) -> None:
    """Built beside the tree: setuptools leaves traces where it builds."""
    tree = tmp_path / "tree"
    for part in ("datapath", "migrator", "hooks", "tools"):
        shutil.copytree(TREE / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, tree / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        found = [name for name in wheel.namelist() if name.endswith("migrator/_hooks/qemu")]
        assert [wheel.read(name) for name in found] == [(TREE / "hooks" / "qemu").read_bytes()]
        drivers = [wheel.read(name) for name in wheel.namelist() if name.endswith("migrator/_hooks/migrator.so")]
        assert [driver[:4] for driver in drivers] == [b"\x7fELF"] and b"virLockDriverImpl" in drivers[0]
