# SPDX-License-Identifier: GPL-2.0-only
"""TCP windows: what is in one, what is not, and a reference in Python beside random segments."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from . import frames
from .model import MODEL
from .probe import ACK, BOTH, FIN, FROM, RST, SYN, TO, Probe, flags, state
from .windows import KEEPS, NO_SCALE, OUTSIDE, WHOLE, Segment, Windows

ISN = (WHOLE - 3000, 5000)
"""Of the guest, and of the other side: one goes past the end of the numbers soon."""
SCALES = (7, 9)
Ports = Callable[..., Probe]


def options_of(scale: int) -> bytes:
    """MSS, SACK permitted, timestamps, scale: as Linux sends them."""
    head = b"\x02\x04\x05\xb4\x04\x02\x08\x0a" + bytes(8)
    return head + (b"" if scale == NO_SCALE else bytes((1, 3, 3, scale)))


class Link:
    """One TCP connection of a port that checks windows: sends segments, tells what becomes of them."""

    def __init__(self, ports: Ports, *, opener: int = FROM, v6: bool = False, **options: Any) -> None:
        self.port = ports(BOTH, **options)
        self.port.change(features=MODEL.FEATURE_WINDOW)
        self.opener, self.v6 = opener, v6
        self.key = self.port.key(frames.TCP, v6=v6)

    def send(self, direction: int, segment: Segment, gso_size: int = 0) -> int:
        ports = (80, 40000) if direction else (40000, 80)
        options = options_of(segment.scale) if segment.flags & SYN else b""
        size = (20 + len(options)) // 4 << 4
        numbers = (segment.seq % WHOLE, segment.ack % WHOLE, size, segment.flags, segment.window, 0, 0)
        body = struct.pack("!HHIIBBHHH", *ports, *numbers) + options + bytes(segment.length)
        frame = self.port.frame(direction, frames.TCP, body, v6=self.v6)
        if segment.first_fragment:
            frame = frame[:20] + b"\x20\x00" + frame[22:]
        return self.port.send(direction, frame, gso_size=gso_size)

    def open(self, scales: tuple[int, int] = SCALES) -> None:
        one, other = self.opener, 1 - self.opener
        begins = Segment(SYN, ISN[one], window=64240, scale=scales[one])
        answers = Segment(SYN | ACK, ISN[other], ISN[one] + 1, window=65160, scale=scales[other])
        for direction, segment in (
            (one, begins),
            (other, answers),
            (one, Segment(ACK, ISN[one] + 1, ISN[other] + 1, 512)),
        ):
            assert self.send(direction, segment) == MODEL.DROP_NONE
        assert self.state == MODEL.CT_ESTABLISHED

    @property
    def entry(self) -> Any:
        return self.port.entry(self.key)

    @property
    def state(self) -> int:
        return state(self.entry)

    def outside(self) -> list[int]:
        return list(self.port.switch.get("windows", "window_port", self.port.slot).outside)


@pytest.fixture(params=["v4-from", "v4-to", "v6-from"])
def link(ports: Ports, request: pytest.FixtureRequest) -> Link:
    family, opener = request.param.split("-")
    made = Link(ports, opener=TO if opener == "to" else FROM, v6=family == "v6")
    made.open()
    return made


def own(direction: int, ahead: int = 0, *, acked: int = 0, flags: int = ACK, **more: Any) -> Segment:
    """A segment `ahead` of what a side has sent, which acknowledges so much of the other."""
    fields = {"window": 512} | more
    return Segment(flags, ISN[direction] + 1 + ahead, ISN[1 - direction] + 1 + acked, **fields)


@pytest.mark.parametrize("direction", [FROM, TO])
def test_what_a_tcp_sends_passes(link: Link, direction: int) -> None:
    """Data, the same again, out of order, its acknowledgements late, keepalives, probes of a window that is shut."""
    other = 1 - direction
    steps: list[tuple[int, Segment]] = [
        (direction, own(direction, length=1000)),
        (direction, own(direction, 2000, length=1000)),
        (direction, own(direction, 1000, length=1000)),
        (direction, own(direction, length=1000)),
        (other, own(other, acked=3000)),
        (other, own(other, acked=1000)),
        (direction, own(direction, 2999, length=0)),
        (direction, own(direction, 2999, length=1)),
        (other, own(other, acked=3000, window=0)),
        (direction, own(direction, 3000, length=1)),
        (other, own(other, acked=3001, window=64)),
        (direction, own(direction, 3001, length=1000, flags=ACK | FIN)),
        (other, own(other, acked=4002, flags=ACK | FIN)),
        (direction, own(direction, 4002, acked=1)),
    ]
    for number, (side, segment) in enumerate(steps):
        assert link.send(side, segment) == MODEL.DROP_NONE, number
    assert link.state == MODEL.CT_TIME_WAIT
    assert link.outside() == [0, 0]


FORGED = {
    "ahead": {"ahead": 1 << 30},
    "behind": {"ahead": -(1 << 30)},
    "acknowledges what was not sent": {"acked": 1},
    "acknowledges what was long ago": {"acked": -(1 << 30)},
    "a reset": {"ahead": 1 << 30, "flags": RST},
    "a reset that acknowledges": {"ahead": 1 << 30, "flags": RST | ACK},
    "a reset that acknowledges what was not sent": {"acked": 9, "flags": RST | ACK},
    "an end": {"ahead": 1 << 30, "flags": FIN | ACK},
}


@pytest.mark.parametrize("direction", [FROM, TO])
@pytest.mark.parametrize("how", list(FORGED))
def test_a_forged_segment_is_dropped(link: Link, direction: int, how: str) -> None:
    forged = own(direction, length=10, **FORGED[how])
    before = bytes(link.entry)
    assert link.send(direction, forged) == MODEL.DROP_WINDOW
    assert bytes(link.entry) == before, "nor does it count, nor keep the connection alive"
    assert link.outside() == [direction == FROM, direction == TO]
    link.port.change(features=0)
    assert link.send(direction, forged) == MODEL.DROP_NONE


@pytest.mark.parametrize("scales", [(0, 0), (NO_SCALE, 9), (7, NO_SCALE), (14, 14), (200, 3)])
def test_a_window_is_as_large_as_both_agreed(ports: Ports, scales: tuple[int, int]) -> None:
    link = Link(ports)
    link.open(scales)
    shift = 0 if NO_SCALE in scales else min(scales[1], 14)
    assert link.send(TO, own(TO, window=65535)) == MODEL.DROP_NONE
    size = 65535 << shift
    assert link.entry.window_limit[FROM] == (ISN[FROM] + 1 + size) % WHOLE
    assert link.send(FROM, own(FROM, size, length=1)) == MODEL.DROP_NONE
    assert link.send(FROM, own(FROM, 2 * size + 1, length=1)) == MODEL.DROP_WINDOW


@pytest.mark.parametrize(
    "malformed", [b"\x05\x00\x00\x00", b"\x00\x03\x03\x07", b"\x01\x01\x01\x03", b"\x05\x01\x03\x03"]
)
def test_options_without_a_scale(ports: Ports, malformed: bytes) -> None:
    link = Link(ports)
    body = struct.pack("!HHIIBBHHH", 40000, 80, 7, 0, 6 << 4, SYN, 1000, 0, 0) + malformed
    assert link.port.send(FROM, link.port.frame(FROM, frames.TCP, body)) == MODEL.DROP_NONE
    assert link.entry.window & 15 == NO_SCALE


def test_a_gso_frame_is_as_long_as_its_segments(link: Link) -> None:
    assert link.send(FROM, own(FROM, length=2000), gso_size=500) == MODEL.DROP_NONE
    assert link.entry.window_end[FROM] == (ISN[FROM] + 1 + 2000) % WHOLE
    assert link.send(TO, own(TO, acked=2000)) == MODEL.DROP_NONE
    assert link.send(TO, own(TO, acked=2001)) == MODEL.DROP_WINDOW


@pytest.mark.parametrize("direction", [FROM, TO])
def test_a_reset_ends_a_connection_if_it_is_exact(link: Link, direction: int) -> None:
    assert link.send(direction, own(direction, 5, flags=RST)) == MODEL.DROP_NONE, "its receiver challenges it"
    assert link.state == MODEL.CT_ESTABLISHED
    assert link.send(direction, own(direction, -5, flags=RST)) == MODEL.DROP_NONE, "its receiver forgets it"
    assert link.state == MODEL.CT_ESTABLISHED
    assert link.send(direction, Segment(RST | ACK, ISN[direction] + 1, 0)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_CLOSE


def test_a_reset_ends_a_connection_that_closes(link: Link) -> None:
    assert link.send(FROM, own(FROM, flags=FIN | ACK)) == MODEL.DROP_NONE
    assert link.send(TO, own(TO, 5, flags=RST)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_CLOSE


@pytest.mark.parametrize("opener", [FROM, TO])
def test_a_reset_that_answers_a_syn_names_it(ports: Ports, opener: int) -> None:
    link, other = Link(ports, opener=opener), 1 - opener
    assert link.send(opener, Segment(SYN, ISN[opener])) == MODEL.DROP_NONE
    for wrong in (Segment(RST | ACK, 0, ISN[opener] + 2), Segment(RST | ACK, 0, ISN[opener] + 70_000)):
        assert link.send(other, wrong) == MODEL.DROP_NONE
        assert link.state == MODEL.CT_SYN_SENT
    assert link.send(opener, Segment(RST, ISN[opener] + 9)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_SYN_SENT
    assert link.send(other, Segment(RST | ACK, 0, ISN[opener] + 1)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_CLOSE


def test_who_opened_may_end_it_at_once(ports: Ports) -> None:
    link = Link(ports)
    link.send(FROM, Segment(SYN, ISN[FROM]))
    assert link.send(FROM, Segment(RST, ISN[FROM] + 1)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_CLOSE


def test_both_open_at_once(ports: Ports) -> None:
    link = Link(ports)
    for direction, segment in (
        (FROM, Segment(SYN, ISN[FROM], window=1000, scale=2)),
        (TO, Segment(SYN, ISN[TO], window=2000, scale=3)),
        (FROM, Segment(SYN | ACK, ISN[FROM], ISN[TO] + 1, 1000, scale=2)),
        (TO, Segment(SYN | ACK, ISN[TO], ISN[FROM] + 1, 2000, scale=3)),
        (FROM, own(FROM, length=1000)),
        (TO, own(TO, acked=1000, length=100)),
    ):
        assert link.send(direction, segment) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_ESTABLISHED
    assert link.send(TO, own(TO, acked=1001)) == MODEL.DROP_WINDOW


def test_a_syn_ack_of_another_connection(ports: Ports) -> None:
    """The guest answers it with a reset, which frees who sent it; towards the network the guest knows best."""
    link = Link(ports)
    link.send(FROM, Segment(SYN, ISN[FROM]))
    assert link.send(TO, Segment(SYN | ACK, 1, ISN[FROM] + 2)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_SYN_SENT
    inbound = Link(ports, opener=TO)
    inbound.send(TO, Segment(SYN, ISN[TO] + 1_000_000))  # forged
    assert inbound.send(FROM, Segment(SYN | ACK, ISN[FROM], ISN[TO] + 1)) == MODEL.DROP_NONE
    assert inbound.send(TO, own(TO, length=1000)) == MODEL.DROP_NONE
    assert inbound.send(TO, own(TO, 1 << 30)) == MODEL.DROP_WINDOW


@pytest.mark.parametrize("opener", [FROM, TO])
def test_a_syn_may_carry_data(ports: Ports, opener: int) -> None:
    """RFC 7413; whether it is taken says the answer."""
    other = 1 - opener
    for taken in (0, 500):
        link = Link(ports, opener=opener)
        assert link.send(opener, Segment(SYN, ISN[opener], length=500)) == MODEL.DROP_NONE
        assert link.send(other, Segment(SYN | ACK, ISN[other], ISN[opener] + 1 + taken)) == MODEL.DROP_NONE
        assert link.send(opener, own(opener, taken, length=100)) == MODEL.DROP_NONE
        assert link.send(other, own(other, acked=600)) == (MODEL.DROP_NONE if taken else MODEL.DROP_WINDOW)


@pytest.mark.parametrize("opener", [FROM, TO])
def test_ports_are_used_again(ports: Ports, opener: int) -> None:
    """After the end by a SYN; before the end by one that is ignored here and that the other side answers."""
    other = 1 - opener
    link = Link(ports, opener=opener)
    link.open()
    anew, seq = 0x4000_0000, 0x7777_0000
    assert link.send(opener, Segment(SYN, anew, scale=3)) == MODEL.DROP_NONE
    assert link.send(opener, own(opener, length=10)) == MODEL.DROP_NONE, "nothing has come of it yet"
    assert link.send(other, own(other, acked=10, flags=SYN | ACK)) == MODEL.DROP_NONE, "an answer, to something else"
    assert link.send(opener, own(opener, 10, length=10)) == MODEL.DROP_NONE
    assert link.send(opener, Segment(SYN, anew, scale=3)) == MODEL.DROP_NONE
    assert link.send(other, Segment(SYN | ACK, seq, anew + 1, 100, scale=4)) == MODEL.DROP_NONE
    assert link.send(opener, Segment(ACK, anew + 1, seq + 1, 1000, 50)) == MODEL.DROP_NONE
    assert link.entry.window_offered[opener] == max(1000 << 3, 65535)
    assert link.send(opener, own(opener, 30)) == MODEL.DROP_WINDOW
    assert link.send(opener, Segment(RST, anew + 51)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_CLOSE
    assert link.send(opener, Segment(SYN, 1)) == MODEL.DROP_NONE
    assert link.send(other, Segment(SYN | ACK, 2, 2)) == MODEL.DROP_NONE
    assert link.send(opener, Segment(ACK, 2, 3, length=20)) == MODEL.DROP_NONE
    assert link.send(other, Segment(ACK, 3, 22)) == MODEL.DROP_NONE


def test_what_began_before_is_not_checked(ports: Ports) -> None:
    link = Link(ports)
    link.port.change(features=0)
    link.open()
    link.port.change(features=MODEL.FEATURE_WINDOW)
    assert link.send(TO, own(TO, 1 << 30)) == MODEL.DROP_NONE
    assert link.send(TO, own(TO, 1 << 30, flags=RST)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_CLOSE


def test_what_began_a_moment_before_is_not_checked(ports: Ports) -> None:
    """The answer to a SYN that nobody looked at says nothing of its scale."""
    link = Link(ports)
    link.port.change(features=0)
    assert link.send(FROM, Segment(SYN, ISN[FROM])) == MODEL.DROP_NONE
    link.port.change(features=MODEL.FEATURE_WINDOW)
    assert link.send(TO, Segment(SYN | ACK, ISN[TO], ISN[FROM] + 1)) == MODEL.DROP_NONE
    assert link.send(FROM, own(FROM)) == MODEL.DROP_NONE
    assert link.send(TO, own(TO, 1 << 30)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_ESTABLISHED


def test_other_protocols_have_no_windows(ports: Ports) -> None:
    link = Link(ports)
    assert link.port.udp(FROM) == MODEL.DROP_NONE
    assert link.port.udp(TO) == MODEL.DROP_NONE
    assert link.port.entry(link.port.key(frames.UDP, rport=53)).window == 0


def test_what_is_taken_up_in_the_middle_is_not_checked(ports: Ports) -> None:
    link = Link(ports, flags=MODEL.PORT_F_LEARNING)
    assert link.send(TO, own(TO, length=10)) == MODEL.DROP_NONE
    assert link.send(TO, own(TO, 1 << 30)) == MODEL.DROP_NONE
    assert flags(link.entry) & MODEL.CT_F_LEARNED
    assert link.outside() == [0, 0]


def test_windows_are_forgotten(link: Link) -> None:
    """The agent says so when it begins to check: what passed meanwhile was not followed."""
    context = MODEL.ct_batch(slot=link.port.slot)
    assert link.port.switch.call("ct_forget_windows", context) == 0
    assert (context.found, link.entry.window) == (1, 0)
    assert link.send(TO, own(TO, 1 << 30)) == MODEL.DROP_NONE
    assert link.port.switch.call("ct_forget_windows", MODEL.ct_batch(slot=link.port.slot)) == 0
    assert link.port.switch.call("ct_forget_windows", MODEL.ct_batch(slot=1023)) == -2, "no such table"


def test_a_fragmented_segment_is_of_unknown_length(ports: Ports) -> None:
    link = Link(ports)
    link.open()
    assert link.send(TO, own(TO, 1 << 30, length=8, first_fragment=True)) == MODEL.DROP_WINDOW
    assert link.send(TO, own(TO, length=8, first_fragment=True)) == MODEL.DROP_NONE
    assert link.entry.window & MODEL.WINDOW_F_UNCHECKED
    assert link.send(FROM, own(FROM, acked=3000)) == MODEL.DROP_NONE
    assert link.send(TO, own(TO, 1 << 30, flags=RST)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_CLOSE


@pytest.mark.parametrize("direction", [FROM, TO])
def test_a_port_that_counts_lets_pass(link: Link, direction: int) -> None:
    link.port.switch.put("windows", link.port.slot, MODEL.window_port(count_only=1))
    assert link.send(direction, own(direction, 1 << 30, length=10)) == MODEL.DROP_NONE
    assert link.send(direction, own(direction, 1 << 30, flags=RST)) == MODEL.DROP_NONE
    assert link.state == MODEL.CT_ESTABLISHED
    assert link.outside()[direction] == 2
    assert link.send(direction, own(direction, length=10)) == MODEL.DROP_NONE
    assert link.outside()[direction] == 2


def test_a_port_that_learns_drops_none(ports: Ports) -> None:
    link = Link(ports, flags=MODEL.PORT_F_LEARNING)
    link.open()
    assert link.send(TO, own(TO, 1 << 30)) == MODEL.DROP_NONE
    assert link.port.counted("would_drop") == 1
    assert link.outside() == [0, 0]


def test_changes_are_noted_for_a_migration(link: Link) -> None:
    """As changes of a window, so that data alone does not keep a copy from coming to its end."""
    link.port.track()
    window = link.key[:37] + bytes([MODEL.CT_TYPE_WINDOW]) + link.key[38:]
    link.send(TO, own(TO, length=10))
    assert link.port.drain() == {window}
    link.send(TO, own(TO, length=10))
    link.send(TO, own(TO, 1 << 30))
    assert link.port.drain() == set()
    link.send(TO, own(TO, 10, flags=FIN | ACK))
    assert link.port.drain() == {window, link.key}


def random_segment(random_: random.Random, windows: Windows, direction: int) -> Segment:
    me, peer = windows.sides[direction], windows.sides[1 - direction]
    flags_ = random_.choices([ACK, ACK | FIN, SYN, SYN | ACK, RST, RST | ACK], [30, 2, 3, 3, 2, 2])[0]
    near = [0, 1, -1, random_.randint(-3000, 3000), random_.randint(-(1 << 19), 1 << 19), random_.getrandbits(32)]
    bases = [me.end, me.limit, peer.acked, me.end - 4 * 65536, me.end - (1 << 30), me.limit + peer.offered]
    replies = [peer.end, peer.end, me.acked, peer.end - 4 * max(65536, me.offered)]
    return Segment(
        flags_,
        (random_.choice(bases) + random_.choice(near)) % WHOLE,
        random_.choice([0, *[(random_.choice(replies) + random_.choice(near)) % WHOLE] * 9]),
        random_.choice([0, 1, 512, 65535, random_.getrandbits(16)]),
        random_.choice([0, 0, 1, 1000]),
        random_.choice([NO_SCALE, 0, 7, 14]),
        first_fragment=random_.random() < 0.002 and not flags_ & SYN,
    )


def same(entry: Any, windows: Windows) -> bool:
    known = [bool(entry.window & MODEL.WINDOW_F_FROM), bool(entry.window & MODEL.WINDOW_F_TO)]
    if known != [side.known for side in windows.sides]:
        return False
    fields = [*entry.window_end, *entry.window_limit, *entry.window_acked, *entry.window_offered]
    names = ("end", "limit", "acked", "offered")
    return not all(known) or fields == [getattr(side, name) for name in names for side in windows.sides]


@pytest.mark.parametrize("seed", range(3))
def test_random_segments_beside_the_reference(ports: Ports, seed: int) -> None:
    """Most are near the edges of what may be; the state machine is the kernel's own, which test_ct_tcp has."""
    random_ = random.Random(seed)
    seen = {"passes": 0, KEEPS: 0, OUTSIDE: 0}
    for _ in range(40):
        link = Link(ports, opener=random_.choice([FROM, TO]))
        link.open((random_.choice([0, 7, NO_SCALE]), random_.choice([0, 7, 14])))
        link.port.table.delete(link.key)
        windows, before = Windows(), MODEL.CT_NONE
        for number in range(60):
            direction = random_.choice([FROM, TO])
            segment = random_segment(random_, windows, direction)
            if number < 3:
                segment = _opening(link.opener, number)
                direction = link.opener if number != 1 else 1 - link.opener
            identifier = link.entry.id if link.entry else 0
            reason = link.send(direction, segment)
            if reason == MODEL.DROP_CT_INVALID:
                continue
            fresh = link.entry.id != identifier
            windows = Windows() if fresh else windows
            result = windows.step(direction, segment, MODEL.CT_NONE if fresh else before)
            seen[result] += 1
            where = f"seed {seed}, segment {number} {direction} {segment} in state {before}: {result}"
            assert reason == (MODEL.DROP_WINDOW if result == OUTSIDE else MODEL.DROP_NONE), where
            assert result == "passes" or link.state == before, where
            assert same(link.entry, windows), where
            before = link.state
    assert min(seen.values()) > 50, seen


def _opening(opener: int, number: int) -> Segment:
    one, other = ISN[opener], ISN[1 - opener]
    segments = (
        Segment(SYN, one, window=64240, scale=7),
        Segment(SYN | ACK, other, one + 1, 65160, scale=9),
        Segment(ACK, one + 1, other + 1, 512),
    )
    return segments[number]


def test_the_entry_stays_in_its_size_class() -> None:
    """htab_elem (48), key, value and a list node share a slab object of 256 bytes."""
    assert 48 + ctypes.sizeof(MODEL.ct_key) + ctypes.sizeof(MODEL.ct_entry) + 8 <= 256
