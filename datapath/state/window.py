"""Kind `window`: whether TCP segments are checked against their connection's window.

What is known of each connection's windows is part of the connection (kind `conntrack`) and moves with it.
"""

from __future__ import annotations

from typing import Literal

from datapath.state.document import Document
from datapath.state.kind import Kind, Nature, Record

PROTOCOL = "tcp"
"""A port has one record; this is its key."""


class WindowDocument(Document):
    """`{check: strict}`; `{}` is the same."""

    check: Literal["strict", "count"] = "strict"

    def records(self) -> list[Record]:
        return [{"protocol": PROTOCOL, "check": self.check}]


WINDOW = Kind(
    name="window",
    version=1,
    nature=Nature.CONFIGURATION | Nature.ACCOUNTING,
    key=("protocol",),
    fields={
        "protocol": (str,),
        "check": (str,),  # "strict" drops what is outside, "count" lets it pass
        "outside_from": (int,),  # accounting: segments from the guest outside of their connection's window
        "outside_to": (int,),  # accounting: the same to the guest
    },
    accounting=("outside_from", "outside_to"),
    choices={"protocol": frozenset({PROTOCOL}), "check": frozenset({"strict", "count"})},
    document=WindowDocument,
)
