"""Filters on their way to an agent."""

from __future__ import annotations

from collections.abc import Iterable

from migrator._pb import migrator_pb2 as pb
from migrator.watching.match import Match


def to_messages(matches: Iterable[Match]) -> list[pb.FieldMatch]:
    """As a request carries them."""
    return [pb.FieldMatch(field=one.field, values=one.values, negated=one.negated) for one in matches]


def of_messages(messages: Iterable[pb.FieldMatch]) -> list[Match]:
    """As they were written; whether the fields are there, `Filter` looks at."""
    return [Match(one.field, tuple(one.values), one.negated) for one in messages]
