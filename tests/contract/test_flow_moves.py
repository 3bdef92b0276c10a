# SPDX-License-Identifier: GPL-2.0-only
"""Flows of a port that moves, where something is in the way: all is told, once; or less is told, and nothing twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from datapath.drivers.ebpf.layout import C
from datapath.state.kind import Table
from tests.contract.flow_vm import POINTS, Vm, collector, wait
from tests.contract.hosts import Host

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    random.seed(seed)


def test_what_had_expired_at_the_pause_is_told(ebpf: Host) -> None:
    """A sweep had found connections too old, the next one would have ended them. They do not move, what they counted
    does."""
    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.begin(40)
        vm.move(lambda: vm.expire(0.5))
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)


def test_what_the_destination_has_no_room_for_is_told(ebpf: Host) -> None:
    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.begin(40)
        vm.move(lambda: vm.count(0.5), connections_max=30)
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)


def test_what_was_being_ended_at_the_pause_is_told(ebpf: Host) -> None:
    """Who ends connections has made them DEAD, and has not come to the rest yet."""

    def kill() -> None:
        table = vm.instance().table
        keys, entries = table.read()
        entries["word"] |= np.uint64(C.CT_F_DEAD << 8)
        table.load(keys[::2], entries[::2])

    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.begin(20)
        vm.move(lambda: None, _at("copied", kill))
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)


@pytest.mark.parametrize("filled", [False, True], ids=["without", "late"])
def test_a_port_that_opened_without_the_last_changes(ebpf: Host, filled: bool) -> None:
    """What had ended at the source goes on here; what had begun there begins here anew, or comes late."""

    def last() -> None:
        vm.end(0.3)
        vm.begin(20)
        vm.count(0.5)

    def again() -> None:
        vm.begin(10, again=True)
        vm.end(0.3)
        vm.count(0.7)

    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.begin(30)
        wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is told")
        vm.count(0.5)
        steps = iter([last, again, vm.stir])
        vm.move(lambda: next(steps)(), drained=False, filled=filled)
        vm.stir()
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)


@pytest.mark.parametrize("point", POINTS)
def test_agents_that_start_again_at_any_point(ebpf: Host, point: str) -> None:
    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])

        def restart() -> None:
            ebpf.restart()
            vm.sweep_by_hand()

        vm.begin(20)
        vm.stir()
        vm.move(vm.stir, _at(point, restart))
        vm.stir()
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)


@pytest.mark.parametrize("point", ["quiesced", "committed"])
def test_a_move_that_is_called_off(ebpf: Host, point: str) -> None:
    """The source goes on, and so does what had expired at the pause, if it is not too old yet."""

    def call_off() -> None:
        raise _OverError

    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.begin(20)
        with pytest.raises(_OverError):
            vm.move(vm.stir, _at(point, call_off))
        vm.driver.resume(vm.ref)
        vm.driver.untrack(vm.ref)
        vm.driver.purge(replace(vm.ref, epoch=2))
        vm.stir()
        vm.move(vm.stir, epoch=3)
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)


def test_accounting_that_comes_twice(ebpf: Host) -> None:
    """The source did not hear that it had come."""
    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.begin(20)
        tables: list[Table] = []

        def copy() -> None:
            tables.extend(vm.driver.settle(source))

        def once_more() -> None:
            vm.stir()
            for table in tables:
                vm.driver.load(vm.ref, table)
            vm.driver.settled(vm.ref)

        source = vm.ref
        vm.move(vm.stir, lambda point: {"opened": copy, "accounted": once_more, "settled": once_more}.get(point, _no)())
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)


def test_accounting_that_comes_too_late(ebpf: Host) -> None:
    """The destination waited for it no longer, and tells by itself: what the source has told is not told again."""
    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])

        def tell() -> None:
            vm.count(1.0)
            wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is told")

        vm.begin(20)
        vm.move(tell, _at("opened", lambda: vm.driver.settled(vm.ref)))
        vm.count(0.5)
        vm.driver.purge(vm.ref)
        assert made.sums() == (vm.packets, vm.bytes)


@pytest.mark.parametrize("point", ["opened", "accounting", "accounted"])
def test_a_guest_that_ends_before_the_accounts_are_closed(ebpf: Host, point: str) -> None:
    """What was counted at the destination is told, and what the source said by then."""
    with collector() as made:
        vm = Vm(ebpf, collectors=[made.endpoint])
        vm.begin(20)
        wait(lambda: made.sums() == (vm.packets, vm.bytes), "all is told")

        def end() -> None:
            vm.count(0.5)
            vm.driver.purge(vm.ref)
            raise _OverError

        with pytest.raises(_OverError):
            vm.move(vm.stir if point == "accounted" else _no, _at(point, end))
        vm.driver.purge(replace(vm.ref, epoch=1))
        assert made.sums() == (vm.packets, vm.bytes)


class _OverError(Exception):
    pass


def _no() -> None:
    pass


def _at(point: str, step: Callable[[], None]) -> Callable[[str], None]:
    """Does the step the first time that the move is at that point."""
    left = [step]

    def at(now: str) -> None:
        if now == point and left:
            left.pop()()

    return at
