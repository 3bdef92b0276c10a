"""Life of a port: what may follow what, epochs beside each other, and what each call leaves alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from datapath.errors import LoadRejected, NotReady, PortNotFound, StaleEpoch, UnsupportedKind
from datapath.provider import Driver, Place, PortRef, PortState
from tests.contract.hosts import STATES, Host, ref
from tests.contract.samples import ages, normal, port_record, sample

CALLS: dict[str, Callable[[Driver, PortRef], object]] = {
    "commit": lambda d, r: d.commit(r),
    "open": lambda d, r: d.open(r),
    "hold": lambda d, r: d.hold(r),
    "quiesce": lambda d, r: d.quiesce(r),
    "resume": lambda d, r: d.resume(r),
    "redirect": lambda d, r: d.redirect(r, 4711, "there"),
    "accept_redirect": lambda d, r: d.accept_redirect(r, 4712, "there"),
    "dump": lambda d, r: list(d.dump(r, "conntrack")),
    "load": lambda d, r: d.load(r, sample("conntrack", 1)),
    "track": lambda d, r: d.track(r),
    "drain": lambda d, r: d.drain(r),
    "settle": lambda d, r: list(d.settle(r)),
    "port": lambda d, r: d.port(r),
    "describe": lambda d, r: d.describe([r]),
    "set_lease": lambda d, r: d.set_lease(r, 1.0),
    "update": lambda d, r: d.update(r, port_record(mac=r.mac)),
    "set_broadcast": lambda d, r: d.set_broadcast(r, True),
    "set_trace": lambda d, r: d.set_trace(r, False),
}

LEGAL = {
    "staged": {"commit", "open"},
    "committed": {"commit", "open"},
    "active": {"open", "hold", "quiesce", "resume"},
    "held": {"hold", "quiesce", "resume"},
    "quiesced": {"hold", "quiesce", "resume", "redirect"},
    "redirecting": {"redirect", "resume"},
    "stub": {"redirect"},
}
"""The arrows of the life, by state; those for which the contract says nothing are not asked."""

UNSAID = {
    ("active", "commit"),
    ("held", "commit"),
    ("held", "open"),
    ("redirecting", "hold"),
    ("redirecting", "quiesce"),
}
ARROWS = ("commit", "open", "hold", "quiesce", "resume", "redirect")


@pytest.mark.parametrize("call", ARROWS)
@pytest.mark.parametrize("state", STATES)
def test_arrows(host: Host, state: str, call: str) -> None:
    if (state, call) in UNSAID:
        return
    made = host.in_state(state)
    before = host.driver.port(made)
    if call in LEGAL[state]:
        CALLS[call](host.driver, made)
    else:
        with pytest.raises(NotReady):
            CALLS[call](host.driver, made)
        after = host.driver.port(made)
        assert (after.state, after.committed, after.gate) == (before.state, before.committed, before.gate)


STATUS = {
    "staged": (PortState.STAGED, False, "none"),
    "committed": (PortState.STAGED, True, "none"),
    "active": (PortState.ACTIVE, True, "local"),
    "held": (PortState.ACTIVE, True, "local shut"),
    "quiesced": (PortState.QUIESCED, True, "local shut"),
    "redirecting": (PortState.QUIESCED, True, "redirect"),
}


@pytest.mark.parametrize("state", STATUS)
def test_the_status_says_where_a_port_is(host: Host, state: str) -> None:
    made = host.in_state(state)
    status = host.driver.port(made)
    assert (status.state, status.committed, status.gate) == STATUS[state]
    assert status.ref == made
    assert (status.held_to, status.held_from) == (0, 0)
    assert {name: status.record[name] for name in port_record()} == port_record()
    assert host.driver.ports() == [status]


def test_a_stub_has_nothing_but_its_redirect(host: Host) -> None:
    made = host.in_state("stub")
    status = host.driver.port(made)
    assert (status.state, status.gate, status.connections) == (PortState.STUB, "redirect", 0)
    assert host.driver.redirect_idle_s(made) >= 0
    host.driver.purge(made)
    assert host.driver.ports() == []


@pytest.mark.parametrize("state", STATES)
def test_resume_brings_back_what_was_held(host: Host, state: str) -> None:
    if "resume" not in LEGAL[state]:
        return
    made = host.in_state(state)
    host.driver.resume(made)
    status = host.driver.port(made)
    assert (status.state, status.gate) == (PortState.ACTIVE, "local")


@pytest.mark.parametrize("call", CALLS)
def test_calls_for_no_port(host: Host, call: str) -> None:
    with pytest.raises(PortNotFound):
        CALLS[call](host.driver, ref())


@pytest.mark.parametrize("call", CALLS)
def test_calls_with_a_lower_epoch_are_stale(host: Host, call: str) -> None:
    made = host.in_state("active", epoch=5)
    before = host.driver.port(made)
    with pytest.raises(StaleEpoch):
        CALLS[call](host.driver, ref(4))
    after = host.driver.port(made)
    assert (after.state, after.gate, after.record) == (before.state, before.gate, before.record)


def test_stage_with_a_lower_epoch_is_stale(host: Host) -> None:
    made = host.in_state("active", epoch=5)
    with pytest.raises(StaleEpoch):
        host.driver.stage(ref(4), port_record(), "ctold")
    assert [status.ref for status in host.driver.ports()] == [made]


def test_a_late_purge_of_an_older_epoch_touches_nothing(host: Host) -> None:
    made = host.in_state("active", epoch=5)
    host.driver.load(made, sample("conntrack", 10))
    with contextlib.suppress(StaleEpoch):
        host.driver.purge(ref(4))
    assert host.driver.port(made).state is PortState.ACTIVE
    assert len(normal(list(host.driver.dump(made, "conntrack")))) == 10


def test_stage_twice_is_refused(host: Host) -> None:
    made = host.stage()
    with pytest.raises(NotReady):
        host.driver.stage(made, port_record(), "ct1x01")
    assert len(host.driver.ports()) == 1


def test_two_epochs_side_by_side(host: Host) -> None:
    """A to B to A: the new instance is staged while the old one still redirects."""
    old = host.in_state("redirecting", epoch=1)
    new = host.stage(epoch=3)
    host.driver.load(new, sample("conntrack", 20))
    assert [status.ref for status in host.driver.ports()] == [old, new]
    assert host.driver.port(old).gate == "redirect"
    host.driver.commit(new)
    host.driver.purge(old, keep_redirect=True)
    assert len(normal(list(host.driver.dump(new, "conntrack")))) == 20
    host.driver.open(new)
    host.driver.purge(old)
    status = host.driver.port(new)
    assert (status.state, status.gate) == (PortState.ACTIVE, "local")
    assert len(normal(list(host.driver.dump(new, "conntrack")))) == 20


def test_purging_the_new_instance_leaves_the_old_one(host: Host) -> None:
    """The move back was aborted."""
    old = host.in_state("quiesced", epoch=1)
    new = host.stage(epoch=3)
    host.driver.load(new, sample("fdb", 5))
    host.driver.purge(new)
    status = host.driver.port(old)
    assert (status.state, status.gate) == (PortState.QUIESCED, "local shut")
    host.driver.resume(old)
    assert host.driver.port(old).state is PortState.ACTIVE


def test_two_nics_of_one_vm_are_apart(host: Host) -> None:
    one = host.stage(mac="02:00:00:00:00:01")
    two = host.stage(mac="02:00:00:00:00:02", addresses=["10.0.0.6"])
    host.driver.load(one, sample("conntrack", 3))
    host.driver.open(one)
    assert host.driver.port(two).state is PortState.STAGED
    assert list(host.driver.dump(two, "conntrack")) == [] or not normal(list(host.driver.dump(two, "conntrack")))
    host.driver.purge(one)
    assert [status.ref for status in host.driver.ports()] == [two]


@pytest.mark.parametrize("state", ["active", "quiesced"])
def test_a_port_that_does_not_redirect_leaves_no_redirect_behind(host: Host, state: str) -> None:
    """The host was rebooted meanwhile: what passed frames on is gone."""
    made = host.in_state(state)
    host.driver.purge(made, keep_redirect=True)
    assert host.driver.ports() == []


def test_purging_what_is_not_here_is_no_error(driver: Driver) -> None:
    driver.purge(ref())
    driver.purge(ref(), keep_redirect=True)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"network": "nowhere"}, UnsupportedKind),
        ({"trunk": {"100": "nowhere"}}, UnsupportedKind),
        ({"mtu": "1500"}, LoadRejected),
        ({"connections_max": 0}, LoadRejected),
        ({"mac": "02:00:00:00:00:99"}, LoadRejected),
    ],
)
def test_stage_refuses_what_it_cannot_do(host: Host, changes: dict[str, object], error: type[Exception]) -> None:
    before = host.driver.remains()
    with pytest.raises(error):
        host.driver.stage(ref(), {**port_record(), **changes}, "ctbad")
    assert host.driver.remains() == before


def test_update_changes_the_configuration_in_place(host: Host) -> None:
    made = host.in_state("active")
    host.driver.load(made, sample("conntrack", 3))
    host.driver.update(made, port_record(addresses=["10.0.0.7"], revision=8))
    record = host.driver.port(made).record
    assert (record["addresses"], record["revision"]) == (["10.0.0.7"], 8)
    assert len(normal(list(host.driver.dump(made, "conntrack")))) == 3
    with pytest.raises(LoadRejected):
        host.driver.update(made, port_record(mtu="big"))
    assert host.driver.port(made).record == record


def test_a_place_never_touches_an_open_port(host: Host) -> None:
    made = host.in_state("active")
    host.driver.set_place(Place("blue", made.mac, "there"))
    assert host.driver.port(made).gate == "local"
    host.driver.remove_place("blue", made.mac)
    assert host.driver.port(made).gate == "local"


def test_a_quiesced_ports_tables_stand_still(host: Host) -> None:
    made = host.in_state("active")
    host.driver.load(made, sample("conntrack", 5))
    host.driver.quiesce(made)
    first, second = (list(host.driver.dump(made, "conntrack")) for _ in range(2))
    assert normal(first) == normal(second)
    assert ages(first) == ages(second)
    assert len({table.port_time_ns for table in (*first, *second)}) == 1


def test_a_device_may_come_later_and_go(host: Host) -> None:
    host.unplug("ctlate")
    made = ref()
    host.driver.stage(made, port_record(), "ctlate")
    assert (host.driver.port(made).device, host.driver.port(made).ifindex) == ("", 0)
    host.plug("ctlate")
    host.wait_until(lambda: host.driver.port(made).device == "ctlate", "the device is attached")
    assert host.driver.port(made).ifindex > 0
    host.wait_until(lambda: ("device-added", made) in [(e.what, e.ref) for e in host.events], "device-added")
    host.unplug("ctlate")
    host.wait_until(lambda: host.driver.port(made).device == "", "the device is gone")
    host.wait_until(lambda: ("device-removed", made) in [(e.what, e.ref) for e in host.events], "device-removed")
    assert host.driver.port(made).state is PortState.STAGED
