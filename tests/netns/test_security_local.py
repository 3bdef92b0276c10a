# SPDX-License-Identifier: GPL-2.0-only
"""What a user of the host without rights gets at: devices, pins, sockets, files. A process of `nobody` looks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datapath.drivers.ebpf.bpffs import pins
from datapath.drivers.ebpf.holds import HoldTap
from datapath.drivers.ebpf.keeper import Keeper
from datapath.drivers.ebpf.ledger import Ledger
from datapath.errors import KernelError
from migrator.agent.libvirt.hooksocket import HookSocket
from migrator.agent.libvirt.saved import Saved
from migrator.agent.libvirt.taps import make_tap
from migrator.agent.store import Store
from tests.unit.pair import world

from .driver_lab import Host, hosts
from .private import private_namespace

NOBODY = 65534
TAP, MULTI_QUEUE, TUN_DEVICE = 0x5002, 0x0100, os.makedev(10, 200)
ATTACH = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[2].encode(), int(sys.argv[3])))
"""
CONNECT = """
import socket, sys
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    try:
        socket.socket(socket.AF_UNIX, kind).connect(sys.argv[1])
    except PermissionError:
        continue
    sys.exit("connected")
sys.exit("refused")
"""


def as_nobody(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Not by `user=` of subprocess: that forks, and gRPC's handlers of forks abort in a process with its threads."""
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*nobody, sys.executable, "-ISc", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd="/")


@pytest.fixture
def device() -> Iterator[Path]:
    """/dev/net/tun as udev makes it on nearly all hosts: everybody's."""
    path = Path(f"/dev/tun-{os.getpid()}")
    os.mknod(path, stat.S_IFCHR | 0o666, TUN_DEVICE)
    try:
        path.chmod(0o666)
        yield path
    finally:
        path.unlink()


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that everybody reaches; tmp_path is root's own."""
    path = Path(f"/run/security-{os.getpid()}")
    path.mkdir(mode=0o755)
    try:
        yield path
    finally:
        subprocess.run(["rm", "-r", str(path)], check=True, timeout=30)


@pytest.mark.parametrize("queues", [1, 4])
def test_a_tap_that_waits_for_its_guest_is_nobody_elses(device: Path, queues: int) -> None:
    """Else who opens it first is the guest: gets its frames, speaks with its addresses."""
    with private_namespace():
        make_tap("guest0", multi_queue=queues > 1)
        tried = as_nobody(ATTACH, device, "guest0", str(TAP | (MULTI_QUEUE if queues > 1 else 0)))
        assert "PermissionError" in tried.stderr
        own = as_nobody(ATTACH, device, "mine0", str(TAP))
        assert "PermissionError" in own.stderr, "nor does it make devices here"


def test_a_hold_tap_that_its_agent_lost_is_nobody_elses(device: Path) -> None:
    """What is written to it counts as the guest's."""
    with private_namespace():
        hold = HoldTap("hold0")
        hold.close()  # as when agent and keeper have died
        assert "PermissionError" in as_nobody(ATTACH, device, "hold0", str(TAP)).stderr


def test_the_tap_test_sees_a_tap_that_is_everybodys(device: Path) -> None:
    """By its absence: a tap that the kernel lets `nobody` take, because it has no owner."""
    with private_namespace():
        subprocess.run(["ip", "tuntap", "add", "open0", "mode", "tap", "vnet_hdr"], check=True, timeout=30)
        taken = as_nobody(ATTACH, device, "open0", str(TAP))
        assert taken.returncode == 0, taken.stderr


def test_pins_of_the_switch_are_roots() -> None:
    with hosts(1) as (host,):
        assert isinstance(host, Host)
        host.guest("10.0.0.1")
        mounted = Path(host.options["bpffs"])
        assert mounted.stat().st_mode & 0o777 == 0o700
        for path in (*mounted.rglob("maps/*"), *mounted.rglob("programs-*/*"), *mounted.rglob("links/*")):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        state = Path(host.options["state_dir"])
        assert (stat.S_IMODE(state.stat().st_mode), state.stat().st_uid) == (0o700, 0)


def test_pins_in_a_directory_that_somebody_else_made_are_refused(directory: Path) -> None:
    """A bpffs that was mounted without `mode=` lets everybody make directories: what is in them is their owner's."""
    subprocess.run(["mount", "-t", "bpf", "bpf", str(directory)], check=True, timeout=30)
    try:
        theirs = as_nobody("import os, sys; os.makedirs(sys.argv[1] + '/maps')", directory / "migrator-s")
        assert theirs.returncode == 0, theirs.stderr
        with pytest.raises(KernelError, match="migrator-s") as refused:
            pins("s", directory)
        assert refused.value.errno == errno.EPERM
        assert pins("t", directory).root.stat().st_mode & 0o777 == 0o700
    finally:
        subprocess.run(["umount", str(directory)], check=True, timeout=30)


def test_the_keeper_of_held_frames_serves_root_alone(directory: Path) -> None:
    with private_namespace(), contextlib.ExitStack() as stack:
        keeper = Keeper(directory / "keeper.sock")
        stack.callback(keeper.end)
        HoldTap("hold1", keeper)
        assert as_nobody(CONNECT, directory / "keeper.sock").stderr.strip() == "refused"
        assert keeper.kept() == ["hold1"]


def test_the_look_for_sockets_sees_one_that_is_everybodys(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(directory / "open.sock"))
        (directory / "open.sock").chmod(0o666)
        listener.listen()
        assert as_nobody(CONNECT, directory / "open.sock").stderr.strip() == "connected"


def test_the_hook_socket_serves_root_alone(directory: Path) -> None:
    async def scenario() -> str:
        sock = HookSocket(directory / "hook.sock", {})
        await sock.start()
        try:
            assert stat.S_IMODE((directory / "hook.sock").stat().st_mode) == 0o600
            tried = await asyncio.to_thread(as_nobody, CONNECT, directory / "hook.sock")
            return tried.stderr.strip()
        finally:
            await sock.stop()

    assert asyncio.run(scenario()) == "refused"


def test_the_agents_socket_serves_root_alone(directory: Path) -> None:
    async def scenario() -> str:
        async with world(directory, "a"):
            tried = await asyncio.to_thread(as_nobody, CONNECT, directory / "a.sock")
            return tried.stderr.strip()

    assert asyncio.run(scenario()) == "refused"


@pytest.mark.parametrize("made", [Store, Ledger, lambda path: Saved(path).path("vm")], ids=["agent", "switch", "saved"])
def test_what_an_agent_keeps_is_roots(directory: Path, made: Callable[[Path], object]) -> None:
    """Also when it is started by hand, by somebody who leaves everything open."""
    before = os.umask(0)
    try:
        kept = made(directory / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "state").stat().st_mode) == 0o700
    assert "PermissionError" in as_nobody("import os, sys; os.listdir(sys.argv[1])", directory / "state").stderr
    if isinstance(kept, Store):
        kept.close()
