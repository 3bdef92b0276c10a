# SPDX-License-Identifier: GPL-2.0-only
"""What the agents must not do while the guest stands still."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from migrator.lab.processes import Daemon

from .strace import Call, calls, traced
from .traffic import Conversations
from .world import World

MAP_IN_MAP = {12, 13}  # enum bpf_map_type of uapi/linux/bpf.h: ARRAY_OF_MAPS, HASH_OF_MAPS
FLUSHES = {"fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "msync"}
DIRECTORY = {"rename", "renameat", "renameat2", "unlink", "unlinkat", "link", "linkat", "mkdir", "mkdirat", "truncate"}
WAITS_FOR_RCU = {"membarrier", "setns", "unshare", "mount", "umount2"}
GET_INFO = "BPF_OBJ_GET_INFO_BY_FD"


def reasons(call: Call, daemon: Daemon) -> str:
    """Why a call may keep the guest waiting for the disk or for RCU; "" when it may not."""
    if call.name in FLUSHES | DIRECTORY | WAITS_FOR_RCU:
        return call.name
    if call.name in {"open", "openat", "creat"} and "O_CREAT" in call.arguments:
        return "a file is made"
    if "NETLINK:" in call.arguments:
        return "the lock of routing may be held by who waits for RCU"
    return _of_bpf(call, daemon) if call.name == "bpf" else ""


def _of_bpf(call: Call, daemon: Daemon) -> str:
    """Data of maps may be read and written, by programs too; whatever else bpf() does may wait."""
    command = call.arguments.partition(",")[0]
    if command.startswith(("BPF_MAP_LOOKUP", "BPF_MAP_GET_NEXT")) or command in {"BPF_PROG_TEST_RUN", GET_INFO}:
        return ""
    if not re.fullmatch(r"BPF_MAP_(UPDATE|DELETE)_(ELEM|BATCH)", command):
        return command
    return f"{command} of a map in a map" if changes_map_in_map(call, daemon) else ""


def changes_map_in_map(call: Call, daemon: Daemon) -> bool:
    found = re.search(r"BPF_MAP_(?:UPDATE|DELETE)_.*map_fd=(\d+)", call.arguments)
    return found is not None and _map_type(daemon, int(found[1])) in MAP_IN_MAP


def _map_type(daemon: Daemon, descriptor: int) -> int:
    """enum bpf_map_type of a map that the daemon still has open; -1: it has closed it, so it was no outer map."""
    try:
        text = Path(f"/proc/{daemon.pid}/fdinfo/{descriptor}").read_text()
    except FileNotFoundError:
        return -1
    found = re.search(r"^map_type:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else -1


def stored(found: list[Call], role: str, phase: str) -> float:
    """When an agent wrote down that its end is in a phase."""
    start = f'{{\\"role\\": \\"{role}\\", \\"state\\": {{\\"phase\\": \\"{phase}\\"'
    return next(call.at for call in found if call.name == "pwrite64" and start in call.arguments)


def sweeper(daemon: Daemon) -> int:
    """The thread that looks after the switch now and then, with the disk too: no step of a move waits for it."""
    threads = Path(f"/proc/{daemon.pid}/task").iterdir()
    return next(int(thread.name) for thread in threads if (thread / "comm").read_text() == "sweeper\n")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_rule_nothing_waits_between_pause_and_commit(world: World) -> None:
    """From the guest's stop to the commit: no flush, no file made, no map put into a map, no wait for RCU."""
    vm, peer = world.vm("h1", behaviour={"memory_ms": 50, "downtime_ms": 1000, "swallow": False}), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=20)
    ends = {"source": world.cluster.agents["h1"], "destination": world.cluster.agents["h2"]}
    files = {role: world.cluster.directory / f"{role}.strace" for role in ends}
    with traced(ends["source"], files["source"]), traced(ends["destination"], files["destination"]):
        world.move(vm, "h2")
    found = {r: [call for call in calls(files[r]) if call.thread != sweeper(ends[r])] for r in ends}
    began = stored(found["source"], "source", "draining")
    ended = stored(found["destination"], "destination", "committed")
    assert began < stored(found["destination"], "destination", "committing") < ended
    for role, daemon in ends.items():
        within = [call for call in found[role] if began <= call.at <= ended]
        waits = [f"{role}: {reason}: {call}" for call in within if (reason := reasons(call, daemon))]
        assert not waits, "\n".join(waits)
    # What is looked for is there when it is allowed: tracking begins by a map that is put into a map.
    before = [call for call in found["source"] if call.at < began]
    assert any(changes_map_in_map(call, ends["source"]) for call in before)
    talk.assert_whole()
