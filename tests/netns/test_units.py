# SPDX-License-Identifier: GPL-2.0-only
"""The units of systemd: they are well formed, and what they allow is enough for a migration."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.agent.quiet import RANK
from migrator.lab.processes import PATIENT_S, Daemon, wait_until

from .sandbox import Unit, allowed
from .standing import StandingCluster
from .traffic import Conversations
from .world import NETWORKS, POLICIES, World

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "hooks" / "systemd"
SECURITY = ROOT / "docs" / "security.md"
SANDBOX = Path(__file__).with_name("sandbox.py")
NAMES = sorted(unit.name for unit in UNITS.glob("*.service"))
WAIT_S = PATIENT_S
NOBODY = 65534
CAP_SYS_RESOURCE = 24  # linux/capability.h
AGENT, COORDINATOR = "migrator-agent.service", "migrator-coordinator.service"


def unit_of(name: str) -> Unit:
    return Unit(UNITS / name)


@pytest.mark.parametrize("name", NAMES)
def test_systemd_understands_the_unit(name: str) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(UNITS / name)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, name in ran.stderr) == (0, False), ran.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_score_of_the_unit_is_the_documented_one(name: str) -> None:
    """Of systemd 252, as Debian 12 has it; others add checks."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    command = ["systemd-analyze", "security", "--offline=true", str(UNITS / name)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    score = re.search(rf"Overall exposure level for {re.escape(name)}: (\S+)", ran.stdout)
    assert score, ran.stdout
    (told,) = re.findall(rf"^\| `{re.escape(name)}` \| (\S+) \|", SECURITY.read_text(), re.MULTILINE)
    version = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    if version.split()[1] == "252":
        assert score[1] == told
    else:
        assert abs(float(score[1]) - float(told)) < 1.0, version


@pytest.mark.parametrize("call", ["mount", "setuid", "ptrace", "kexec_load", "init_module", "chroot"])
def test_a_unit_leaves_no_call_that_its_daemon_does_not_need(call: str) -> None:
    for name in NAMES:
        assert call not in allowed(unit_of(name)), name


@pytest.mark.parametrize("name", NAMES)
def test_systemd_is_told_when_it_serves(name: str) -> None:
    """libvirtd starts when the agent's start is over, and its first VM's hook has to find it."""
    unit = unit_of(name)
    assert unit["Service"]["Type"] == "notify"
    assert "libvirtd.service" in unit["Unit"].get("Before", "") or name == COORDINATOR


class BoundedCluster(StandingCluster):
    """Daemons that may do no more than their units allow, and tell when they serve."""

    def _daemon(self, name: str, namespace: str, arguments: Sequence[str]) -> Daemon:
        daemon = super()._daemon(name, namespace, arguments)
        unit = UNITS / (AGENT if name.startswith("agent") else COORDINATOR)
        writable = ["--write", str(self.directory)]
        daemon.command = [sys.executable, str(SANDBOX), str(unit), *writable, "--", *daemon.command]
        return daemon


@pytest.fixture(scope="module")
def bounded() -> Iterator[BoundedCluster]:
    with BoundedCluster(networks=NETWORKS, migration_options={"redirect_idle_s": 1.0}) as cluster:
        cluster.apply(policies=POLICIES)
        yield cluster


def test_what_the_units_allow_is_enough(bounded: BoundedCluster) -> None:
    for daemon in (*bounded.agents.values(), bounded.coordinator):
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        held = int(status.partition("CapBnd:")[2].split()[0], 16)
        unit = unit_of(AGENT if daemon.name.startswith("agent") else COORDINATOR)
        assert held.bit_count() == len(unit.words("CapabilityBoundingSet")), status
        assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status, status
    with bounded.scope():
        world = World(bounded)
        vm, peer = world.vm("h1"), world.peer("h3")
        talk = Conversations.begin(vm, peer, inbound=1, outbound=0, every_ms=20)
        world.follow(vm, ("h2", "h1"))
        talk.assert_whole()
        talk.flow_on(500)
        assert not [warning for m in migrations(bounded) for warning in m.warnings], migrations(bounded)
        bounded.agents["h1"].kill()
        bounded.restart(bounded.agents["h1"])  # finds its switch again
        talk.flow_on(500)
        world.leave_nothing()


AHEAD = """
import os
from migrator.agent.quiet import PRIORITY
PRIORITY.may_rise = True
PRIORITY.rise()
ahead = os.sched_getscheduler(0)
PRIORITY.fall()
print(ahead == os.SCHED_RR, os.sched_getscheduler(0) == os.SCHED_OTHER)
"""


def test_the_agent_may_run_ahead_in_a_switchover() -> None:
    unit = unit_of(AGENT)
    assert int(unit["Service"]["LimitRTPRIO"]) >= RANK and not unit.yes("RestrictRealtime")
    assert "sched_setscheduler" in allowed(unit)


def test_an_agent_under_its_unit_runs_ahead_in_a_switchover() -> None:
    held = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    if not held & 1 << CAP_SYS_RESOURCE:
        pytest.skip("needs CAP_SYS_RESOURCE to set the unit's limit, as systemd does")
    command = [sys.executable, str(SANDBOX), str(UNITS / AGENT), "--", sys.executable, "-c", AHEAD]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.stdout.split() == ["True", "True"], ran.stderr


def migrations(cluster: BoundedCluster) -> Sequence[pb.Migration]:
    found: Sequence[pb.Migration] = cluster.coordinator_stub().Migrations(pb.Empty(), timeout=10).migrations
    return found


def coordinator(directory: Path) -> list[str]:
    return ["coordinator", "--listen", f"unix:{directory / 'c.sock'}", "--state-dir", str(directory / "state")]


def agent_without_libvirtd(directory: Path) -> list[str]:
    """As when a host starts: libvirtd waits for the agent, so the agent must not wait for libvirtd."""
    (directory / "agent.toml").write_text(
        f"""
        [agent]
        host = "h1"
        coordinator = "unix:{directory / "none.sock"}"
        listen = "127.0.0.1:0"
        socket = "{directory / "c.sock"}"
        state_dir = "{directory / "state"}"
        [driver]
        name = "dummy"
        [guests]
        driver = "libvirt"
        uri = "qemu+unix:///system?socket={directory / "libvirt-sock"}"
        connect_s = {WAIT_S * 4}
        hook_socket = "{directory / "hook.sock"}"
        """
    )
    return ["agent", "--config", str(directory / "agent.toml")]


@pytest.mark.parametrize("command", [coordinator, agent_without_libvirtd])
def test_a_process_tells_that_it_serves(tmp_path: Path, command: Callable[[Path], list[str]]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(WAIT_S)
        process = subprocess.Popen(
            [sys.executable, "-m", "migrator.cli.main", *command(tmp_path)],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.DEVNULL,
        )
        try:
            assert told.recv(100) == b"READY=1"
            assert (tmp_path / "c.sock").exists()
            assert command is coordinator or (tmp_path / "hook.sock").exists()
        finally:
            process.terminate()
            assert process.wait(WAIT_S) == 0


def test_the_coordinator_serves_as_a_user_without_rights() -> None:
    """As DynamicUser makes one: it owns its state directory, and has no capability."""
    directory = Path(f"/run/units-{os.getpid()}")
    directory.mkdir(mode=0o700)
    os.chown(directory, NOBODY, NOBODY)
    command = [sys.executable, "-m", "migrator.cli.main", *coordinator(directory)]
    given = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": ROOT}
    process = subprocess.Popen(command, **given, stderr=subprocess.PIPE, text=True)  # type: ignore[call-overload]
    try:
        wait_until("it serves", lambda: (directory / "c.sock").exists() or process.poll() is not None, WAIT_S * 4)
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert int(status.partition("CapEff:")[2].split()[0], 16) == 0
        found = [path.stat().st_uid for path in (directory / "state").iterdir()]
        assert found and set(found) == {NOBODY}
    finally:
        process.terminate()
        said = process.communicate(timeout=WAIT_S)[1]
        shutil.rmtree(directory)
    assert process.returncode == 0, said
