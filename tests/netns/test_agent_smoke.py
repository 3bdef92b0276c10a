# SPDX-License-Identifier: GPL-2.0-only
"""The agent on a real switch: VMs with several ports, restarts under traffic, a start that is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from migrator.lab import netns
from migrator.lab.machines import Machine, Port, add_peer, add_vm
from migrator.lab.processes import wait_until

from .traffic import Conversations, Streams
from .world import World

_numbers = itertools.count(1)


def two_nics(world: World) -> tuple[Machine, list[tuple[Machine, Machine]]]:
    """A VM with a port on each of two networks; for each port, the VM as that port's peer sees it, and the peer."""
    number = next(_numbers)
    ports, peers = [], []
    for subnet, network, mtu in ((21, "blue", 1500), (22, "over", 1450)):
        for side in (1, 2):
            address = (f"10.{subnet}.{number}.{side}", f"fd00:{subnet}::{number:x}:{side}")
            port = Port(f"02:00:00:{subnet:02x}:{number:02x}:{side:02x}", network, address, mtu=mtu)
            (ports if side == 1 else peers).append(port)
    vm = add_vm(
        world.cluster, f"t{number}", "h1", ports, policy="server", behaviour={"memory_ms": 50, "swallow": False}
    )
    world.cluster.declare(vm)
    world.machines.append(vm)
    views = []
    for index, port in enumerate(peers):
        peer = add_peer(world.cluster, f"t{number}p{index}", "h3", port, policy="open")
        world.cluster.declare(peer)
        world.machines.append(peer)
        views.append((replace(vm, ports=[ports[index]]), peer))
    return vm, views


def test_two_nics_move_together(world: World, route: tuple[str, ...]) -> None:
    """What is held and redirected for each NIC reaches that NIC and no other."""
    vm, views = two_nics(world)
    streams = [Streams(view, peer, own=True) for view, peer in views]
    talks = [Conversations.begin(view, peer, inbound=0, outbound=5, every_ms=50) for view, peer in views]
    reports = world.follow(vm, route)
    assert reports[0].moved["conntrack"] >= 12
    assert len([p for p in world.cluster.ports(route[-1]) if p.instance.vm == vm.uuid]) >= 2
    for stream in streams:
        stream.run_on(100)
        stream.assert_perfect()
    for talk in talks:
        talk.assert_whole()


def test_frames_go_on_while_an_agent_is_restarted(world: World) -> None:
    """SIGTERM, SIGKILL and a new agent each time: the switch passes every frame."""
    vm, peer = world.vm("h1"), world.peer("h3")
    streams = Streams(vm, peer)
    talk = Conversations.begin(vm, peer, inbound=5, outbound=5, every_ms=50)
    agent = world.cluster.agents["h1"]
    for end in (agent.stop, agent.kill):
        end()
        streams.run_on(200)
        world.cluster.restart(agent)
        wait_until("the port is known again", lambda: world.cluster.is_open(vm, "h1"))
    streams.run_on(100)
    streams.assert_perfect()
    talk.assert_whole()
    world.move(vm, "h2")
    talk.assert_whole()


def test_an_agent_that_lacks_what_it_needs_says_so_and_ends(world: World, tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[agent]\nhost = "x"\nlisten = "127.0.0.1:0"\nsocket = "{tmp_path}/a.sock"\nstate_dir = "{tmp_path}"\n'
        f'[driver]\nname = "ebpf"\nuplinks = "not a list"\n'
    )
    command = [sys.executable, "-m", "migrator.cli.main", "agent", "--config", str(config)]
    ended = subprocess.run(
        netns.inside(world.cluster.name("control"), command), capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode not in (0, 1)
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("migrator: ") and "uplinks" in line
