# SPDX-License-Identifier: GPL-2.0-only
"""One TCP connection, moved by the real processes: the first thing that must work."""

from __future__ import annotations

from .traffic import Conversations
from .world import World


def test_one_connection_moves(world: World, route: tuple[str, ...]) -> None:
    vm, peer = world.vm("h1"), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=1, outbound=0, every_ms=20)
    world.follow(vm, route)
    talk.assert_whole()
    talk.flow_on(1000)
