# SPDX-License-Identifier: GPL-2.0-only
"""TCP windows as a switch has to follow them, written apart from its C: numbers without limit, compared by RFC 1982.

G. van Rooij, "Real Stateful TCP Packet Filtering in IP Filter" (2001); RFC 9293 (windows, half-open connections), RFC
7323 (scaling), RFC 5961 (resets). `Windows` is one connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .model import MODEL
from .probe import ACK, FIN, RST, SYN

PASSES, KEEPS, OUTSIDE = "passes", "keeps", "outside"
NO_SCALE = 15
HALF, WHOLE = 1 << 31, 1 << 32
_EARLY = (MODEL.CT_NONE, MODEL.CT_SYN_SENT, MODEL.CT_SYN_SENT2)
_LATE = (MODEL.CT_FIN_WAIT, MODEL.CT_CLOSE_WAIT, MODEL.CT_LAST_ACK, MODEL.CT_TIME_WAIT, MODEL.CT_CLOSE)


def after(one: int, other: int) -> bool:
    """Is it later on the circle of sequence numbers?"""
    return 0 < (one - other) % WHOLE < HALF


def behind(offered: int) -> int:
    """So far back is an old copy, and further no segment of the connection."""
    return min(4 * max(offered, 1 << 16), 1 << 30)


@dataclass
class Segment:
    """`scale`: shift count of the SYN's option; NO_SCALE: it has none."""

    flags: int
    seq: int
    ack: int = 0
    window: int = 65535
    length: int = 0
    scale: int = NO_SCALE
    first_fragment: bool = False

    @property
    def end(self) -> int:
        return (self.seq + self.length + bool(self.flags & SYN) + bool(self.flags & FIN)) % WHOLE


@dataclass
class Side:
    """What one side sent and said."""

    known: bool = False
    scale: int = 0
    end: int = 0
    limit: int = 0
    acked: int = 0
    offered: int = 0


@dataclass
class Windows:
    """`ignored`: who sent a SYN in mid-connection, what acknowledges it, its scale."""

    sides: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))
    ignored: tuple[int, int, int] | None = None
    unchecked: bool = False

    @property
    def known(self) -> bool:
        return all(side.known for side in self.sides)

    def step(self, direction: int, segment: Segment, state: int) -> str:
        """What becomes of a segment of a connection in that state."""
        me, peer = self.sides[direction], self.sides[1 - direction]
        if segment.flags & SYN:
            return self._opens(direction, segment, state)
        if self.unchecked:
            return PASSES
        if not self.known:
            return self._refuses(me, peer, segment) if segment.flags & RST else PASSES
        if self._is_outside(me, peer, segment):
            return OUTSIDE
        if segment.flags & RST:
            exact = segment.seq in (peer.acked, me.end)
            return PASSES if exact or state in (*_LATE, MODEL.CT_SYN_SENT2) else KEEPS
        if segment.first_fragment:
            self.unchecked = True
            return PASSES
        self._follow(me, peer, segment)
        return PASSES

    # ---- the beginning ----

    def _opens(self, direction: int, segment: Segment, state: int) -> str:
        peer = self.sides[1 - direction]
        if not segment.flags & ACK:
            if state in _EARLY:
                self._begin(direction, segment)
            else:
                self.ignored = (direction, segment.end % (1 << 15), segment.scale)
            return PASSES
        if self.ignored and self.ignored[:2] == (1 - direction, segment.ack % (1 << 15)):
            scale = self.ignored[2]
            self._begin(1 - direction, Segment(SYN, (segment.ack - 1) % WHOLE, window=65535, scale=scale))
            self._begin(direction, segment)
        elif state in _EARLY:
            if peer.known and (peer.end - segment.ack) % WHOLE > 65535:
                if direction:
                    return KEEPS
                peer.end = segment.ack
            self._begin(direction, segment)
        return PASSES

    def _begin(self, direction: int, segment: Segment) -> None:
        me, peer = self.sides[direction], self.sides[1 - direction]
        me.known, me.scale, me.end, me.offered = True, segment.scale, segment.end, segment.window
        me.acked = segment.ack if segment.flags & ACK else peer.end
        peer.acked = segment.seq
        me.limit = (me.end + peer.offered) % WHOLE
        peer.limit = (me.acked + segment.window) % WHOLE
        self.ignored, self.unchecked = None, False

    def _refuses(self, me: Side, peer: Side, segment: Segment) -> str:
        if me.known:
            return PASSES if segment.seq == me.end else KEEPS
        if peer.known:
            return KEEPS if (peer.end - segment.ack) % WHOLE > 65535 else PASSES
        return PASSES

    # ---- afterwards ----

    def _is_outside(self, me: Side, peer: Side, segment: Segment) -> bool:
        if after(segment.seq, me.limit) and after(segment.end, me.limit + peer.offered):
            return True
        if after(me.end - behind(peer.offered), segment.end):
            return True
        if not segment.flags & ACK or (segment.flags & RST and segment.ack == 0):
            return False
        return after(segment.ack, peer.end) or after(peer.end - behind(me.offered), segment.ack)

    def _follow(self, me: Side, peer: Side, segment: Segment) -> None:
        scaled = NO_SCALE not in (me.scale, peer.scale)
        window = segment.window << me.scale if scaled else segment.window
        me.end = segment.end if after(segment.end, me.end) else me.end
        me.offered = max(me.offered, window)
        me.acked = segment.ack if after(segment.ack, me.acked) else me.acked
        limit = (segment.ack + max(window, 1)) % WHOLE
        peer.limit = limit if after(limit, peer.limit) else peer.limit
