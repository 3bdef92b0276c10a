"""A place is known when every host that is connected has said so: no sooner, and no later."""

from __future__ import annotations

import pytest

from migrator.coordinator.places import Acknowledgements


class Known:
    """Names of what became known, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places = Acknowledgements()

    def expect(self, name: str, revision: int, *hosts: str) -> None:
        self.places.expect(revision, hosts, lambda: self.names.append(name))


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
