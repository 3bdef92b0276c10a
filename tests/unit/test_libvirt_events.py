"""What libvirt and QEMU say, as the agent's words: every event there is, and whole stories of a migration."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import libvirt
import pytest

from migrator.agent.libvirt import domains, events, memory
from migrator.agent.libvirt.events import Move, Track, Word
from migrator.agent.libvirt.memory import Aim
from migrator.agent.libvirt.metadata import Lead
from migrator.lifecycle import source
from migrator.lifecycle import source_words as leaving
from migrator.lifecycle.machine import Guest

RUNS = Track(Guest.RUNNING)
LEAVES = Track(Guest.RUNNING, Move.OUT)
COMES = Track(Guest.GONE, Move.IN)
ALL = [Track(guest, move) for guest, move in itertools.product(Guest, Move)]

_PREFIX = "VIR_DOMAIN_EVENT_"
SORTS = {
    name.removeprefix(_PREFIX): getattr(libvirt, name)
    for name in dir(libvirt)
    if name.startswith(_PREFIX) and name.count("_") == 3 and isinstance(getattr(libvirt, name), int)
}
SORTS.pop("LAST", None)


def details(sort: str) -> dict[str, int]:
    prefix = f"{_PREFIX}{sort}_"
    found = {n.removeprefix(prefix): getattr(libvirt, n) for n in dir(libvirt) if n.startswith(prefix)}
    found.pop("LAST", None)
    return found


LIFECYCLE = [(sort, detail) for sort in SORTS for detail in details(sort)]


def number(name: str) -> tuple[int, int]:
    """ "SUSPENDED/MIGRATED" as libvirt's two numbers."""
    sort, detail = name.split("/")
    return SORTS[sort], details(sort)[detail]


def tell(track: Track, story: Iterable[str]) -> tuple[Track, list[tuple[str, bool]]]:
    """The words of a story: "SUSPENDED/MIGRATED" is a step of libvirt's, "STOP" and "MIGRATION:active" are QEMU's."""
    said = []
    for step in story:
        name, _, argument = step.partition(":")
        if "/" in step:
            track, word = events.lifecycle(track, *number(step))
        else:
            data: dict[str, Any] = {"pass": int(argument)} if name == "MIGRATION_PASS" else {"status": argument}
            track, word = events.monitor(track, name, data)
        if word is not None:
            said.append((word.what, word.moving))
    return track, said


# ---- the table ----

MEANING: dict[str, tuple[str, bool] | None] = {
    # event of libvirt -> what is told where the guest runs here, and nothing was said by QEMU
    "SUSPENDED/PAUSED": ("paused", False),
    "SUSPENDED/MIGRATED": ("paused", True),
    "SUSPENDED/IOERROR": ("paused", False),
    "SUSPENDED/WATCHDOG": ("paused", False),
    "SUSPENDED/RESTORED": ("paused", False),
    "SUSPENDED/FROM_SNAPSHOT": ("paused", False),
    "SUSPENDED/API_ERROR": ("paused", False),
    "SUSPENDED/POSTCOPY": ("paused", True),
    "SUSPENDED/POSTCOPY_FAILED": ("paused", True),
    "RESUMED/UNPAUSED": ("running", False),
    "RESUMED/MIGRATED": ("running", True),
    "RESUMED/FROM_SNAPSHOT": ("running", False),
    "RESUMED/POSTCOPY": ("running", True),
    "RESUMED/POSTCOPY_FAILED": ("running", True),
    "STOPPED/SHUTDOWN": ("gone", False),
    "STOPPED/DESTROYED": ("gone", False),
    "STOPPED/CRASHED": ("gone", False),
    "STOPPED/MIGRATED": ("gone", True),
    "STOPPED/SAVED": ("gone", False),
    "STOPPED/FAILED": ("gone", False),
    "STOPPED/FROM_SNAPSHOT": ("gone", False),
    "STARTED/BOOTED": None,
    "STARTED/MIGRATED": None,
    "STARTED/RESTORED": None,
    "STARTED/FROM_SNAPSHOT": None,
    "STARTED/WAKEUP": ("running", False),
    "CRASHED/PANICKED": ("paused", False),
    "CRASHED/CRASHLOADED": None,
    "PMSUSPENDED/MEMORY": ("paused", False),
    "PMSUSPENDED/DISK": ("paused", False),
    "SHUTDOWN/FINISHED": None,
    "SHUTDOWN/GUEST": None,
    "SHUTDOWN/HOST": None,
    "DEFINED/ADDED": None,
    "DEFINED/UPDATED": None,
    "DEFINED/RENAMED": None,
    "DEFINED/FROM_SNAPSHOT": None,
    "UNDEFINED/REMOVED": None,
    "UNDEFINED/RENAMED": None,
}
AFTER = {"paused": Guest.PAUSED, "running": Guest.RUNNING, "gone": Guest.GONE}


def test_every_event_of_this_libvirt_has_a_meaning() -> None:
    assert {f"{sort}/{detail}" for sort, detail in LIFECYCLE} == set(MEANING)


@pytest.mark.parametrize("name", MEANING)
def test_what_an_event_means_where_the_guest_runs(name: str) -> None:
    track, word = events.lifecycle(RUNS, *number(name))
    assert (None if word is None else (word.what, word.moving)) == MEANING[name]
    assert track.guest is (RUNS.guest if word is None else AFTER[word.what])


@pytest.mark.parametrize("name", MEANING)
@pytest.mark.parametrize("track", ALL, ids=lambda t: f"{t.guest}-{t.move}")
def test_words_and_what_is_kept_agree(track: Track, name: str) -> None:
    after, word = events.lifecycle(track, *number(name))
    if word is not None and word.what in AFTER:
        assert after.guest is AFTER[word.what]
    elif word is None and track.guest is Guest.RUNNING:
        assert after.guest is Guest.RUNNING, "a guest that stops is told of"
    if name.startswith("STOPPED/"):
        assert after == Track(), "nothing is in hand of a VM that is not here"


def test_an_unknown_detail_is_no_pause_of_a_move() -> None:
    _, word = events.lifecycle(RUNS, SORTS["SUSPENDED"], 99)
    assert word == Word("paused", False, "suspended")
    assert events.lifecycle(RUNS, 99, 0) == (RUNS, None)


# ---- stories ----

STORIES = {
    "QEMU stops the guest": (
        LEAVES,
        ["MIGRATION_PASS:2", "STOP", "SUSPENDED/MIGRATED", "MIGRATION:completed", "STOPPED/MIGRATED"],
        [("paused", True), ("gone", True)],
        Track(),
    ),
    "it comes": (
        Track(),
        ["STARTED/MIGRATED", "MIGRATION:active", "MIGRATION:completed", "RESUME", "RESUMED/MIGRATED"],
        [("running", True)],
        RUNS,
    ),
    "it comes and nobody hears QEMU": (COMES, ["RESUMED/MIGRATED"], [("running", True)], RUNS),
    "it leaves and nobody hears QEMU": (
        LEAVES,
        ["SUSPENDED/MIGRATED", "STOPPED/MIGRATED"],
        [("paused", True), ("gone", True)],
        Track(),
    ),
    "a rollback": (
        LEAVES,
        ["STOP", "SUSPENDED/MIGRATED", "MIGRATION:failed", "RESUME", "RESUMED/MIGRATED"],
        [("paused", True), ("running", False)],
        RUNS,
    ),
    "a rollback whose words of libvirt's come late": (
        LEAVES,
        ["STOP", "RESUME", "SUSPENDED/MIGRATED", "RESUMED/MIGRATED"],
        [("paused", True), ("running", True)],
        RUNS,
    ),
    "aborted while it ran": (LEAVES, ["MIGRATION:cancelled"], [("failed", True)], RUNS),
    "failed while it ran": (LEAVES, ["MIGRATION_PASS:1", "MIGRATION:failed"], [("failed", True)], RUNS),
    "a plain suspend": (
        RUNS,
        ["STOP", "SUSPENDED/PAUSED", "RESUME", "RESUMED/UNPAUSED"],
        [("paused", False), ("running", False)],
        RUNS,
    ),
    "a live snapshot: memory into a file, then QEMU stops": (
        RUNS,
        ["MIGRATION:setup", "MIGRATION:active", "STOP", "SUSPENDED/PAUSED", "MIGRATION:completed", "RESUME"],
        [("paused", False), ("running", False)],
        Track(Guest.RUNNING, start_told=True),
    ),
    "a save": (
        RUNS,
        ["STOP", "SUSPENDED/PAUSED", "MIGRATION:setup", "MIGRATION:completed", "STOPPED/SAVED"],
        [("paused", False), ("gone", False)],
        Track(),
    ),
    "a start": (Track(), ["RESUME", "RESUMED/UNPAUSED", "STARTED/BOOTED"], [("running", False)], RUNS),
    "a start that stays paused": (
        Track(),
        ["STARTED/BOOTED", "SUSPENDED/PAUSED"],
        [("paused", False)],
        Track(Guest.PAUSED),
    ),
    "a restore": (Track(), ["STARTED/RESTORED", "RESUME", "RESUMED/UNPAUSED"], [("running", False)], RUNS),
    "moved while it was paused": (
        Track(Guest.PAUSED, Move.OUT),
        ["MIGRATION:completed", "STOPPED/MIGRATED"],
        [("gone", True)],
        Track(),
    ),
    "it comes and stays paused": (COMES, ["SUSPENDED/PAUSED"], [("paused", True)], Track(Guest.PAUSED)),
    "post-copy at the source": (
        LEAVES,
        ["MIGRATION:postcopy-active", "STOP", "SUSPENDED/MIGRATED", "SUSPENDED/POSTCOPY", "STOPPED/MIGRATED"],
        [("paused", True), ("paused", True), ("gone", True)],
        Track(),
    ),
    "post-copy at the destination": (
        COMES,
        ["RESUME", "RESUMED/POSTCOPY", "RESUMED/MIGRATED"],
        [("running", True), ("running", True)],
        RUNS,
    ),
    "post-copy that failed, at the source": (
        LEAVES,
        ["MIGRATION:postcopy-active", "STOP", "SUSPENDED/MIGRATED", "MIGRATION:failed", "SUSPENDED/POSTCOPY_FAILED"],
        [("paused", True), ("paused", True)],
        Track(Guest.PAUSED, Move.OUT, postcopy=True),
    ),
    "an arrival that fails": (COMES, ["MIGRATION:failed", "STOPPED/FAILED"], [("gone", False)], Track()),
    "its destination dies after the pause, libvirt starts it again": (
        LEAVES,
        ["STOP", "SUSPENDED/MIGRATED", "MIGRATION:failed", "RESUMED/MIGRATED"],
        [("paused", True), ("running", True)],
        RUNS,
    ),
    "we stopped it, and its move had ended before": (
        LEAVES,
        ["STOP", "SUSPENDED/PAUSED"],
        [("paused", True), ("failed", True)],
        Track(Guest.PAUSED),
    ),
    "it crashes on its way": (LEAVES, ["STOPPED/CRASHED"], [("gone", False)], Track()),
    "it shuts down on its way": (
        LEAVES,
        ["SHUTDOWN/GUEST", "STOPPED/SHUTDOWN"],
        [("gone", False)],
        Track(),
    ),
    "it resets on its way": (LEAVES, ["RESET"], [], LEAVES),
}


@pytest.mark.parametrize("name", STORIES)
def test_a_story_is_told_right(name: str) -> None:
    track, story, said, after = STORIES[name]
    found, words = tell(track, story)
    assert words == said
    assert (found.guest, found.move, found.postcopy) == (after.guest, after.move, after.postcopy)


def test_passes_are_counted_from_the_beginning_of_each_move() -> None:
    track, _ = tell(LEAVES, ["MIGRATION_PASS:1", "MIGRATION_PASS:2", "MIGRATION_PASS:1"])
    assert track.passes == 2
    track, _ = tell(track, ["MIGRATION:cancelled", "MIGRATION:setup", "MIGRATION_PASS:1"])
    assert track.passes == 1


def test_where_memory_goes_is_asked_when_it_is_not_known() -> None:
    active = {"status": "active"}
    assert events.unexplained(RUNS, "MIGRATION", active)
    assert not events.unexplained(LEAVES, "MIGRATION", active)
    assert not events.unexplained(COMES, "MIGRATION", active)
    assert not events.unexplained(RUNS, "MIGRATION", {"status": "completed"})
    assert not events.unexplained(RUNS, "STOP", {})


# ---- what follows in the source's machine ----


def lead(*steps: str) -> source.State:
    """The source's machine that has stopped the guest, and is told a story."""
    state = source.State(phase=leaving.Phase.SUSPENDING, suspended=True, authorised=True, peer=True)
    _, words = tell(LEAVES, steps)
    for what, moving in words:
        made = {
            "paused": leaving.GuestPaused(moving=moving),
            "running": leaving.GuestResumed(),
            "failed": leaving.Failed("it failed"),
            "gone": leaving.GuestGone(moved=moving),
        }[what]
        state, _ = source.step(state, made)
    return state


def test_the_stop_of_a_guest_that_we_lead_is_the_pause() -> None:
    assert lead("STOP", "SUSPENDED/MIGRATED").phase is leaving.Phase.DRAINING


def test_a_guest_that_runs_again_is_rolled_back() -> None:
    assert lead("STOP", "SUSPENDED/MIGRATED", "RESUME", "RESUMED/MIGRATED").phase is leaving.Phase.ABORTED


def test_a_stop_after_the_end_of_the_move_is_undone() -> None:
    """Nobody but us would start that guest again."""
    assert lead("MIGRATION:cancelled").phase is leaving.Phase.ABORTING
    assert lead("STOP", "SUSPENDED/PAUSED").phase is leaving.Phase.ABORTING


def test_a_post_copy_that_failed_never_comes_back() -> None:
    state = lead("STOP", "SUSPENDED/MIGRATED", "SUSPENDED/POSTCOPY", "MIGRATION:failed", "SUSPENDED/POSTCOPY_FAILED")
    assert state.phase is leaving.Phase.DRAINING
    assert state.guest is Guest.PAUSED


# ---- what is found ----

RUNNING, PAUSED = libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED


@pytest.mark.parametrize(
    ("track", "state", "reason", "is_leaving", "guest", "word"),
    [
        (Track(), RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED, False, Guest.RUNNING, Word("running", False, "found so")),
        (RUNS, RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED, False, Guest.RUNNING, None),
        (RUNS, RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED, True, Guest.RUNNING, None),
        (COMES, RUNNING, libvirt.VIR_DOMAIN_RUNNING_MIGRATED, False, Guest.RUNNING, Word("running", True, "found so")),
        (COMES, RUNNING, libvirt.VIR_DOMAIN_RUNNING_POSTCOPY, False, Guest.RUNNING, Word("running", True, "found so")),
        (COMES, PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, False, Guest.GONE, None),
        (Track(), PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, False, Guest.GONE, None),
        (RUNS, PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, True, Guest.PAUSED, Word("paused", True, "found so")),
        (RUNS, PAUSED, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY, False, Guest.PAUSED, Word("paused", True, "found so")),
        (RUNS, PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER, False, Guest.PAUSED, Word("paused", False, "found so")),
        (Track(Guest.PAUSED), PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER, False, Guest.PAUSED, None),
        (RUNS, libvirt.VIR_DOMAIN_CRASHED, 0, False, Guest.PAUSED, Word("paused", False, "found so")),
    ],
)
def test_the_truth_replaces_what_was_missed(
    track: Track, state: int, reason: int, is_leaving: bool, guest: Guest, word: Word | None
) -> None:
    after, said = events.found(track, state, reason, leaving=is_leaving)
    assert (after.guest, said) == (guest, word)
    if is_leaving:
        assert after.move is Move.OUT


def test_who_is_missing_has_moved_only_if_it_was_stopped_for_that() -> None:
    assert events.missing(LEAVES)[1] == Word("gone", False, "not found")
    assert events.missing(Track(Guest.PAUSED, Move.OUT))[1] == Word("gone", True, "migrated")
    assert events.missing(Track(Guest.PAUSED))[1] == Word("gone", False, "not found")
    assert events.missing(COMES)[1] == Word("gone", False, "not found")
    assert events.missing(Track())[1] is None


def test_qemus_time_is_told_on_our_clock() -> None:
    assert events.monotonic(100, 500_000, now=7.0, wall=101.0) == pytest.approx(6.5)
    assert events.monotonic(102, 0, now=7.0, wall=101.0) == 7.0, "a time to come is not believed"
    assert events.monotonic(10, 0, now=7.0, wall=101.0) == 7.0, "nor one of another clock"


# ---- when to lead ----

STATS = {
    "type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED,
    "operation": libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
    "memory_total": 1 << 30,
    "memory_remaining": 30_000_000,
    "memory_processed": 500_000_000,
    "memory_bps": 100_000_000,
    "memory_iteration": 2,
    "memory_dirty_rate": 10,
    "memory_page_size": 4096,
    "downtime": 300,
}


@pytest.mark.parametrize(
    ("aim", "changed", "converged"),
    [
        (Aim(downtime_ms=300), {}, True),
        (Aim(downtime_ms=299), {}, False),
        (Aim(downtime_ms=300), {"memory_iteration": 1}, False),  # what the guest wrote since is not counted yet
        (Aim(downtime_ms=300), {"memory_bps": 0}, False),
        (Aim(downtime_ms=1, max_passes=2), {}, True),
        (Aim(downtime_ms=1, max_passes=3), {}, False),
        (Aim(lead=False, max_passes=1), {}, False),
        (Aim(), {"memory_remaining": 0, "memory_iteration": 0}, False),  # QEMU has not begun
    ],
)
def test_the_moment_is_when_what_is_left_fits(aim: Aim, changed: dict[str, int], converged: bool) -> None:
    assert memory.remaining(aim, memory.measures({**STATS, **changed})).converged is converged


def test_a_pass_that_qemu_tells_of_counts_for_the_limit_alone() -> None:
    first = memory.measures({**STATS, "memory_iteration": 1, "memory_remaining": 0})
    assert not memory.remaining(Aim(), first, passes=2).converged, "what was left of the first pass says nothing"
    assert memory.remaining(Aim(max_passes=2), first, passes=2).converged
    assert memory.remaining(Aim(max_passes=1), {}, passes=1).memory == {"passes": 1, "wanted_ms": 300}


def test_the_report_has_what_was_measured() -> None:
    left = memory.remaining(Aim(downtime_ms=200), memory.measures(STATS))
    assert left.bytes == 30_000_000
    assert left.memory == {
        "total": 1 << 30,
        "remaining": 3e7,
        "transferred": 5e8,
        "bps": 1e8,
        "passes": 2,
        "dirty_bps": 40960,
        "wanted_ms": 200,
    }
    assert memory.measures(STATS, complete=True)["downtime_ms"] == 300
    assert memory.measures({}) == {}


@pytest.mark.parametrize(
    ("configured", "own", "order", "emulated", "aim"),
    [
        (Aim(downtime_ms=0), Lead(), 0, False, Aim(True, 250, 0, 25)),  # QEMU's own limit is what is wanted
        (Aim(downtime_ms=0), Lead(), 0, True, Aim(True, 250, 0, None)),
        (Aim(downtime_ms=100), Lead(), 0, False, Aim(True, 100, 0, 10)),
        (Aim(downtime_ms=100), Lead(downtime_ms=40), 0, False, Aim(True, 40, 0, 5)),
        (Aim(downtime_ms=100), Lead(downtime_ms=40), 70, False, Aim(True, 70, 0, 7)),
        (Aim(downtime_ms=100, limit_ms=0), Lead(), 0, False, Aim(True, 100, 0, None)),
        (Aim(downtime_ms=100, limit_ms=9), Lead(), 0, True, Aim(True, 100, 0, 9)),
        (Aim(downtime_ms=100), Lead(lead=False), 0, False, Aim(False, 100, 0, None)),
        (Aim(lead=False, downtime_ms=100), Lead(lead=True, max_passes=3), 0, False, Aim(True, 100, 3, 10)),
    ],
)
def test_a_vms_own_wish_goes_before_the_configuration(
    configured: Aim, own: Lead, order: int, emulated: bool, aim: Aim
) -> None:
    assert memory.aim_of(configured, own, order_ms=order, qemu_ms=250, emulated=emulated) == aim


def test_only_a_move_to_another_host_is_leaving() -> None:
    assert memory.leaving(STATS)
    assert not memory.leaving({**STATS, "type": libvirt.VIR_DOMAIN_JOB_NONE})
    assert not memory.leaving({**STATS, "type": libvirt.VIR_DOMAIN_JOB_COMPLETED})
    for operation in range(libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT):
        assert not memory.leaving({**STATS, "operation": operation})
    assert not memory.leaving({}) and not memory.ending({})
    failed = {**STATS, "type": libvirt.VIR_DOMAIN_JOB_CANCELLED}
    assert memory.ending(failed) and not memory.leaving(failed), "libvirt may not have started the guest again yet"


# ---- what the ports' keeper is told ----

HAPPENS = {
    "STARTED/BOOTED": ("started", "booted"),
    "STARTED/RESTORED": ("restored", "saved"),
    "STARTED/FROM_SNAPSHOT": ("restored", "snapshot"),
    "RESUMED/MIGRATED": ("started", "migrated"),
    "RESUMED/POSTCOPY": ("started", "migrated"),
    "STOPPED/SHUTDOWN": ("stopped", "shutdown"),
    "STOPPED/DESTROYED": ("stopped", "destroyed"),
    "STOPPED/CRASHED": ("stopped", "crashed"),
    "STOPPED/MIGRATED": ("stopped", "migrated"),
    "STOPPED/SAVED": ("saved", "saved"),
    "STOPPED/FAILED": ("stopped", "failed"),
    "STOPPED/FROM_SNAPSHOT": ("stopped", "snapshot"),
    "CRASHED/PANICKED": ("crashed", "panicked"),
    "DEFINED/ADDED": ("defined", "added"),
    "DEFINED/UPDATED": ("defined", "updated"),
    "DEFINED/RENAMED": ("defined", "renamed"),
    "DEFINED/FROM_SNAPSHOT": ("defined", "snapshot"),
    "UNDEFINED/REMOVED": ("undefined", "removed"),
    "UNDEFINED/RENAMED": ("undefined", "renamed"),
}


@pytest.mark.parametrize("name", MEANING)
def test_what_concerns_ports_is_told_to_their_keeper(name: str) -> None:
    told = domains.lifecycle("vm", "shop", *number(name))
    assert (None if told is None else (told.what, told.detail)) == HAPPENS.get(name)


def test_every_stop_is_told_to_the_ports_keeper() -> None:
    """What the agent hears as gone must not leave ports behind."""
    for name, said in MEANING.items():
        if said is not None and said[0] == "gone":
            assert HAPPENS[name][0] in {"stopped", "saved"}


def test_a_listener_that_fails_costs_the_others_nothing() -> None:
    told: list[str] = []
    happenings = domains.Happenings()
    happenings.listen(lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    end = happenings.listen(lambda event: told.append(event.what))
    happenings.tell(domains.DomainEvent("vm", "shop", "started"))
    happenings.tell(None)
    end()
    happenings.tell(domains.DomainEvent("vm", "shop", "stopped"))
    assert told == ["started"]
