"""The switch in memory moves frames as a real one has to: held, redirected, in order, none lost and none doubled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from datapath.drivers.dummy import DummyDriver, fabric
from datapath.drivers.dummy.switch import HOLD_MAX
from datapath.errors import NotReady
from datapath.provider import Event, Network, NetworkKind, Place, PortRef, PortState
from datapath.registry import KINDS
from datapath.state.kind import Op, Table, empty_columns
from tests.contract.samples import port_record, sample

VM, PEER = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01", "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a02"
MAC, PEER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
_numbers = itertools.count()


class Clock:
    """Nanoseconds that only tests let pass."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


class Hosts:
    """Three hosts on one fabric, with one clock."""

    def __init__(self) -> None:
        self.clock, self.events, self.drivers = Clock(), [], {}
        self.fabric = f"frames-{next(_numbers)}"
        for name in ("a", "b", "d"):
            made = DummyDriver()
            made.start({"host": name, "fabric": self.fabric, "clock": self.clock}, self.events.append)
            made.set_network(Network("blue", NetworkKind.OVERLAY, vni=7))
            made.set_hosts({"a": "192.0.2.1", "b": "192.0.2.2", "d": "192.0.2.3"})
            self.drivers[name] = made

    events: list[Event]
    drivers: dict[str, DummyDriver]

    def __getitem__(self, name: str) -> DummyDriver:
        return self.drivers[name]

    def place(self, mac: str, host: str) -> None:
        for driver in self.drivers.values():
            driver.set_place(Place("blue", mac, host))


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    yield made
    for driver in made.drivers.values():
        driver.destroy()


def staged(driver: DummyDriver, epoch: int = 1, *, vm: str = VM, mac: str = MAC) -> PortRef:
    ref = PortRef(vm, mac, epoch)
    driver.stage(ref, port_record(mac=mac), f"tap{epoch}")
    return ref


def opened(driver: DummyDriver, epoch: int = 1, *, vm: str = VM, mac: str = MAC) -> PortRef:
    ref = staged(driver, epoch, vm=vm, mac=mac)
    driver.open(ref)
    return ref


def frame(number: int, to: str = MAC, source: str = PEER_MAC) -> bytes:
    return bytes.fromhex((to + source).replace(":", "")) + b"\x08\x00" + number.to_bytes(4, "big")


def numbers(frames: list[bytes]) -> list[int]:
    return [int.from_bytes(one[14:18], "big") for one in frames]


def move(hosts: Hosts, source: str, destination: str, old: PortRef, epoch: int, send: Iterator[int]) -> PortRef:
    """A whole move, the peer on `d` sending one frame at each step."""
    a, b = hosts[source], hosts[destination]
    new = staged(b, epoch)
    peer = PortRef(PEER, PEER_MAC, 1)

    def step() -> None:
        hosts["d"].inject(peer, [frame(next(send))], judged=False)

    step()
    b.accept_redirect(new, 100 + epoch, source)
    a.hold(old)
    step()
    a.quiesce(old)
    step()
    left = a.take(old)
    b.commit(new)
    step()
    b.open(new, broadcast=False)
    step()
    a.redirect(old, 100 + epoch, destination, left)
    step()
    hosts.place(MAC, destination)
    step()
    a.purge(old, keep_redirect=True)
    step()
    a.purge(old)
    return new


def test_no_frame_is_lost_doubled_or_overtaken(hosts: Hosts) -> None:
    opened(hosts["d"], vm=PEER, mac=PEER_MAC)
    hosts.place(MAC, "a")
    send = itertools.count()
    old = opened(hosts["a"])
    new = move(hosts, "a", "b", old, 2, send)
    assert numbers(hosts["b"].take(new)) == list(range(8))
    back = move(hosts, "b", "a", new, 3, send)
    assert numbers(hosts["a"].take(back)) == list(range(8, 16))


def test_a_rollback_gives_the_held_frames_to_the_guest_in_order(hosts: Hosts) -> None:
    a = hosts["a"]
    ref = opened(a)
    for number in range(3):
        a.switch.forward("blue", frame(number), None)
    a.hold(ref)
    a.switch.forward("blue", frame(3), None)
    a.quiesce(ref)
    a.switch.forward("blue", frame(4), None)
    assert a.port(ref).held_to == 2
    assert a.resume(ref).passed == 2
    a.switch.forward("blue", frame(5), None)
    assert numbers(a.take(ref)) == [0, 1, 2, 3, 4, 5]
    assert a.port(ref).held_to == 0


def test_the_hold_is_bounded_and_says_what_it_dropped(hosts: Hosts) -> None:
    a = hosts["a"]
    ref = opened(a)
    a.hold(ref)
    for number in range(HOLD_MAX + 3):
        a.switch.forward("blue", frame(number), None)
    assert a.port(ref).drops == {"hold-full": 3}
    pumped = a.resume(ref)
    assert (pumped.passed, pumped.dropped) == (HOLD_MAX, 3)


def test_the_guests_first_frame_opens_a_committed_port(hosts: Hosts) -> None:
    b = hosts["b"]
    ref = staged(b)
    b.inject(ref, [frame(1, to=PEER_MAC, source=MAC)], judged=False)
    assert (b.port(ref).state, b.port(ref).held_from) == (PortState.STAGED, 1)
    b.commit(ref)
    b.inject(ref, [frame(2, to=PEER_MAC, source=MAC)], judged=False)
    assert b.port(ref).state is PortState.ACTIVE
    assert ("opened", ref) in [(event.what, event.ref) for event in hosts.events]
    assert numbers(b.switch.uplink) == []  # the second waits behind the first
    assert b.open(ref).passed == 2
    assert numbers(b.switch.uplink) == [1, 2]


def test_a_quiesced_port_passes_nothing_from_its_guest(hosts: Hosts) -> None:
    a = hosts["a"]
    ref = opened(a)
    a.quiesce(ref)
    a.inject(ref, [frame(1, to=PEER_MAC, source=MAC)], judged=False)
    assert a.port(ref).drops == {"not-active": 1}
    assert a.switch.uplink == []


def test_a_redirect_is_only_taken_from_the_announced_host_and_channel(hosts: Hosts) -> None:
    a, b = hosts["a"], hosts["b"]
    old, new = opened(a), opened(b, epoch=2)
    a.quiesce(old)
    b.accept_redirect(new, 7, "d")
    a.redirect(old, 7, "b")
    a.switch.forward("blue", frame(1), None)
    a.redirect(old, 8, "b")
    a.switch.forward("blue", frame(2), None)
    assert b.take(new) == []
    assert b.switch.drops["channel"] == 2


def test_a_frame_is_redirected_twice_at_most(hosts: Hosts) -> None:
    """Two hosts that redirect to each other: a mistake must not become a storm."""
    a, b = hosts["a"], hosts["b"]
    one, two = opened(a), opened(b, epoch=2)
    for driver, ref, other in ((a, one, "b"), (b, two, "a")):
        driver.accept_redirect(ref, 5, other)
        driver.quiesce(ref)
        driver.redirect(ref, 5, other)
    a.switch.forward("blue", frame(1), None)
    assert a.port(one).drops == {"hops": 1}


def test_a_lease_that_ran_out_stops_holding_and_redirecting(hosts: Hosts) -> None:
    a = hosts["a"]
    ref = opened(a)
    a.set_lease(ref, 5.0)
    hosts.clock.pass_s(6)
    a.switch.forward("blue", frame(0), None)
    assert numbers(a.take(ref)) == [0]  # an open port has no lease
    a.hold(ref)
    a.switch.forward("blue", frame(1), None)
    assert a.port(ref).drops == {"lease": 1}
    a.set_lease(ref, 5.0)
    a.switch.forward("blue", frame(2), None)
    assert a.port(ref).held_to == 1
    a.set_lease(ref, None)
    hosts.clock.pass_s(1000)
    a.switch.forward("blue", frame(3), None)
    assert a.port(ref).held_to == 2


def test_broadcast_comes_by_one_path(hosts: Hosts) -> None:
    b = hosts["b"]
    ref = staged(b)
    b.open(ref, broadcast=False)
    b.switch.forward("blue", frame(1, to="ff:ff:ff:ff:ff:ff"), None)
    assert b.take(ref) == []
    assert b.port(ref).drops == {"broadcast-path": 1}
    b.set_broadcast(ref, True)
    b.switch.forward("blue", frame(2, to="ff:ff:ff:ff:ff:ff"), None)
    assert numbers(b.take(ref)) == [2]


def test_broadcast_that_a_late_source_held_does_not_come_twice(hosts: Hosts) -> None:
    a, b = hosts["a"], hosts["b"]
    old, new = opened(a), staged(b, epoch=2)
    b.accept_redirect(new, 7, "a")
    a.hold(old)
    b.commit(new)
    b.open(new, broadcast=False)
    b.set_broadcast(new, True)  # the source has been silent for too long
    for host in (a, b):
        host.switch.forward("blue", frame(1, to="ff:ff:ff:ff:ff:ff"), None)
    a.switch.forward("blue", frame(2), None)
    a.quiesce(old)
    a.redirect(old, 7, "b")
    assert sorted(numbers(b.take(new))) == [1, 2]
    assert b.port(new).drops == {"broadcast-path": 1}


def test_a_staged_port_gets_nothing_flooded(hosts: Hosts) -> None:
    b = hosts["b"]
    ref = staged(b)
    b.switch.forward("blue", frame(1, to="ff:ff:ff:ff:ff:ff"), None)
    assert b.take(ref) == []


def test_the_clock_of_a_port_stands_while_it_does_not_run(hosts: Hosts) -> None:
    a = hosts["a"]
    ref = staged(a)
    a.load(ref, sample("conntrack", 1))
    first = a.port(ref)
    hosts.clock.pass_s(100)
    a.open(ref)
    hosts.clock.pass_s(7)
    (table,) = a.dump(ref, "conntrack")
    assert table.port_time_ns == sample("conntrack", 1).port_time_ns + 7_000_000_000
    a.quiesce(ref)
    hosts.clock.pass_s(100)
    (again,) = a.dump(ref, "conntrack")
    assert again.port_time_ns == table.port_time_ns
    assert first.state is PortState.STAGED


def test_changes_that_overflow_are_not_forgotten(hosts: Hosts) -> None:
    driver = DummyDriver()
    driver.start({"host": "small", "fabric": hosts.fabric, "tracked_max": 10}, hosts.events.append)
    driver.set_network(Network("blue", NetworkKind.LOCAL))
    ref = opened(driver)
    driver.track(ref)
    driver.load(ref, sample("conntrack", 11))
    with pytest.raises(NotReady, match="dump again"):
        driver.drain(ref)
    with pytest.raises(NotReady):
        driver.drain(ref)
    driver.track(ref)
    assert driver.drain(ref) == []
    driver.destroy()


def test_a_path_is_probed_both_ways(hosts: Hosts) -> None:
    a = hosts["a"]
    assert a.probe_path(1, "b", 1500, 1.0)
    assert not a.probe_path(1, "nowhere", 1500, 1.0)
    net = fabric(hosts.fabric)
    net.cut("b", "a")
    assert not a.probe_path(1, "b", 1500, 1.0)
    net.mend("b", "a")
    net.mtu = 1400
    assert not a.probe_path(1, "b", 1500, 1.0)


def test_a_cut_loses_frames_and_counts_them(hosts: Hosts) -> None:
    a, b = hosts["a"], hosts["b"]
    old, new = opened(a), opened(b, epoch=2)
    b.accept_redirect(new, 7, "a")
    a.quiesce(old)
    a.redirect(old, 7, "b")
    fabric(hosts.fabric).cut("a", "b")
    a.switch.forward("blue", frame(1), None)
    assert a.port(old).drops == {"tunnel": 1}
    assert b.take(new) == []


def test_traces_tell_each_verdict(hosts: Hosts) -> None:
    a = hosts["a"]
    ref = opened(a)
    a.set_trace(ref, True)
    a.switch.forward("blue", frame(1), None)
    a.quiesce(ref)
    a.inject(ref, [frame(2, to=PEER_MAC, source=MAC)], judged=False)
    traces = [event.data for event in hosts.events if event.what == "trace"]
    assert [(t["direction"], t["verdict"], t["reason"]) for t in traces] == [
        ("to", "pass", "none"),
        ("from", "drop", "not-active"),
    ]
    assert traces[0]["frame"] == frame(1)


def test_a_thousand_hosts_are_cheap(hosts: Hosts) -> None:
    """Simulations make that many: no thread, no descriptor, nothing that grows with what is not used."""
    made = []
    for number in range(1_000):
        driver = DummyDriver()
        driver.start({"host": f"h{number}", "fabric": hosts.fabric}, hosts.events.append)
        driver.set_network(Network("blue", NetworkKind.LOCAL))
        opened(driver)
        made.append(driver)
    columns = empty_columns(KINDS["conntrack"], 3)
    columns["state"][:] = 3
    columns["rport"][:] = [1, 2, 3]
    for driver in made:
        ref = driver.ports()[0].ref
        driver.load(ref, Table("conntrack", Op.LOAD, columns=columns))
        driver.destroy()
    assert set(fabric(hosts.fabric).switches) == {"a", "b", "d"}
