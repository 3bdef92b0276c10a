"""Kind `qos`: how fast a port may be in each direction, and how its frames are marked.

One token bucket a direction, in bytes of Ethernet frames without FCS, segments of a GSO frame counted one by one: in
any interval of t seconds at most rate x t + burst passes. Who polices drops what exceeds it; who shapes lets it wait,
for which half of the burst is the room. Code points: RFC 2474, RFC 2597, RFC 3246, RFC 8622; priorities as in IEEE
802.1Q.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from datapath.state.document import Document
from datapath.state.kind import Kind, Nature, Record
from datapath.state.quantity import Rate, Size

RATE_MIN, RATE_MAX = 64_000, 32_000_000_000  # HTB knows 32 bits of bytes a second
BURST_MAX = 1 << 30
POLICE_BURST_MIN = 4096
SHAPE_BURST_MIN = 1 << 18
"""A frame of a guest that leaves segmentation to the host has up to 68 KiB: the bucket and the queue each take one."""
PRIORITY_MAX, DSCP_MAX = 7, 63
KEEP = -1  # the code point stays as the sender set it
_BURST_DEFAULT_S = {"shape": 0.05, "police": 0.5}  # TCP makes little of a policer with less

CODE_POINTS: dict[str, int] = {
    **{f"cs{number}": number << 3 for number in range(8)},
    **{f"af{group}{drop}": group << 3 | drop << 1 for group in range(1, 5) for drop in range(1, 4)},
    "ef": 46,
    "le": 1,
}


def _code_point(value: object) -> object:
    if isinstance(value, str) and not value.isdigit():
        if value.lower() not in CODE_POINTS:
            raise ValueError(f"expected 0..{DSCP_MAX} or one of {', '.join(CODE_POINTS)}")
        return CODE_POINTS[value.lower()]
    return value


class Way(BaseModel):
    """One direction of a port as an operator writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["shape", "police"] | None = None  # with a rate: shape
    rate: Annotated[Rate, Field(ge=RATE_MIN, le=RATE_MAX)] | None = None
    burst: Annotated[Size, Field(ge=POLICE_BURST_MIN, le=BURST_MAX)] | None = None
    priority: Annotated[int, Field(ge=0, le=PRIORITY_MAX)] = 0
    dscp: Annotated[int, BeforeValidator(_code_point), Field(ge=0, le=DSCP_MAX)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Way:
        if self.rate is None and (self.mode is not None or self.burst is not None):
            raise ValueError("expected a rate beside mode or burst")
        if self.rate is None and self.dscp is None and not self.priority:
            raise ValueError("expected a rate, a dscp or a priority")
        if self._mode() == "shape" and self.burst is not None and self.burst < SHAPE_BURST_MIN:
            raise ValueError(f"expected a burst of {SHAPE_BURST_MIN >> 10}KiB or more to shape")
        return self

    def _mode(self) -> str:
        return "none" if self.rate is None else self.mode or "shape"

    def _burst(self) -> int:
        if self.rate is None:
            return 0
        if self.burst is not None:
            return self.burst
        return min(max(SHAPE_BURST_MIN, int(self.rate / 8 * _BURST_DEFAULT_S[self._mode()])), BURST_MAX)

    def record(self, direction: str) -> Record:
        """The record of kind `qos` for "from" or "to" the guest."""
        return {
            "direction": direction,
            "mode": self._mode(),
            "rate_bps": self.rate or 0,
            "burst_bytes": self._burst(),
            "priority": self.priority,
            "dscp": KEEP if self.dscp is None else self.dscp,
        }


class QosDocument(Document):
    """`{from: {rate: 100mbit, burst: 512KiB}, to: {mode: police, rate: 1gbit}}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    from_: Way | None = Field(None, alias="from")
    to: Way | None = None

    def records(self) -> list[Record]:
        """One for each direction that is named."""
        ways = (("from", self.from_), ("to", self.to))
        return [way.record(direction) for direction, way in ways if way is not None]


QOS = Kind(
    name="qos",
    version=1,
    nature=Nature.CONFIGURATION | Nature.LIVE | Nature.ACCOUNTING,
    key=("direction",),
    fields={
        "direction": (str,),  # "from" the guest or "to" the guest
        "mode": (str,),  # "shape", "police", or "none": no rate
        "rate_bps": (int,),  # 0 with mode none
        "burst_bytes": (int,),  # the bucket's size; to shape, half of it is the queue
        "priority": (int,),  # 0..7, 7 goes first
        "dscp": (int,),  # 0..63 is written over the sender's, -1 keeps that
        "debt_ns": (int,),  # live: nanoseconds at the rate until the bucket is full again
        "dropped_packets": (int,),  # accounting: frames as on the wire
        "dropped_bytes": (int,),  # accounting
    },
    defaults={"priority": 0, "dscp": KEEP},
    accounting=("dropped_packets", "dropped_bytes"),
    live=("debt_ns",),
    choices={"direction": frozenset({"from", "to"}), "mode": frozenset({"shape", "police", "none"})},
    document=QosDocument,
)


def fault(record: Record) -> str:
    """Why a record whose types are right cannot be applied, "" if it can: it may come from another version's host."""
    limited = record["mode"] != "none"
    least = SHAPE_BURST_MIN if record["mode"] == "shape" else POLICE_BURST_MIN
    if limited and not RATE_MIN <= record["rate_bps"] <= RATE_MAX:
        return f"rate_bps {record['rate_bps']} is not in {RATE_MIN}..{RATE_MAX}"
    if limited and not least <= record["burst_bytes"] <= BURST_MAX:
        return f"burst_bytes {record['burst_bytes']} is not in {least}..{BURST_MAX}"
    if not 0 <= record["priority"] <= PRIORITY_MAX:
        return f"priority {record['priority']} is not in 0..{PRIORITY_MAX}"
    if not KEEP <= record["dscp"] <= DSCP_MAX:
        return f"dscp {record['dscp']} is not in {KEEP}..{DSCP_MAX}"
    if not 0 <= record.get("debt_ns", 0) < 1 << 63:
        return f"debt_ns {record['debt_ns']} is negative or beyond any clock"
    return ""
