# SPDX-License-Identifier: GPL-2.0-only
"""The units of systemd: they are well formed, and what they allow is enough for a migration."""

from __future__ import annotations

import configparser
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab.processes import Daemon, wait_until

from .standing import StandingCluster
from .traffic import Conversations
from .world import NETWORKS, POLICIES, World

UNITS = Path(__file__).resolve().parents[2] / "hooks" / "systemd"
NAMES = sorted(unit.name for unit in UNITS.glob("*.service"))
AGENT, COORDINATOR = "migrator-agent.service", "migrator-coordinator.service"


class Unit(configparser.RawConfigParser):
    """A unit's settings; names as they stand there."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False, interpolation=None)
        self.optionxform = str  # type: ignore[assignment, method-assign]
        self.read_string((UNITS / name).read_text())

    def capabilities(self) -> list[str]:
        """The bounding set, as setpriv names them."""
        return [word.removeprefix("CAP_").lower() for word in self["Service"]["CapabilityBoundingSet"].split()]


@pytest.mark.parametrize("name", NAMES)
def test_systemd_understands_the_unit(name: str) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(UNITS / name)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, name in ran.stderr) == (0, False), ran.stderr


@pytest.mark.parametrize("name", NAMES)
def test_systemd_is_told_when_it_serves(name: str) -> None:
    """libvirtd starts when the agent's start is over, and its first VM's hook has to find it."""
    unit = Unit(name)
    assert unit["Service"]["Type"] == "notify"
    assert "libvirtd.service" in unit["Unit"].get("Before", "") or name == COORDINATOR


class BoundedCluster(StandingCluster):
    """Daemons that have no more capabilities than their units give them, and tell when they serve."""

    def _daemon(self, name: str, namespace: str, arguments: Sequence[str]) -> Daemon:
        daemon = super()._daemon(name, namespace, arguments)
        given = Unit(AGENT if name.startswith("agent") else COORDINATOR).capabilities()
        bounds = ",".join(["-all", *(f"+{word}" for word in given)])
        daemon.command = ["setpriv", "--inh-caps=-all", f"--bounding-set={bounds}", *daemon.command]
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
        unit = Unit(AGENT if daemon.name.startswith("agent") else COORDINATOR)
        assert held.bit_count() == len(unit.capabilities()), status
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


def migrations(cluster: BoundedCluster) -> Sequence[pb.Migration]:
    found: Sequence[pb.Migration] = cluster.coordinator_stub().Migrations(pb.Empty(), timeout=10).migrations
    return found


def test_a_process_tells_that_it_serves(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(address))
        told.settimeout(20)
        listen = f"unix:{tmp_path / 'c.sock'}"
        command = [sys.executable, "-m", "migrator.cli.main", "coordinator", "--listen", listen]
        process = subprocess.Popen(
            [*command, "--state-dir", str(tmp_path / "state"), "--log-level", "error"],
            env={**os.environ, "NOTIFY_SOCKET": str(address)},
        )
        try:
            assert told.recv(100) == b"READY=1"
            wait_until("its socket is there", (tmp_path / "c.sock").exists)
        finally:
            process.terminate()
            assert process.wait(20) == 0
