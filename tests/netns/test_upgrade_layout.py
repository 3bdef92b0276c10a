# SPDX-License-Identifier: GPL-2.0-only
"""A version whose maps have another layout takes over what is there, in place: connections live, nothing is lost."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from datapath.drivers.ebpf import syscall
from migrator.lab.processes import Daemon, wait_until

from .test_upgrade import EVERY_MS, counted, hosts, replace, version
from .traffic import Conversations, Streams
from .versions import Edit, Version, make_version
from .world import World

__all__ = ["hosts"]

TYPES, MAPS, LAYOUT = "datapath/bpf/lib/types.h", "datapath/bpf/lib/maps.h", "datapath/drivers/ebpf/layout.py"
COLOURS = """struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u32);
	PINNED;
} colours SEC(".maps");
"""
# Fields that are new, and fields elsewhere than they were, in the two structures that matter most; a table of its own;
# and a protocol that says more.
GROWN = (
    Edit(TYPES, "\t__u64 commit; /* epoch", "\t__u64 colour;\n\t__u64 commit; /* epoch"),
    Edit(LAYOUT, '        ("commit", "<u8"),\n', '        ("colour", "<u8"),\n        ("commit", "<u8"),\n'),
    Edit(TYPES, "\t__u32 mark;\n\t__u64 packets[2];         /*", "\t__u64 tint[2];\n\t__u64 packets[2];         /*"),
    Edit(TYPES, "\t__u64 id;     /* connection id", "\t__u32 mark;\n\t__u32 zone;\n\t__u64 id;     /* connection id"),
    Edit(
        LAYOUT,
        '        ("id", "<u8"),\n        ("judged", "<u4"),\n        ("mark", "<u4"),\n',
        '        ("mark", "<u4"),\n        ("zone", "<u4"),\n        ("id", "<u8"),\n'
        '        ("judged", "<u4"),\n        ("tint", "<u8", 2),\n',
    ),
    Edit(MAPS, "/* The agent maps it into its memory", COLOURS + "\n/* The agent maps it into its memory"),
    Edit("migrator/protocol.py", "MAJOR, MINOR = 1, 1", "MAJOR, MINOR = 1, 99"),
)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("versions"), "9.2.0", *GROWN)


def said(daemon: Daemon) -> str:
    """What an agent has said of its newest takeover."""
    lines = daemon.log.read_text().splitlines()
    return next((line for line in reversed(lines) if "switch taken over" in line), "")


@contextmanager
def coloured(world: World, host: str) -> Iterator[None]:
    """The grown version's own table holds something."""
    (pin,) = (world.cluster.directory / host / "bpf").glob("migrator-*/maps/colours")
    number, table = ctypes.c_uint32(7), syscall.obj_get(pin)
    try:
        syscall.map_update(table, ctypes.addressof(number), ctypes.addressof(number))
        yield
        syscall.map_delete(table, ctypes.addressof(number))
    finally:
        os.close(table)


def test_a_grown_layout_is_taken_over_and_given_back(hosts: World, grown: Version) -> None:
    """There by the new version, and back by the old one: numbered streams and connections notice neither."""
    vm, peer = hosts.vm("h1"), hosts.peer("h3")
    hosts.expected += ["it is left out", "table colours is not known"]
    talk = Conversations.begin(vm, peer, inbound=100, outbound=100, every_ms=100)
    streams = Streams(vm, peer, EVERY_MS)
    first = hosts.cluster.agents["h1"]
    own, before = version(hosts, "h1"), counted(hosts, vm)
    for following, number in ((grown.applied(first), grown.name), (first, own)):
        replace(hosts, "h1", following, Daemon.kill)
        assert version(hosts, "h1") == number
        print(said(following))
        assert re.search("1 ports stood for [0-9.]+ ms, [0-9]{3} connections", said(following))
        streams.run_on(500)
        after = counted(hosts, vm)
        assert all(after[name] > before[name] + 400 for name in before), f"{before} -> {after}"
        before = after
        if following is not first:
            hosts.follow(vm, ("h2", "h1"), within_s=60.0)
            streams.run_on(500)
            before = counted(hosts, vm)
            _refused(hosts, first, following, streams)
    streams.assert_perfect()
    talk.assert_whole()


def _refused(world: World, old: Daemon, grown: Daemon, streams: Streams) -> None:
    """A table that the old version does not know holds something: it does not start, and the programs go on."""
    grown.kill()
    with coloured(world, "h1"):
        old.start()
        wait_until("the old version gives up", lambda: not old.running(), 60.0)
        text = old.tail(3)
        assert "table colours is not known to this version" in text and "the programs that were here go on" in text
        streams.run_on(500)
