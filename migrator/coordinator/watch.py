"""Watch: a consistent snapshot, then every change, from any revision that is still kept.

A watcher reads changes from the journal at its own pace: nothing is queued for it in memory, and one that falls behind
what is kept is told so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.catalog import SORTS
from migrator.coordinator.journal import Entry
from migrator.coordinator.store import Store
from migrator.errors import ConfigInvalid

_BATCH = 1_000


async def watch(store: Store, from_revision: int, sorts: Sequence[str]) -> AsyncIterator[pb.Change]:
    """Changes of the sorts named (none: all). Raises ConfigInvalid (sort), RevisionCompacted."""
    unknown = sorted(set(sorts) - SORTS.keys())
    if unknown:
        raise ConfigInvalid(f"{unknown[0]!r} is no sort of object", hint=f"one of {', '.join(SORTS)}")
    wanted = frozenset(sorts or SORTS)
    revision = from_revision
    if not revision:
        revision = store.revision
        for change in list(snapshot(store, wanted)):
            yield change
    while True:
        entries = store.journal.changes(revision, _BATCH)
        for entry in entries:
            if entry.sort in wanted:
                yield to_change(entry)
        revision = entries[-1].revision if entries else revision
        await store.wait_after(revision)


def snapshot(store: Store, sorts: frozenset[str]) -> Iterator[pb.Change]:
    """All objects as they are now; the last message has `snapshot_end` and the revision to go on from."""
    for sort in SORTS:
        for name, message in store.catalog.objects[sort].items() if sort in sorts else ():
            change = pb.Change(revision=store.catalog.revisions[sort, name], sort=sort, name=name, snapshot=True)
            _fill(change, message)
            yield change
    yield pb.Change(revision=store.revision, snapshot=True, snapshot_end=True)


def to_change(entry: Entry) -> pb.Change:
    change = pb.Change(revision=entry.revision, sort=entry.sort, name=entry.name, removed=entry.body is None)
    if entry.body is not None:
        _fill(change, SORTS[entry.sort].FromString(entry.body))
    return change


def _fill(change: pb.Change, message: object) -> None:
    getattr(change, change.sort.replace("-", "_")).CopyFrom(message)
    if change.sort == "migration":
        change.migration.revision = change.revision
