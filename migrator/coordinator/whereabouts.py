"""Where the hypervisors say that a guest is, and what follows when neither of a migration's two has it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.roster import Roster
from migrator.coordinator.running import Running
from migrator.errors import IllegalTransition
from migrator.lifecycle import coordinator as machine
from migrator.lifecycle.machine import Event, Role

ANSWER_S = 5.0
LOOK_S = 1.0
"""Between two looks: one that finds a guest nowhere may have come just when one hypervisor gave it to the other."""
LOOKS = 2
DOUBT_S = 5.0

Phase = machine.Phase
log = structlog.get_logger()


async def whereabouts(roster: Roster, run: Running) -> Mapping[str, str]:
    """host -> running | paused | gone, for both hosts; "": no hypervisor there, or no answer."""
    hosts = (run.agreed.source, run.agreed.destination)
    said = await asyncio.gather(*(_ask(roster, host, run.agreed.vm) for host in hosts))
    return dict(zip(hosts, said, strict=True))


async def _ask(roster: Roster, host: str, vm: str) -> str:
    session = roster.get(host)
    if session is None:
        return ""
    try:
        return str((await session.request(ANSWER_S, guest=pb.GuestQuery(vm=vm))).guest)
    except Error as error:
        log.info("no word of a guest", host=host, vm=vm, error=str(error))
        return ""


def refuse_contradiction(run: Running, guest_at: str, said: Mapping[str, str]) -> None:
    """The operator's word counts where no hypervisor says otherwise. Raises IllegalTransition."""
    other = next(host for host in said if host != guest_at)
    if said[guest_at] != "gone" and said[other] != "running":
        return
    words = ", ".join(f"{host}: {word or 'nothing'}" for host, word in said.items())
    raise IllegalTransition(
        f"VM {run.agreed.vm} is not at {guest_at}: the hypervisors say {words}",
        hint="the migration goes on by what they say; look at the VM there, and at the agents' logs",
    )


class Doubts:
    """Looks for guests that may be nowhere, until they are found or both hypervisors have said so. `feed` is told."""

    def __init__(self, roster: Roster, feed: Callable[[Running, Event], None]) -> None:
        self._roster, self._feed = roster, feed
        self._looking: dict[str, asyncio.Task[None]] = {}

    def stop(self) -> None:
        for task in self._looking.values():
            task.cancel()

    def consider(self, run: Running) -> None:
        """A migration came to another phase, or an agent of it came back."""
        if _lasting(run):
            self.look(run)

    def look(self, run: Running) -> None:
        """There is reason to think that the guest has ended."""
        if run.id not in self._looking and _open(run):
            task = asyncio.get_running_loop().create_task(self._look(run))
            self._looking[run.id] = task
            task.add_done_callback(lambda _: self._looking.pop(run.id, None))

    async def _look(self, run: Running) -> None:
        nowhere = 0
        while _open(run):
            said = await whereabouts(self._roster, run)
            nowhere = nowhere + 1 if set(said.values()) == {"gone"} else 0
            if nowhere >= LOOKS and _open(run):
                log.warning("neither host has the VM", migration=run.id, vm=run.agreed.vm)
                return self._feed(run, machine.GuestsGone())
            if not nowhere and not _lasting(run):
                return None
            await asyncio.sleep(LOOK_S if nowhere else DOUBT_S)
        return None


def _open(run: Running) -> bool:
    """Could it still be that the source waits for a guest?"""
    state = run.machine
    return state.phase in machine.UNDECIDED | machine.UNDONE and Role.SOURCE not in state.ended and not state.gone


def _lasting(run: Running) -> bool:
    """Has nobody spoken in time, so that only looking helps?"""
    return run.machine.phase in {Phase.IN_DOUBT, Phase.ABORTED} and _open(run)
