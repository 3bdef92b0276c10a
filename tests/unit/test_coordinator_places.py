"""A place is known when every host that is connected has said so: no sooner, and no later."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from datapath.errors import NotReady
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.places import Acknowledgements
from tests.unit.pair import MACS, eventually, world
from tests.unit.scripted import MAC, Agent, Bench


class Known:
    """Names of what became known, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places = Acknowledgements()

    def expect(self, name: str, revision: int, *hosts: str, places: tuple[str, ...] = ()) -> None:
        self.places.expect(revision, hosts, lambda: self.names.append(name), places)


@pytest.fixture
def known() -> Known:
    return Known()


def test_each_place_waits_for_its_own_hosts(known: Known) -> None:
    known.expect("first", 5, "a", "b")
    known.expect("second", 7, "a", "b")
    known.places.acknowledge("a", 7)
    known.places.acknowledge("b", 5)
    assert known.names == ["first"]
    known.places.acknowledge("b", 9)
    assert known.names == ["first", "second"]
    known.places.acknowledge("a", 9)
    assert known.names == ["first", "second"]


def test_an_older_acknowledgement_does_not_count(known: Known) -> None:
    known.expect("place", 5, "a")
    known.places.acknowledge("a", 4)
    assert known.names == []


def test_a_host_that_left_is_not_waited_for_one_that_came_is(known: Known) -> None:
    known.expect("place", 5, "a", "b")
    known.places.joined("c")
    known.places.left("a")
    known.places.acknowledge("b", 5)
    assert known.names == []
    known.places.acknowledge("c", 5)
    assert known.names == ["place"]


def test_nobody_to_wait_for(known: Known) -> None:
    known.expect("place", 5)
    assert known.names == ["place"]


def test_what_a_host_could_not_set_is_not_known_whatever_it_says_later(known: Known) -> None:
    known.expect("first", 5, "a", places=("blue/1",))
    known.expect("second", 7, "a", places=("blue/2",))
    known.places.acknowledge("a", 7, unset=["blue/1"])
    assert known.names == ["second"]
    known.places.acknowledge("a", 9, unset=["blue/1"])
    assert known.names == ["second"]
    known.places.acknowledge("a", 9)
    assert known.names == ["second", "first"]


def test_a_sync_with_problems_acknowledges_no_place(tmp_path: Path) -> None:
    """The redirect of a move lives on until the host that comes with a problem says what it has."""

    async def scenario() -> None:
        async with Bench(tmp_path) as bench:
            a, b = await bench.two_hosts()
            report = await bench.begin_migration()
            await a.hear("authorise")
            late = Agent("h3")
            late.refuse.add("sync")
            late.acknowledges = False
            await bench.attach(late)
            b.progress("opened", a.migration)
            await bench.finished(report.id)
            told = (await late.hear("places")).revision
            late_again = Agent("h3")  # all it hears of the place is its Sync, which it cannot take
            late_again.refuse.add("sync")
            await bench.attach(late_again)
            a.say(redirect_idle=pb.RedirectIdle(vm=a.last("start").vm, epoch=1, idle_s=61))
            hosts = {host.name: host for host in (await bench.stub.Hosts(pb.Empty())).hosts}
            assert hosts["h3"].place_revision < told
            place = pb.Place(network="blue", mac=MAC)
            late_again.say(places=pb.PlacesKnown(revision=told + 9, unset=[place]))
            late_again.say(instance=pb.Instance())
            assert (await bench.stub.Hosts(pb.Empty())).hosts
            assert "end_redirect" not in a.names()
            late_again.say(places=pb.PlacesKnown(revision=told))
            await a.hear("end_redirect")

    asyncio.run(scenario())


def test_a_place_that_an_agent_cannot_set_keeps_the_redirect_until_it_can(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b", "c") as w:
            driver: Any = w.driver("c")
            setting, able = driver.set_place, asyncio.Event()

            def strict(place: Any) -> None:
                if place.mac == MACS[0] and place.host == "b" and not able.is_set():
                    raise NotReady("no room")
                setting(place)

            driver.set_place = strict
            assert (await w.finish(await w.migrate("b"))).outcome == "complete"
            await eventually(lambda: len(w.agents["c"].hosting.places_known().unset) == 1)
            run = next(iter(w.cluster.migrations._execution.running.values()))
            await eventually(lambda: run.machine.redirect_idle)
            w.cluster.apply(pb.ApplyRequest(config=pb.Config(address_sets=[pb.AddressSet(name="other")])))
            assert not run.machine.places_known and w.statuses("a")
            able.set()
            await eventually(lambda: run.machine.places_known)
            await eventually(lambda: not w.statuses("a"))
            assert driver.switch.places[("blue", MACS[0])] == "b"

    asyncio.run(scenario())
