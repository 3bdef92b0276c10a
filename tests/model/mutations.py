"""Every rule that the model can express, taken away: what the search must then find.

A rule that the machines keep is taken out of a machine's step; one that the agents keep around it is a name in
`Model.without`. Each is searched in the smallest budget in which its absence shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from migrator.lifecycle import coordinator as c
from migrator.lifecycle import destination as b
from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source as a
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Event, Role
from tests.model.model import Model
from tests.model.world import Budget

Change = Callable[[Any, Event], Any]


@dataclass(frozen=True)
class Mutation:
    """`rule`: as docs/protocol.md calls it, or what a repaired order of events is called. `without`: what is gone."""

    rule: str
    without: str
    budget: Budget
    source: Any = a.step
    destination: Any = b.step
    coordinator: Any = c.step

    def model(self) -> Model:
        return Model(self.budget, frozenset({self.rule}), self.source, self.destination, self.coordinator)


# ---- the source's machine ----


def _goes_on_after_a_return(state: a.State, event: Event) -> Any:
    returned = isinstance(event, aw.GuestResumed) and state.phase in aw.STOPPING | aw.UNSURE
    return (state, ()) if returned else a.step(state, event)


def _never_asks(state: a.State, event: Event) -> Any:
    after, actions = a.step(state, event)
    return after, tuple(action for action in actions if not isinstance(action, aw.Ask))


def _keeps_what_was_missing(state: a.State, event: Event) -> Any:
    return a.step(state, replace(event, lacks=False) if isinstance(event, aw.PeerOpened) else event)


def _purges_at_the_commit(state: a.State, event: Event) -> Any:
    after, actions = a.step(state, event)
    return after, (*actions, aw.Purge(keep_redirect=True)) if isinstance(event, aw.PeerCommitted) else actions


def _needs_no_authority(state: a.State, event: Event) -> Any:
    return a.step(replace(state, authorised=True) if isinstance(event, aw.Drained) else state, event)


def _keeps_its_hold(state: a.State, event: Event) -> Any:
    after, actions = a.step(state, event)
    return after, tuple(action for action in actions if not isinstance(action, aw.LetGo))


def _watches_once(state: a.State, event: Event) -> Any:
    after, actions = a.step(state, event)
    again = isinstance(event, aw.Outrun)
    return after, tuple(action for action in actions if not (again and isinstance(action, aw.Watch)))


def _begins_again_at_any_time(state: a.State, event: Event) -> Any:
    phase = aw.Phase.HOLDING if isinstance(event, aw.Outrun) else state.phase
    return a.step(replace(state, phase=phase), event)


# ---- the destination's ----


def _opens_at_the_commit(state: b.State, event: Event) -> Any:
    return b.step(replace(state, guest=True) if isinstance(event, bw.CommitDone) else state, event)


def _is_not_fenced(state: b.State, event: Event) -> Any:
    after, actions = b.step(state, event)
    fenced = isinstance(event, bw.Asked | bw.PeerLost) and after.phase is bw.Phase.FENCED
    return (replace(after, phase=state.phase), actions) if fenced else (after, actions)


def _forgets_its_commit(state: b.State, event: Event) -> Any:
    return b.step(state, replace(event, committed=False) if isinstance(event, bw.Restarted) else event)


def _believes_an_abort(state: b.State, event: Event) -> Any:
    if isinstance(event, bw.AbortAsked) and state.phase is bw.Phase.COMMITTED:
        return replace(state, phase=bw.Phase.ABORTED), (bw.Purge(), bw.Tell("aborted"))
    return b.step(state, event)


# ---- the coordinator's ----


def _looks_for_nobody(state: c.State, event: Event) -> Any:
    return (state, ()) if isinstance(event, c.GuestsGone) else c.step(state, event)


def _aborts_both_at_once(state: c.State, event: Event) -> Any:
    after, actions = c.step(state, event)
    asked = isinstance(event, c.AbortAsked) and c.Send(Role.SOURCE, c.Order.ABORT, "") in actions
    return after, (*actions, c.Send(Role.DESTINATION, c.Order.ABORT)) if asked else actions


def _leaves_no_redirect(state: a.State, event: Event) -> Any:
    after, actions = a.step(state, event)
    return after, tuple(aw.Purge(keep_redirect=False) if isinstance(one, aw.Purge) else one for one in actions)


MUTATIONS = (
    Mutation("every_instance_has_its_epoch", "a purge names no epoch", Budget(second=True)),
    Mutation("frames_wait_at_the_source", "a gate that is shut drops", Budget(frames="to")),
    Mutation("rollback_gives_held_frames_back_in_order", "a rollback leaves them", Budget(frames="to", returns=1)),
    Mutation("frames_left_in_the_guests_queue", "nobody takes them out", Budget(frames="to", self_stops=1)),
    Mutation("the_guest_may_run_first", "a staged port drops", Budget(frames="from")),
    Mutation("held_frames_survive_a_restart", "they go with the agent", Budget(frames="to", crashes=1, dies="A")),
    Mutation(
        "the_redirect_outlives_the_tap_and_ends_when_idle",
        "the source purges all at once",
        Budget(frames="to"),
        source=_leaves_no_redirect,
    ),
    Mutation("the_agent_leads", "it stops the guest without waiting for an empty queue", Budget(frames="to")),
    Mutation("leases", "a staged port has none", Budget(crashes=1, dies="B")),
    Mutation("leases_never_open_a_quiesced_source", "one that passes makes it active", Budget(crashes=1, dies="A")),
    Mutation(
        "final_is_never_sent_before_it_is_authorised",
        "the source waits for nobody",
        Budget(self_stops=1),
        source=_needs_no_authority,
    ),
    Mutation(
        "what_is_not_journalled_is_not_promised",
        "`final` is sent though the disk is full",
        Budget(disks=1, crashes=1, dies="A", hypervisor=False),
    ),
    Mutation("committed_is_not_open", "it opens at the commit", Budget(), destination=_opens_at_the_commit),
    Mutation(
        "asking_fences", "the question leaves it as it is", Budget(cuts=1, hypervisor=False), destination=_is_not_fenced
    ),
    Mutation("strict_waits_for_the_commit", "the hypervisor starts the guest unasked", Budget(strict=True)),
    Mutation(
        "an_arrival_without_a_word_is_refused",
        "an agent that is dead lets the guest start",
        Budget(strict=True, crashes=1, dies="B"),
    ),
    Mutation(
        "a_guest_that_runs_at_the_source",
        "the source waits for its peer",
        Budget(returns=1),
        source=_goes_on_after_a_return,
    ),
    Mutation(
        "an_agent_restarts_between_commit_and_resume",
        "it does not look at its switch",
        Budget(crashes=1, dies="B", hypervisor=False),
        destination=_forgets_its_commit,
    ),
    Mutation(
        "a_guest_that_had_to_begin_without_its_state",
        "the source keeps what was missing",
        Budget(self_stops=1),
        source=_keeps_what_was_missing,
    ),
    Mutation("doubt_ends", "the source does not ask", Budget(cuts=1, hypervisor=False), source=_never_asks),
    Mutation(
        "a_guest_that_is_nowhere_twice_is_gone", "nobody looks for it", Budget(deaths=1), coordinator=_looks_for_nobody
    ),
    Mutation(
        "the source purges only what is confirmed", "it purges at the commit", Budget(), source=_purges_at_the_commit
    ),
    Mutation(
        "no late abort takes what is committed",
        "the destination purges by the coordinator's word",
        Budget(aborts=1),
        destination=_believes_an_abort,
        coordinator=_aborts_both_at_once,
    ),
    Mutation(
        "an abort reaches the destination after the source has confirmed",
        "both are told at once",
        Budget(aborts=1, self_stops=1),
        coordinator=_aborts_both_at_once,
    ),
    Mutation("a_rollback_ends_the_hold", "a hold that is ordered is carried out", Budget(returns=1)),
    Mutation("who_stopped_the_guest_starts_it", "nobody looks after a rollback", Budget(aborts=1)),
    Mutation("a copy that begins again lets go", "it keeps its hold", Budget(outruns=1), source=_keeps_its_hold),
    Mutation("a copy that begins again is waited for", "nobody looks", Budget(outruns=1), source=_watches_once),
    Mutation(
        "a copy begins again only before the stop",
        "it does at any time",
        Budget(self_stops=1, outruns=1),
        source=_begins_again_at_any_time,
    ),
    Mutation("a_refusal_is_over_at_once", "the destination has forgotten it and is silent", Budget(fails=1)),
)
