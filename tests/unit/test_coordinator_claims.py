"""What only one port of the cluster may have is refused at a second one, and both are named."""

from __future__ import annotations

import json

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.change import Planned
from migrator.coordinator.journal import Batch, Write
from migrator.coordinator.store import Store
from migrator.errors import ConfigInvalid
from tests.unit.scripted import MAC, VM, configuration
from tests.unit.test_coordinator_config import OTHER_VM, apply, plan, port, store  # noqa: F401

OTHER_MAC = "52:54:00:00:00:01"
ONE, OTHER = f"{VM}/{MAC}", f"{OTHER_VM}/{OTHER_MAC}"
SFLOW = {"rate": 100, "agent": "10.0.0.1", "sub_agent": 17, "collectors": ["192.0.2.9"]}
FLOATING = {"rules": [{"outside": "203.0.113.7", "inside": "192.0.2.9"}]}
PARTLY = {"rules": [{"outside": "203.0.113.7", "protocol": "tcp", "outside_port": 443, "inside": "192.0.2.1"}]}
RED = pb.Network(name="red", kind="uplink", vlan=77)


def with_kinds(vm: str, mac: str, network: str = "blue", host: str = "h1", **kinds: object) -> pb.Port:
    written = {kind: json.dumps(document) for kind, document in kinds.items()}
    return port(vm, mac, network=network, host=host, kinds=written)


def disputes(planned: Planned) -> list[str]:
    return [line for line in planned.warnings if "is port" in line]


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"sampling": SFLOW}, {"sampling": {**SFLOW, "rate": 7}}, "sampling: sub-agent 17 of 10.0.0.1"),
        ({"remap": FLOATING}, {"remap": FLOATING}, "remap: outside address 203.0.113.7 of network blue"),
        ({"remap": FLOATING}, {"remap": PARTLY}, "remap: outside address 203.0.113.7 of network blue"),
    ],
)
def test_the_second_port_that_declares_it_is_refused(
    store: Store,  # noqa: F811
    first: dict[str, object],
    second: dict[str, object],
    what: str,
) -> None:
    apply(store, configuration())
    apply(store, pb.Config(ports=[with_kinds(VM, MAC, **first)]))
    elsewhere = with_kinds(OTHER_VM, OTHER_MAC, host="h2", **second)
    with pytest.raises(ConfigInvalid, match=f"port {OTHER}: {what} is port {ONE}'s"):
        plan(store, pb.Config(ports=[elsewhere]))
    apply(store, pb.Config(ports=[with_kinds(OTHER_VM, OTHER_MAC, host="h2")]))
    with pytest.raises(ConfigInvalid, match=f"port {OTHER}: {what} is port {ONE}'s"):
        plan(store, pb.Config(ports=[elsewhere]))
    handed_over = apply(store, pb.Config(ports=[with_kinds(VM, MAC), elsewhere]))
    assert (len(handed_over.changed), disputes(handed_over)) == (2, [])


def test_what_differs_is_no_dispute(store: Store) -> None:  # noqa: F811
    """Each network has addresses of its own; a port's rules may name an address several times; agents differ."""
    apply(store, configuration())
    apply(store, pb.Config(networks=[RED]))
    several = {"rules": [{**PARTLY["rules"][0], "outside_port": number} for number in (80, 443)]}
    planned = apply(
        store,
        pb.Config(
            ports=[
                with_kinds(VM, MAC, remap=several, sampling=SFLOW),
                with_kinds(OTHER_VM, OTHER_MAC, "red", remap=FLOATING, sampling={**SFLOW, "agent": "10.0.0.2"}),
            ]
        ),
    )
    assert disputes(planned) == []


def test_a_dispute_of_old_is_told_and_stops_nobody_else(store: Store) -> None:  # noqa: F811
    """A journal that was written before ports were compared."""
    apply(store, configuration())
    both = [with_kinds(VM, MAC, remap=FLOATING), with_kinds(OTHER_VM, OTHER_MAC, remap=FLOATING)]
    store.commit(Batch([Write("port", f"{one.vm}/{one.mac}", one.SerializeToString()) for one in both]))
    planned = apply(store, pb.Config(networks=[RED]))
    (said,) = disputes(planned)
    assert "outside address 203.0.113.7" in said and ONE in said and OTHER in said
    with pytest.raises(ConfigInvalid, match="outside address"):
        plan(store, pb.Config(ports=[with_kinds(VM, MAC, remap=FLOATING, sampling=SFLOW)]))
    assert disputes(apply(store, pb.Config(ports=[with_kinds(VM, MAC)]))) == []
