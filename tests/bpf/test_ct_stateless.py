# SPDX-License-Identifier: GPL-2.0-only
"""What passes, or is judged, without a connection."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import frames
from .frames import ICMP6, UDP
from .model import MODEL
from .packets import pair, v4, wrap
from .probe import FROM, FROM_ONLY, TO, Probe, icmp, rule, state

Ports = Callable[..., Probe]


@pytest.mark.parametrize(
    ("direction", "kind", "hops", "passes"),
    [
        (FROM, 133, 255, True),  # router solicitation
        (FROM, 135, 255, True),  # neighbour solicitation
        (FROM, 136, 255, True),
        (TO, 135, 255, True),
        (TO, 136, 255, True),
        (TO, 134, 255, True),  # router advertisement
        (TO, 137, 255, True),  # redirect
        (FROM, 134, 255, False),  # a guest is no router
        (FROM, 137, 255, False),
        (TO, 135, 64, False),  # was routed
        (TO, 134, 254, False),
    ],
)
def test_discovery(ports: Ports, direction: int, kind: int, hops: int, passes: bool) -> None:
    port = ports([])
    packet = frames.ipv6(*pair(direction, True), ICMP6, icmp(kind) + bytes(16), hops)
    expected = MODEL.DROP_NONE if passes else MODEL.DROP_POLICY
    assert port.send(direction, wrap(direction, packet)) == expected
    assert port.table.keys() == []


@pytest.mark.parametrize(("direction", "kind"), [(FROM, 143), (FROM, 131), (FROM, 132), (TO, 130), (TO, 143)])
@pytest.mark.parametrize(
    ("sender", "hops", "passes"),
    [
        ("fe80::9", 1, True),
        ("::", 1, True),  # before it has an address
        ("2001:db8:f::9", 1, False),  # from anywhere, with a hop limit that was counted off
        ("fe80::9", 64, False),
    ],
)
def test_listener_messages_are_of_this_link(
    ports: Ports, direction: int, kind: int, sender: str, hops: int, passes: bool
) -> None:
    port = ports([])
    packet = frames.ipv6(sender, "2001:db8::1" if direction else "ff02::16", ICMP6, icmp(kind) + bytes(16), hops)
    assert port.send(direction, wrap(direction, packet)) == (MODEL.DROP_NONE if passes else MODEL.DROP_POLICY)
    assert port.table.keys() == []


@pytest.mark.parametrize("v6", [False, True])
def test_dhcp_answers_pass(ports: Ports, v6: bool) -> None:
    port = ports([])
    client, server = (546, 547) if v6 else (68, 67)
    assert port.udp(TO, client, server, v6=v6) == MODEL.DROP_NONE
    assert port.udp(TO, server, client, v6=v6) == MODEL.DROP_POLICY
    assert port.udp(FROM, client, server, v6=v6) == MODEL.DROP_POLICY
    assert port.table.keys() == []


@pytest.mark.parametrize("direction", [FROM, TO])
@pytest.mark.parametrize("target", [frames.BROADCAST, "01:00:5e:00:00:01", "33:33:00:00:00:01"])
def test_groups_are_judged_each_time(ports: Ports, direction: int, target: str) -> None:
    port = ports(FROM_ONLY)
    frame = wrap(direction, v4(direction, UDP, frames.udp(40000, 53)), target)
    for _ in range(2):
        assert port.send(direction, frame) == (MODEL.DROP_POLICY if direction else MODEL.DROP_NONE)
    assert port.table.keys() == []
    assert port.hits(0 if direction else 1)[0] == 2


def test_other_icmp_is_judged_each_time(ports: Ports) -> None:
    port = ports([rule(1, "from", protocol="icmp", icmp=[42, 3])])
    assert port.icmp(FROM, 42, code=3) == MODEL.DROP_NONE
    assert port.icmp(FROM, 42, code=4) == MODEL.DROP_POLICY
    assert port.icmp(TO, 42, code=3) == MODEL.DROP_POLICY
    assert port.table.keys() == []


def test_a_connection_and_a_record_may_look_alike(ports: Ports) -> None:
    """Fragment records and connections share the table: their keys differ by type."""
    port = ports(FROM_ONLY)
    port.put(port.key(UDP, 0, 77, type=MODEL.CT_TYPE_FRAGMENT, side=1), MODEL.CT_NEW)
    assert port.udp(FROM, 0, 77) == MODEL.DROP_NONE
    assert state(port.entry(port.key(UDP, 0, 77))) == MODEL.CT_NEW
    assert len(port.table.keys()) == 2
