"""Ports that the operator removed, until the agent that had them has confirmed that they are gone.

The port leaves the configuration at once. Two counters in the journal say what is owed: the highest epoch of the port
that was removed, and the highest whose removal was confirmed. So an agent that was away, or busy with a migration that
the instance was still part of, is asked again, also by a coordinator that was restarted meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.journal import Batch
from migrator.coordinator.roster import Roster, Session
from migrator.coordinator.store import Store

RETRY_S = 2.0

log = structlog.get_logger()


def _removed(vm: str, mac: str) -> str:
    return f"removed/{vm}/{mac}"


def _confirmed(vm: str, mac: str) -> str:
    return f"removal-confirmed/{vm}/{mac}"


class Removals:
    """What agents still have to remove."""

    def __init__(self, store: Store, roster: Roster) -> None:
        self._store, self._roster = store, roster
        self._timers: dict[tuple[str, str, int], asyncio.TimerHandle] = {}

    def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def counters(self, removal: pb.PortRemoval) -> Mapping[str, int]:
        """To be journalled together with the port's end."""
        return {_removed(removal.vm, removal.mac): int(removal.epoch)}

    def order(self, host: str, removal: pb.PortRemoval) -> None:
        """Have the agent remove an instance. One that is not attached hears of it when it comes."""
        session = self._roster.get(host)
        if session is not None:
            self._ask(session, removal)

    def attached(self, session: Session) -> None:
        """Of what the agent has, some may have been removed while it was away."""
        for instance in session.hello.instances:
            if instance.state == "active" and self._owed(instance):
                self._ask(session, pb.PortRemoval(vm=instance.vm, mac=instance.mac, epoch=instance.epoch))

    def _owed(self, instance: pb.Instance) -> bool:
        counter = self._store.journal.counter
        removed = counter(_removed(instance.vm, instance.mac))
        return counter(_confirmed(instance.vm, instance.mac)) < removed and instance.epoch <= removed

    def _ask(self, session: Session, removal: pb.PortRemoval) -> None:
        self._timers.pop((removal.vm, removal.mac, removal.epoch), None)
        session.ask(remove=removal).add_done_callback(lambda answer: self._answered(session, removal, answer))

    def _answered(self, session: Session, removal: pb.PortRemoval, answer: asyncio.Future[pb.Reply]) -> None:
        if answer.cancelled() or answer.exception() is not None or not session.open:
            return None  # it comes back, and says then what it has
        problem = answer.result().problem
        if not problem.kind:
            return self._gone(session, removal)
        log.info("port is not removed yet", host=session.host, vm=removal.vm, mac=removal.mac, problem=problem.message)
        later = asyncio.get_running_loop().call_later(RETRY_S, self._ask, session, removal)
        self._timers[removal.vm, removal.mac, removal.epoch] = later
        return None

    def _gone(self, session: Session, removal: pb.PortRemoval) -> None:
        self._store.commit(Batch(counters={_confirmed(removal.vm, removal.mac): int(removal.epoch)}), durable=False)
        port = self._store.catalog.ports.get(f"{removal.vm}/{removal.mac}")
        if port is not None and port.host == session.host:  # declared anew meanwhile: the old one was in its way
            session.send(pb.ToAgent(port=self._store.catalog.order(port)))
