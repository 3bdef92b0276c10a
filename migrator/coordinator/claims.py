"""What only one port may have, of the whole cluster or of a network: hosts see no ports but their own.

Kinds say what it is (Kind.claim); nothing here names one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from datapath.registry import KINDS
from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.errors import ConfigInvalid

Claimed = tuple[str, str, tuple[object, ...]]
"""Kind, network ("" the whole cluster) and what is claimed there."""


@lru_cache(maxsize=1 << 14)
def _values(kind: str, text: str) -> tuple[tuple[object, ...], ...]:
    """What a document claims. Every request checks every port, and few documents change."""
    claim = KINDS[kind].claim
    records = config.kind_records(kind, text) if claim is not None else ()
    return tuple(dict.fromkeys(claim.of(record) for record in records)) if claim is not None else ()


def claims(port: pb.Port) -> Iterator[Claimed]:
    """All that a port claims."""
    for kind, text in port.kinds.items():
        claim = KINDS[kind].claim if kind in KINDS else None
        if claim is not None:
            network = port.network if claim.by_network else ""
            yield from ((kind, network, values) for values in _values(kind, text))


def find_disputed(ports: Iterable[pb.Port]) -> Iterator[tuple[pb.Port, pb.Port, Claimed]]:
    """Two ports that claim the same, each pair once."""
    owners: dict[Claimed, pb.Port] = {}
    pairs = set()
    for port in ports:
        for claimed in claims(port):
            owner = owners.setdefault(claimed, port)
            pair = (owner.vm, owner.mac, port.vm, port.mac)
            if owner is not port and pair not in pairs:
                pairs.add(pair)
                yield owner, port, claimed


def check_claims(ports: Iterable[pb.Port], changed: frozenset[str]) -> list[str]:
    """Raises ConfigInvalid for what a port of `changed` (VM/MAC) claims and another has.

    Returns what others dispute: it was so before ports were compared, and no request for another port fails of it.
    """
    warnings = []
    for owner, port, (kind, network, values) in find_disputed(ports):
        both = [f"{one.vm}/{one.mac}" for one in (owner, port)]
        new, known = both if both[0] in changed and both[1] not in changed else reversed(both)
        claim = KINDS[kind].claim
        what = " of ".join([*map(str, values), *([f"network {network}"] if network else [])])
        sentence = f"port {new}: {kind}: {claim.what if claim else ''} {what} is port {known}'s"
        if changed.isdisjoint(both):
            warnings.append(sentence)
        else:
            raise ConfigInvalid(sentence, hint="give each port its own, or take it from the other port first")
    return warnings
