# SPDX-License-Identifier: GPL-2.0-only
"""A port whose device is in a bridge of the host, which floods into it: only what the switch sends passes."""

from __future__ import annotations

import pytest

from .frames import BROADCAST, datagram, mac
from .lab import Lab
from .model import MODEL
from .test_forward_gate import two_ports

A, B = mac(1), mac(2)
PASS, SHOT = 0, 2
BRIDGED = MODEL.PORT_F_STATELESS | MODEL.PORT_F_BRIDGED


@pytest.mark.parametrize("target", [B, BROADCAST], ids=["unicast", "broadcast"])
def test_what_the_switch_sends_arrives(lab: Lab, target: str) -> None:
    a, b = two_ports(lab, flags=BRIDGED)
    a.send(datagram(target, A))
    assert b.receive() == datagram(target, A)
    assert (lab.counted(2, "packets", 1), lab.drops(2)) == (1, {})


def test_what_the_bridge_floods_does_not(lab: Lab) -> None:
    two_ports(lab, flags=BRIDGED)
    ifindex = lab.switch.get("ports", "port", 2).ifindex
    assert lab.switch.run("to_port", datagram(BROADCAST, A), ifindex).verdict == SHOT
    assert lab.drops(2) == {MODEL.DROP_NOT_OURS: 1}
    assert lab.switch.run("to_port", datagram(BROADCAST, A), ifindex, mark=MODEL.SKB_MARK_SENT).verdict == PASS
    assert lab.counted(2, "packets", 1) == 1
