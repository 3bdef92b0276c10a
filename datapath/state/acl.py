"""Kind `acl`: the rules of a port's policy with its address sets resolved, and their hit counters.

Rules are stateful: they judge the first packet of a connection, in the direction in which it begins. The rule with the
lowest `priority` that matches wins; of equals, the first in the list. What no rule matches is dropped.

A rule may match the mark and the label that a connection has when it is judged again, and may give them to one that it
lets in (`LABELS`, docs/labels.md). Those fields are in a record only where they are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from datapath.state.kind import Kind, Nature, Record
from datapath.state.labels import LABEL_BITS, MARK_BITS

ACCOUNTING = ("hits", "hit_bytes")
LABELS = {"mark": MARK_BITS, "label": LABEL_BITS, "set_mark": MARK_BITS, "set_label": LABEL_BITS}
"""Fields with VALUE or VALUE/MASK of so many bits; see `datapath.state.labels`."""

ACL = Kind(
    name="acl",
    version=2,
    nature=Nature.CONFIGURATION | Nature.ACCOUNTING,
    key=("id",),
    fields={
        "id": (int,),  # 1..2^32-1, stable for the rule; hit counters belong to it. 0 is the default drop
        "direction": (str,),  # "from" the guest or "to" the guest
        "priority": (int,),  # 0..65535, lowest wins
        "protocol": (str, int),  # "any", "tcp", "udp", "icmp", "icmpv6" or a number 0..255
        "remote": (list,),  # prefixes as text, address sets resolved; [] any
        "ports": (list,),  # [[first, last], ...] of the destination port; [] any. tcp and udp only
        "icmp": (list,),  # [type, code], [type], or [] any. icmp and icmpv6 only
        "action": (str,),  # "allow", "drop", "reject"
        "log": (bool,),
        "hits": (int,),  # accounting: connections begun or packets dropped by this rule
        "hit_bytes": (int,),  # accounting
        "mark": (str,),  # only a connection whose mark is so; one that begins has 0
        "label": (str,),  # the same of its label
        "set_mark": (str,),  # allow: what a connection gets that begins by this rule
        "set_label": (str,),
    },
    since=dict.fromkeys(LABELS, 2),
    accounting=ACCOUNTING,
    choices={"direction": frozenset({"from", "to"}), "action": frozenset({"allow", "drop", "reject"})},
)


def digest(rules: Sequence[Record]) -> int:
    """32-bit digest of what the rules decide (never 0): the same rules give the same digest on every host."""
    text = json.dumps(
        [{k: v for k, v in sorted(rule.items()) if k not in ACCOUNTING} for rule in rules],
        separators=(",", ":"),
    )
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") or 1
