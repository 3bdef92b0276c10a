# SPDX-License-Identifier: GPL-2.0-only
"""docs/operations.md, followed to the letter: two hosts with nothing but libvirt, from the wheel to its removal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.lab import netns
from migrator.lab.machines import Port, add_outsider
from migrator.lab.processes import PATIENT_S, wait_until

from .lab import GuestMachine, LibvirtLab, Wiring, add_guest, allow_downtime

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
DEPENDENCIES = Path(sysconfig.get_path("purelib"))
MADE = ("/etc/migrator", "/var/lib/migrator")  # not there on a machine without us
PRIVATE = (*MADE, "/opt", "/usr/local/bin", "/etc/systemd/system")
SERVICE = 7000


def blocks() -> list[tuple[tuple[str, ...], str]]:
    """The guide's commands in their order: on which hosts, what."""
    text = (ROOT / "docs" / "operations.md").read_text()
    guide = text[text.index("## Two hosts, from nothing") : text.index("## Configuration of the coordinator")]
    found = re.findall(r"^```sh\n# on ([^\n]*)\n(.*?)^```", guide, flags=re.M | re.S)
    assert len(found) == guide.count("```sh\n"), "each block says where"
    return [(tuple(where.split(" and ")), commands) for where, commands in found]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make build` makes it, from a copy of the tree."""
    made = tmp_path_factory.mktemp("wheel")
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = netns.run(listed).split("\0")
    for name in (*names, *(f"migrator/_pb/{path.name}" for path in (ROOT / "migrator/_pb").glob("*.py"))):
        if name and not name.startswith(("tests/", "docs/", "bench/")) and (ROOT / name).is_file():
            (made / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, made / "tree" / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made), str(made / "tree")]
    netns.run(build)
    return next(made.glob("*.whl"))


@pytest.fixture(scope="module")
def lab(wheel: Path) -> Iterator[LibvirtLab]:
    """Clean hosts. What the guide writes goes into directories of their own; the package index cannot be reached, so
    packages that the wheel needs are this environment's."""
    made = [Path(place) for place in MADE if not Path(place).exists()]
    for place in made:
        place.mkdir()
    try:
        with LibvirtLab() as clean:
            wire_up(clean)
            for host in clean.hosts.values():
                for number, place in enumerate(PRIVATE):
                    own = host.directory / f"place{number}"
                    own.mkdir()
                    host.run_inside("mount", "--bind", str(own), place)
                (host.directory / "work").mkdir()
                shutil.copy2(wheel, host.directory / "work")
                stand_ins(host.directory / "stand-ins", clean.hosts["h2"].directory)
            yield clean
    finally:
        for place in made:
            place.rmdir()


def stand_ins(directory: Path, other: Path) -> None:
    """What a namespace cannot have: systemd, a way to log in at h2, and an archive of packages,
    whose names have to be right all the same."""
    directory.mkdir()
    systemctl = Path(__file__).with_name("systemctl.py")
    scripts = {
        "systemctl": f'exec /usr/bin/python3 {systemctl} "$@"',
        "scp": f'test "$1 ${{3%%:*}}" = "-rp h2"; cp -rp "$2" "{other}/place0/${{3#*:/etc/migrator/}}"',
        "apt-get": 'test "$1 $2" = "install -y"; shift 2; apt-cache show --no-all-versions "$@" > /dev/null',
    }
    for name, body in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\nset -e\n{body}\n")
        (directory / name).chmod(0o755)


def run(lab: LibvirtLab, host: str, commands: str) -> str:
    here = lab.hosts[host]
    environment = [
        f"PATH={here.directory / 'stand-ins'}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        f"PYTHONPATH={DEPENDENCIES}",
        "PIP_NO_INDEX=1",
        "PIP_NO_DEPS=1",
        "HOME=/root",
    ]
    where = f"cd {here.directory / 'work'}"
    command = here.inside(["env", "-i", *environment, "bash", "-euo", "pipefail", "-c", f"{where}\n{commands}"])
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    logs = "".join(log.read_text()[-3000:] for log in here.run.glob("migrator-*.log"))
    assert ran.returncode == 0, f"{host}: {commands}\n{ran.stdout}{ran.stderr}\n{logs}"
    return ran.stdout


def wire_up(lab: LibvirtLab) -> None:
    """A second interface of each host, for its VMs."""
    for name in lab.host_names:
        netns.set_sysctl(lab.name(name), "net/ipv4/conf/all/arp_ignore", 1)  # it does not answer for up0
        lab.wire(name, "up1", "fabric", f"{name}-vms")
        netns.ip_batch(lab.name("fabric"), [f"link set {name}-vms master br0 up"])
        netns.ip("link", "set", "up1", "up", namespace=lab.name(name))


def is_open(lab: LibvirtLab, host: str) -> bool:
    """As one looks at it."""
    return bool(ports(lab, host)) and "active" in run(lab, host, "migrator port show web")


def ports(lab: LibvirtLab, host: str) -> list[object]:
    found: list[object] = json.loads(run(lab, host, "migrator port list --json"))
    return found


@pytest.mark.timeout(600)  # it makes two virtual environments
def test_the_guide_works_as_it_stands(lab: LibvirtLab) -> None:
    guest = add_guest(lab, "web", "h1", [Port("52:54:00:00:00:10", "", ("10.1.0.1",))], Wiring())
    guest.booted()
    guest.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
    peer = add_outsider(lab, "peer", Port("02:00:00:00:00:20", "", ("10.1.0.2",)))
    talk = None
    for hosts, commands in blocks():
        if "virsh migrate " in commands or "migrator migrate " in commands:
            allow_downtime(guest)  # emulated: docs/operations.md says so below
        output = "".join(run(lab, host, commands) for host in hosts)
        if "--key ports --live --set" in commands:
            wait_until("the port is open", lambda: is_open(lab, "h1"))
        elif "--live --remove" in commands:
            wait_until("the port has ended", lambda: not ports(lab, "h1"))
        elif "port enforce" in commands:
            talk = peer.worker("tcp")
            made = talk.call("connect", address="10.1.0.1", port=SERVICE, count=20)
            assert made["connected"] == 20, made
        elif "virsh migrate" in commands or "migrator migrate" in commands:
            assert "complete" in output, output
            assert guest.place() == ("h2" if "virsh" in commands else "h1")
            assert talk is not None and talk.call("check", size=2000, timeout_s=PATIENT_S)["lost"] == 0
        elif "systemctl restart" in commands:
            assert talk is not None and talk.call("check", size=2000, timeout_s=PATIENT_S)["lost"] == 0
    assert talk is not None
    gone(lab, guest)


def gone(lab: LibvirtLab, guest: GuestMachine) -> None:
    """The guest goes on, and nothing that would start or hook anything is left."""
    assert guest.place() == "h1"
    for host in lab.hosts.values():
        assert not list(host.hooks.iterdir())
        for place in ("place0", "place2", "place3", "place4"):
            left = [path for path in (host.directory / place).rglob("*") if "migrator" in path.name]
            assert not left


@pytest.mark.parametrize("word", ["migrate", "host drain"])
def test_the_guide_names_commands_that_are_there(word: str) -> None:
    assert f"migrator {word} " in (ROOT / "docs" / "operations.md").read_text()
