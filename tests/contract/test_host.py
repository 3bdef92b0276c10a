"""The host: what a driver can hold, why it refuses, what it leaves behind, and that its ports outlive it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pytest

from datapath.errors import NotReady, PortNotFound
from datapath.provider import Driver, Need, Network, NetworkKind, PortState
from datapath.registry import KINDS
from tests.contract.hosts import VM, Host, bring, ref
from tests.contract.samples import keys_of, normal, port_record, sample


def test_the_driver_names_itself_and_its_kinds(host: Host) -> None:
    assert host.driver.name == host.kind
    assert {"port"} <= set(host.driver.kinds()) <= set(KINDS)
    assert all(version <= KINDS[name].version for name, version in host.driver.kinds().items())


def test_check_says_what_is_there(host: Host) -> None:
    for name, there, cure in type(host.driver).check(host.options):
        assert name
        assert there or cure


def test_a_host_that_is_not_started_says_so(host: Host) -> None:
    with pytest.raises(NotReady):
        type(host.driver)().ports()


# ---- probe ----


NEED = Need(kinds={"port": 1, "conntrack": 1}, records=[port_record()], rules_max=100, connections=65_536)


def test_probe_of_what_fits(driver: Driver) -> None:
    assert driver.probe(NEED) == []


@pytest.mark.parametrize(
    ("need", "named"),
    [
        (dataclasses.replace(NEED, kinds={"teapot": 1}), "teapot"),
        (dataclasses.replace(NEED, kinds={"conntrack": 99}), "conntrack"),
        (dataclasses.replace(NEED, records=[port_record(network="nowhere")]), "nowhere"),
        (dataclasses.replace(NEED, records=[port_record(trunk={"7": "elsewhere"})]), "elsewhere"),
        (dataclasses.replace(NEED, rules_max=1_000_000), "1000000"),
        (dataclasses.replace(NEED, records=[port_record(mtu=9000)]), "9000"),
        (
            dataclasses.replace(NEED, records=[port_record(mac=f"02:00:00:00:{n:02x}:01") for n in range(256)] * 9),
            "port",
        ),
    ],
)
def test_probe_says_why_not(driver: Driver, need: Need, named: str) -> None:
    before = driver.remains()
    reasons = driver.probe(need)
    assert any(named in reason.replace(",", "") for reason in reasons), reasons
    assert driver.remains() == before


def test_probe_says_all_reasons_at_once(driver: Driver) -> None:
    reasons = driver.probe(dataclasses.replace(NEED, kinds={"teapot": 1}, records=[port_record(network="nowhere")]))
    assert any("teapot" in reason for reason in reasons)
    assert any("nowhere" in reason for reason in reasons)


def test_describe_gives_limits_not_use(host: Host) -> None:
    made = host.stage(connections_max=5_000)
    host.driver.load(made, sample("conntrack", 10))
    host.driver.load(made, sample("acl", 30))
    need = host.driver.describe([made])
    assert need.connections == 5_000
    assert need.rules_max >= 30
    assert [{name: record[name] for name in port_record()} for record in need.records] == [
        port_record(connections_max=5_000)
    ]
    assert set(need.kinds) <= set(host.driver.kinds())
    assert host.driver.probe(need) == []


# ---- networks ----


def test_networks_are_listed_and_removed(driver: Driver) -> None:
    green = Network("green", NetworkKind.LOCAL, mtu=1400)
    driver.set_network(green)
    assert green in driver.networks()
    driver.set_network(dataclasses.replace(green, ageing_s=60))
    assert [n.ageing_s for n in driver.networks() if n.name == "green"] == [60]
    driver.remove_network("green")
    assert [n.name for n in driver.networks()] == ["blue"]


def test_a_network_with_ports_is_not_removed(host: Host) -> None:
    made = host.stage()
    with pytest.raises(NotReady):
        host.driver.remove_network("blue")
    assert [network.name for network in host.driver.networks()] == ["blue"]
    host.driver.purge(made)
    host.driver.remove_network("blue")
    assert list(host.driver.networks()) == []


# ---- what stays ----


def _left(before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    found = {sort: set(after.get(sort, ())) - set(before.get(sort, ())) for sort in after}
    return {sort: names for sort, names in found.items() if names}


@pytest.mark.parametrize("state", ["staged", "committed", "active", "held", "quiesced", "redirecting", "stub"])
def test_nothing_remains_after_purge(host: Host, state: str) -> None:
    before = host.driver.remains()
    made = host.in_state(state)
    assert _left(before, host.driver.remains())
    if state not in ("stub", "redirecting", "quiesced"):
        host.driver.load(made, sample("conntrack", 100))
        host.driver.load(made, sample("acl", 10))
        host.driver.load(made, sample("fdb", 10))
        host.driver.accept_redirect(made, 99, "there")
    if state in ("active", "held"):
        host.driver.track(made)
    host.driver.purge(made)
    assert _left(before, host.driver.remains()) == {}
    with pytest.raises(PortNotFound):
        host.driver.port(made)


def test_nothing_remains_after_a_move_back_and_forth(host: Host) -> None:
    before = host.driver.remains()
    for epoch in (1, 2, 3):
        made = host.in_state("active", epoch=epoch)
        host.driver.load(made, sample("fdb", 3))
        host.driver.quiesce(made)
        host.driver.redirect(made, 70 + epoch, "there")
        host.driver.purge(made, keep_redirect=True)
        host.driver.purge(made)
    assert _left(before, host.driver.remains()) == {}


def full(made: Driver) -> None:
    """An active port with state, and a committed one."""
    active, staged = ref(), ref(mac="02:00:00:00:00:02")
    made.stage(active, port_record(), "ct1x01")
    made.load(active, sample("conntrack", 500))
    made.load(active, sample("acl", 12))
    made.commit(active)
    made.open(active)
    made.stage(staged, port_record(mac=staged.mac, addresses=["10.0.0.6"]), "ct1x02")
    made.commit(staged)


def held(made: Driver) -> None:
    """The pause, before the switchover."""
    made.stage(ref(), port_record(), "ct1x01")
    bring(made, ref(), "quiesced")


def stub(made: Driver) -> None:
    """A source that was settled and still redirects."""
    made.stage(ref(), port_record(), "ct1x01")
    bring(made, ref(), "stub")


def tracked(made: Driver) -> None:
    """Pre-copy: changes are noted."""
    made.stage(ref(), port_record(), "ct1x01")
    made.open(ref())
    made.track(ref())
    made.load(ref(), sample("conntrack", 40))


def left_by(host: Host, calls: Callable[[Driver], None], end: str) -> None:
    """What `calls` made, under a new driver object: the one before was stopped, or died."""
    for device in ("ct1x01", "ct1x02"):
        host.plug(device)
    if end == "crashed":
        host.crash(calls)
    else:
        calls(host.driver)
        host.restart()


@pytest.mark.parametrize("end", ["stopped", "crashed"])
def test_ports_outlive_the_driver(host: Host, end: str) -> None:
    left_by(host, full, end)
    active, staged = ref(), ref(mac="02:00:00:00:00:02")
    states = {status.ref: (status.state, status.committed) for status in host.driver.ports()}
    assert states == {active: (PortState.ACTIVE, True), staged: (PortState.STAGED, True)}
    assert normal(list(host.driver.dump(active, "conntrack"))) == normal([sample("conntrack", 500)])
    assert normal(list(host.driver.dump(active, "acl"))) == normal([sample("acl", 12)])
    assert host.driver.port(active).record["policy"] == "web"
    assert [network.name for network in host.driver.networks()] == ["blue"]
    host.driver.open(staged)
    host.driver.load(active, keys_of(sample("conntrack", 500)))
    assert list(normal(list(host.driver.dump(active, "conntrack")))) == []


@pytest.mark.parametrize("end", ["stopped", "crashed"])
def test_a_hold_outlives_the_driver(host: Host, end: str) -> None:
    """The agent went in the pause: what was held is still held, and comes back at the rollback."""
    left_by(host, held, end)
    status = host.driver.port(ref())
    assert (status.state, status.gate) == (PortState.QUIESCED, "local shut")
    host.driver.resume(ref())
    assert host.driver.port(ref()).gate == "local"


@pytest.mark.parametrize("end", ["stopped", "crashed"])
def test_a_redirect_outlives_the_driver(host: Host, end: str) -> None:
    left_by(host, stub, end)
    status = host.driver.port(ref())
    assert (status.state, status.gate) == (PortState.STUB, "redirect")
    host.driver.purge(ref())
    assert host.driver.ports() == []


@pytest.mark.parametrize("end", ["stopped", "crashed"])
def test_changes_outlive_the_driver(host: Host, end: str) -> None:
    """Change tracking goes on while no driver runs: a drain after it is still complete."""
    left_by(host, tracked, end)
    assert sum(len(table) for table in host.driver.drain(ref())) == 40


def test_destroy_takes_everything(host: Host) -> None:
    host.in_state("active")
    host.driver.destroy()
    host.take_over()
    assert host.driver.ports() == []
    assert list(host.driver.networks()) == []


def test_every_port_is_listed(host: Host) -> None:
    refs = [host.stage(mac=f"02:00:00:00:00:0{number}") for number in (3, 1, 2)]
    assert sorted(status.ref for status in host.driver.ports()) == sorted(refs)


def test_the_ports_of_one_vm(host: Host) -> None:
    """As those of all VMs say it, with every instance; a VM without any has none, also when it had one."""
    mine, second = host.stage(1), host.stage(1, mac="02:00:00:00:00:02")
    other = ref(1, mac="02:00:00:00:00:03", vm=f"{VM[:-1]}9")
    host.plug("ct1x03")
    host.driver.stage(other, host.record(mac=other.mac), "ct1x03")
    newer = host.stage(2, device="ct1x01")
    assert {status.ref for status in host.driver.ports(VM)} == {mine, second, newer}
    assert host.driver.ports(other.vm) == [status for status in host.driver.ports() if status.ref == other]
    host.driver.purge(other)
    assert host.driver.ports(other.vm) == []
    assert len(host.driver.ports()) == 3
