"""Apply and Remove: all or nothing, ids that stay, orders that agents get."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.change import Moving, Planned, Running, plan_apply, plan_removal
from migrator.coordinator.journal import Batch
from migrator.coordinator.sqlite import SqliteJournal
from migrator.coordinator.store import Store
from migrator.errors import AlreadyMigrating, ConfigInvalid, JournalFailed, ObjectNotFound
from tests.unit.scripted import MAC, VM, configuration

OTHER_VM = "0b0b0b0b-8a5d-4e0e-9d3e-0c5f7b1f2a02"
NOBODY: Moving = {}
NOTHING: Running = {}


@pytest.fixture
def store(tmp_path: Path):
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    yield Store(journal)
    journal.close()


def plan(store: Store, message: pb.Config, moving: Moving = NOBODY, running: Running = NOTHING) -> Planned:
    return plan_apply(store.catalog, config.from_message(message, config.Config), store.journal, moving, running)


def apply(store: Store, message: pb.Config, running: Running = NOTHING) -> Planned:
    planned = plan(store, message, running=running)
    store.commit(Batch(planned.writes, counters=planned.counters))
    return planned


def port(vm: str = VM, mac: str = MAC, **fields: object) -> pb.Port:
    return pb.Port(**{"vm": vm, "mac": mac, "network": "blue", "host": "h1", "device": "t{mac6}", **fields})


def test_order_has_rules_resolved_and_an_epoch(store: Store) -> None:
    apply(store, configuration())
    order = store.catalog.order(store.catalog.ports_of(VM)[0])
    assert (order.epoch, order.device, list(order.rules[0].remote)) == (1, "t123456", ["192.0.2.0/24"])
    assert order.rules[0].id == 1


def test_an_acl_rule_whose_sets_are_empty_matches_nothing_and_not_everything(store: Store) -> None:
    apply(store, configuration())
    apply(store, pb.Config(address_sets=[pb.AddressSet(name="office")]))
    assert not store.catalog.order(store.catalog.ports_of(VM)[0]).rules


def test_change_of_a_set_touches_the_ports_that_use_it(store: Store) -> None:
    apply(store, configuration())
    before = store.catalog.order(store.catalog.ports_of(VM)[0]).revision
    planned = plan(store, pb.Config(address_sets=[pb.AddressSet(name="office", prefixes=["10.0.0.0/8"])]))
    entries = store.commit(Batch(planned.writes))
    assert [touched.mac for touched in store.catalog.ports_touched(entries)] == [MAC]
    assert store.catalog.order(store.catalog.ports_of(VM)[0]).revision == entries[0].revision > before


def test_same_document_twice_changes_nothing(store: Store) -> None:
    apply(store, configuration())
    revision = store.revision
    planned = apply(store, configuration())
    assert (planned.changed, planned.writes, store.revision) == ([], [], revision)


def test_unchanged_rules_keep_their_ids(store: Store) -> None:
    allow = pb.Rule(direction="to", priority=1, protocol="tcp", ports=["443"], action="allow")
    drop = pb.Rule(direction="to", priority=9, protocol="any", action="drop")
    apply(store, pb.Config(policies=[pb.Policy(name="p", rules=[allow, drop])]))
    new = pb.Rule(direction="to", priority=5, protocol="udp", action="allow")
    apply(store, pb.Config(policies=[pb.Policy(name="p", rules=[new, drop, allow])]))
    assert [rule.id for rule in store.catalog.policies["p"].rules] == [3, 2, 1]
    apply(store, pb.Config(policies=[pb.Policy(name="p", rules=[new, allow])]))
    apply(store, pb.Config(policies=[pb.Policy(name="p", rules=[new, allow, drop])]))
    assert [rule.id for rule in store.catalog.policies["p"].rules] == [3, 1, 4]  # 2 is never used again


def test_the_id_of_another_policys_rule_is_refused(store: Store) -> None:
    rule = pb.Rule(direction="to", protocol="any", action="allow")
    apply(store, pb.Config(policies=[pb.Policy(name="p", rules=[rule])]))
    rule.id = 1
    with pytest.raises(ConfigInvalid, match="belongs to policy p"):
        plan(store, pb.Config(policies=[pb.Policy(name="q", rules=[rule])]))


def test_rule_epochs_of_a_vm_never_repeat(store: Store) -> None:
    apply(store, configuration())
    planned = plan_removal(store.catalog, "port", f"{VM}/{MAC}", NOBODY)
    store.commit(Batch(planned.writes))
    assert not store.catalog.places
    apply(store, configuration())
    assert store.catalog.epoch(store.catalog.ports_of(VM)[0]) == 2


def test_ports_declared_together_share_an_epoch(store: Store) -> None:
    both = configuration()
    both.ports.append(port(mac="52:54:00:00:00:01"))
    apply(store, both)
    assert [store.catalog.epoch(item) for item in store.catalog.ports_of(VM)] == [1, 1]
    apply(store, pb.Config(ports=[port(mac="52:54:00:00:00:02")]))
    assert sorted(store.catalog.epoch(item) for item in store.catalog.ports_of(VM)) == [1, 1, 2]


def test_instance_that_a_lost_journal_knew_is_taken_over(store: Store) -> None:
    running = {(VM, MAC, "h1"): 7}
    apply(store, configuration(), running)
    assert store.catalog.epoch(store.catalog.ports_of(VM)[0]) == 7
    planned = plan_removal(store.catalog, "port", f"{VM}/{MAC}", NOBODY)
    store.commit(Batch(planned.writes))
    apply(store, configuration(), running)  # an old Hello still names it: it has ended
    assert store.catalog.epoch(store.catalog.ports_of(VM)[0]) == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pb.Config(ports=[port(OTHER_VM)]), "MAC 52:54:00:12:34:56 is in its network already"),
        (pb.Config(ports=[port(mac="52:54:00:00:00:01", network="red")]), "no network red"),
        (pb.Config(ports=[port(mac="52:54:00:00:00:01", policy="none")]), "no policy none"),
        (pb.Config(ports=[port(mac="52:54:00:00:00:01", trunk={5: "red"})]), "no network red"),
        (pb.Config(ports=[port(mac="52:54:00:00:00:01", mtu=1501)]), "MTU 1501, and network blue carries 1500"),
        (
            pb.Config(
                networks=[pb.Network(name="over", kind="overlay", vni=9, mtu=1450)],
                ports=[port(mac="52:54:00:00:00:01", trunk={5: "over"})],
            ),
            "MTU 1500, and network over carries 1450",
        ),
        (pb.Config(ports=[port(mac="52:54:00:00:00:01", host="h2")]), "a VM is on one host"),
        (pb.Config(ports=[port(OTHER_VM, "52:54:00:00:00:01", host="")]), "host is missing"),
        (pb.Config(ports=[port(OTHER_VM, "52:54:00:00:00:01", device="")]), "no device on host h1"),
        (pb.Config(ports=[port(OTHER_VM, "52:54:00:00:00:01", name="shop")]), "VM name shop"),
        (pb.Config(networks=[pb.Network(name="red", kind="uplink", vlan=7)]), "network blue's already"),
        (
            pb.Config(
                policies=[
                    pb.Policy(name="p", rules=[pb.Rule(direction="to", remote=["@x"], action="drop", protocol="any")])
                ]
            ),
            "address set x",
        ),
        (pb.Config(networks=[pb.Network(name="n", kind="local"), pb.Network(name="n", kind="local")]), "given twice"),
    ],
)
def test_one_wrong_object_and_nothing_is_applied(store: Store, change: pb.Config, says: str) -> None:
    apply(store, configuration())
    before = store.catalog.config(store.revision)
    change.address_sets.add(name="fine", prefixes=["10.0.0.0/8"])
    with pytest.raises(ConfigInvalid, match=says):
        apply(store, change)
    assert store.catalog.config(store.revision) == before


def test_host_of_a_declared_port_changes_by_migration_only(store: Store) -> None:
    apply(store, configuration())
    planned = apply(store, configuration(host="h2"))
    assert store.catalog.host_of(VM) == "h1"
    assert any("only migrate moves a VM" in warning for warning in planned.warnings)


def test_ports_of_a_moving_vm_are_neither_added_nor_removed(store: Store) -> None:
    apply(store, configuration())
    moving = {VM: "h2"}
    with pytest.raises(AlreadyMigrating):
        plan(store, pb.Config(ports=[port(mac="52:54:00:00:00:01")]), moving)
    with pytest.raises(AlreadyMigrating):
        plan_removal(store.catalog, "port", f"{VM}/{MAC}", moving)


@pytest.mark.parametrize(("sort", "name"), [("network", "blue"), ("policy", "web"), ("address-set", "office")])
def test_what_is_in_use_is_not_removed(store: Store, sort: str, name: str) -> None:
    apply(store, configuration())
    with pytest.raises(ConfigInvalid, match="in use by"):
        plan_removal(store.catalog, sort, name, NOBODY)
    with pytest.raises(ObjectNotFound):
        plan_removal(store.catalog, sort, "nothing", NOBODY)


def test_one_coordinator_at_a_time_has_the_journal(store: Store, tmp_path: Path) -> None:
    apply(store, configuration())
    with pytest.raises(JournalFailed, match="locked"):
        SqliteJournal(tmp_path / "journal.sqlite")


def test_batch_is_written_as_a_whole(store: Store) -> None:
    apply(store, configuration())
    revision = store.revision
    planned = plan(store, pb.Config(ports=[port(OTHER_VM, "52:54:00:00:00:01")]))
    unwritable = {"epoch/x": object()}  # written after the objects
    with pytest.raises(JournalFailed):
        store.commit(Batch(planned.writes, counters=unwritable))  # type: ignore[arg-type]
    assert not store.catalog.by_vm.get(OTHER_VM)
    assert (store.revision, max(entry.revision for entry in store.journal.objects())) == (revision, revision)
    apply(store, pb.Config(ports=[port(OTHER_VM, "52:54:00:00:00:01")]))
    assert store.catalog.host_of(OTHER_VM) == "h1"


def test_a_policys_timeouts_are_its_ports_unless_they_say_otherwise(store: Store) -> None:
    policy = pb.Policy(name="p", timeouts_ms={"udp": 5_000, "tcp_close": 1_000})
    ports = [port(policy="p", timeouts_ms={"udp": 9_000}), port(OTHER_VM, "52:54:00:00:00:02", policy="p")]
    apply(store, pb.Config(networks=configuration().networks, policies=[policy], ports=ports))
    orders = {vm: store.catalog.order(store.catalog.ports_of(vm)[0]) for vm in (VM, OTHER_VM)}
    assert dict(orders[VM].port.timeouts_ms) == {"udp": 9_000, "tcp_close": 1_000}
    assert dict(orders[OTHER_VM].port.timeouts_ms) == {"udp": 5_000, "tcp_close": 1_000}
    assert dict(store.catalog.ports_of(OTHER_VM)[0].timeouts_ms) == {}, "what the port says stays what it says"
    planned = plan(store, pb.Config(policies=[pb.Policy(name="p", timeouts_ms={"udp": 6_000})]))
    entries = store.commit(Batch(planned.writes))
    assert {touched.vm for touched in store.catalog.ports_touched(entries)} == {VM, OTHER_VM}
    order = store.catalog.order(store.catalog.ports_of(OTHER_VM)[0])
    assert (dict(order.port.timeouts_ms), order.revision) == ({"udp": 6_000}, entries[0].revision)


def test_a_policys_timeout_that_is_none_is_refused(store: Store) -> None:
    with pytest.raises(ConfigInvalid, match="eternity"):
        plan(store, pb.Config(policies=[pb.Policy(name="p", timeouts_ms={"eternity": 1})]))


class Closed:
    """A policy whose rules nobody may read."""

    name = "closed"

    @property
    def rules(self) -> list[pb.Rule]:
        raise AssertionError("all rules of the cluster are read for a change of one policy")


def test_a_change_of_a_policy_reads_no_other_ones_rules(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster may have a hundred thousand rules."""
    apply(store, configuration())
    monkeypatch.setitem(store.catalog.objects["policy"], "closed", Closed())
    rule = pb.Rule(direction="to", protocol="udp", ports=["53"], action="allow", priority=1)
    changed = pb.Config(policies=[pb.Policy(name=name, rules=[rule]) for name in ("web", "new")])
    entries = store.commit(Batch(plan(store, changed).writes))
    assert [touched.vm for touched in store.catalog.ports_touched(entries)] == [VM]
    named = pb.Config(
        policies=[
            pb.Policy(name="new", rules=[pb.Rule(id=1, direction="to", protocol="udp", action="allow", priority=1)])
        ]
    )
    with pytest.raises(AssertionError, match="all rules"):  # an id that somebody names may be another's
        plan(store, named)
