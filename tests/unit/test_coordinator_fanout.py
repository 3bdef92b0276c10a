"""Places go to a large cluster together, each as it is by then, and none waits for who is slow."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator import fanout
from migrator.coordinator.fanout import BUSY_HOSTS, Fanout
from migrator.coordinator.roster import Roster, Session
from tests.unit.pair import eventually

HOSTS = 2 * BUSY_HOSTS


class Told:
    """A coordinator's places, `hosts` agents, and what each was told."""

    def __init__(self, hosts: int) -> None:
        self.store = SimpleNamespace(revision=0, catalog=SimpleNamespace(places={}))
        self.roster = Roster()
        self.sessions = [Session(pb.Hello(host=f"h{number}")) for number in range(hosts)]
        for session in self.sessions:
            self.roster.join(session)
        self.fanout = Fanout(self.store, self.roster)  # type: ignore[arg-type]

    def place(self, mac: str, host: str) -> pb.Place:
        """Written to the journal."""
        place = pb.Place(network="blue", mac=mac, host=host)
        self.store.revision += 1
        self.store.catalog.places[f"blue/{mac}"] = place
        return place

    def remove(self, mac: str) -> pb.Place:
        self.store.revision += 1
        place: pb.Place = self.store.catalog.places.pop(f"blue/{mac}")
        return place

    def move(self, mac: str, host: str) -> None:
        self.fanout.tell_soon([self.place(mac, host)])

    def acknowledge(self, hosts: int, revision: int | None = None) -> None:
        """The first `hosts` have taken all up to `revision`, or up to now."""
        for session in self.sessions[:hosts]:
            self.fanout.acknowledged(session.host, self.store.revision if revision is None else revision)

    def heard(self, number: int = 0) -> list[tuple[dict[str, str], list[str], int]]:
        """Of every message to an agent: places, removed, revision."""
        queue = self.sessions[number]._outgoing
        messages = [queue.get_nowait() for _ in range(queue.qsize())]
        return [
            ({place.mac: place.host for place in m.places.places}, [p.mac for p in m.places.removed], m.places.revision)
            for m in messages
            if isinstance(m, pb.ToAgent)
        ]


def test_few_hosts_wait_for_nothing() -> None:
    told = Told(BUSY_HOSTS - 1)
    told.move("1", "a")
    told.move("2", "b")
    assert told.heard() == [({"1": "a"}, [], 1), ({"2": "b"}, [], 2)]


def test_moves_wait_for_the_hosts_and_go_together_as_they_are_by_then() -> None:
    async def scenario() -> None:
        told = Told(HOSTS)
        told.move("1", "a")
        for mac, host in (("2", "b"), ("1", "b"), ("3", "c"), ("1", "a")):
            told.move(mac, host)
        assert [told.heard(number) for number in (0, HOSTS - 1)] == [[({"1": "a"}, [], 1)]] * 2
        told.acknowledge(HOSTS, revision=0)  # of something before
        await asyncio.sleep(0)
        assert not told.heard()
        told.acknowledge(HOSTS, revision=1)
        await eventually(lambda: told.sessions[0]._outgoing.qsize() == 1)
        assert told.heard() == [({"1": "a", "2": "b", "3": "c"}, [], 5)]
        told.acknowledge(HOSTS)
        await asyncio.sleep(0.01)
        assert not told.heard()

    asyncio.run(scenario())


def test_the_next_waits_as_long_again_as_the_hosts_took(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock = [100.0]
        monkeypatch.setattr(fanout, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        told = Told(HOSTS)
        told.move("1", "a")
        clock[0] += 0.2
        told.acknowledge(HOSTS)
        clock[0] += 0.1
        told.move("1", "b")
        assert told.heard() == [({"1": "a"}, [], 1)]
        assert told.fanout._later is not None
        clock[0] += 0.11
        told.fanout.stop()
        told.move("2", "b")
        assert told.heard() == [({"1": "b", "2": "b"}, [], 3)]

    asyncio.run(scenario())


@pytest.mark.parametrize("silent", [BUSY_HOSTS - 1, HOSTS])
def test_no_place_waits_for_who_does_not_answer(monkeypatch: pytest.MonkeyPatch, silent: int) -> None:
    """A few are not waited for at all, many not for long."""

    async def scenario() -> None:
        monkeypatch.setattr(fanout, "PACE_S", 0.05 if silent == HOSTS else 60.0)
        told = Told(HOSTS)
        told.move("1", "a")
        told.move("2", "b")
        told.acknowledge(HOSTS - silent, revision=1)
        await eventually(lambda: told.sessions[0]._outgoing.qsize() == 2)
        assert told.heard()[1] == ({"2": "b"}, [], 2)

    asyncio.run(scenario())


def test_agents_that_leave_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(fanout, "PACE_S", 60.0)
        told = Told(HOSTS)
        told.move("1", "a")
        told.move("2", "b")
        for session in told.sessions[1:]:
            told.roster.leave(session)
            told.fanout.left(session.host)
        await eventually(lambda: told.sessions[0]._outgoing.qsize() == 2)

    asyncio.run(scenario())


def test_what_the_operator_changes_goes_at_once_with_all_that_waits() -> None:
    async def scenario() -> None:
        told = Told(HOSTS)
        for mac in "123":
            told.move(mac, "a")
        told.heard()
        told.fanout.tell([told.remove("2"), told.place("4", "d")])
        assert told.heard() == [({"3": "a", "4": "d"}, ["2"], 5)]
        told.fanout.tell([])
        assert not told.heard()
        told.fanout.stop()

    asyncio.run(scenario())


def test_a_place_that_was_removed_and_is_there_again_is_told_as_there() -> None:
    async def scenario() -> None:
        told = Told(HOSTS)
        told.move("1", "a")
        told.move("2", "a")
        told.heard()
        told.fanout._note([told.remove("2")])
        told.fanout.tell([told.place("2", "b")])
        assert told.heard() == [({"2": "b"}, [], 4)]
        told.fanout.stop()

    asyncio.run(scenario())
