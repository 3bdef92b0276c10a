"""Kind `acl`: the rules of a port's policy with its address sets resolved, and their hit counters.

Rules are stateful: they judge the first packet of a connection, in the direction in which it begins. The rule with the
lowest `priority` that matches wins; of equals, the first in the list. What no rule matches is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from datapath.state.kind import Kind, Nature, Record

ACCOUNTING = ("hits", "hit_bytes")

ACL = Kind(
    name="acl",
    version=1,
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
    },
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
