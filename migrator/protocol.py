"""Which protocol this program speaks, and what two programs of different versions do with each other.

A higher minor only adds: fields, words and kinds that the other side may leave out. Whoever needs more of its peer than
the peer's minor has does not send it. Another major is refused before anything has changed.
"""

from __future__ import annotations

from migrator._pb import migrator_pb2 as pb
from migrator.errors import PreflightFailed

MAJOR, MINOR = 1, 1
"""1.0 had no numbers; 1.1 tells them, and which kinds are optional."""


def spoken() -> pb.Protocol:
    """By this program."""
    return pb.Protocol(major=MAJOR, minor=MINOR)


def known(message: pb.Protocol) -> pb.Protocol:
    """What was told; a program that tells nothing speaks 1.0."""
    return message if message.major else pb.Protocol(major=1, minor=0)


def text(message: pb.Protocol) -> str:
    """As people write it."""
    told = known(message)
    return f"{told.major}.{told.minor}"


def common(one: pb.Protocol, other: pb.Protocol) -> pb.Protocol | None:
    """The lower of two, None when they have no language in common."""
    one, other = known(one), known(other)
    return min(one, other, key=lambda told: told.minor) if one.major == other.major else None


def require(agreed: pb.Protocol) -> None:
    """Raises PreflightFailed for an agreed protocol that this program does not speak."""
    if common(agreed, spoken()) is None:
        raise PreflightFailed(
            f"protocol {text(agreed)} is not spoken here, {text(spoken())} is",
            hint="upgrade the older host first: docs/upgrades.md",
        )
