"""Kinds of state that are declared at a port: from an operator's document to the switch, and along with the VM.

Told with kind `remap`, but nothing here is that kind's own.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import msgpack
import pytest
import structlog

from datapath.errors import LoadRejected, NotReady
from datapath.provider import PortRef
from datapath.state.kind import Table
from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.agent.orders import kind_changes, need_of
from migrator.documents import read_documents
from migrator.errors import ConfigInvalid, Corrupt
from tests.contract.hosts import dummy_host
from tests.unit import scripted
from tests.unit.pair import MACS, VM, World, eventually
from tests.unit.test_cli_agent import Shell, play  # noqa: F401
from tests.unit.test_coordinator_declare import declare, port, refused, scenario

KIND = "remap"
FLOATING = {"rules": [{"outside": "203.0.113.7", "inside": "192.0.2.9"}]}
RECORD = {"outside": "203.0.113.7", "protocol": "", "outside_port": 0, "inside": "192.0.2.9", "inside_port": 0}
ORDER = pb.PortOrder(port=pb.Port(kinds={KIND: json.dumps(FLOATING)}))


def declared(document: object) -> config.Config:
    body = {"vm": VM, "mac": MACS[0], "network": "blue", KIND: document}
    return read_documents(json.dumps({"ports": [body]}), "x.yaml")


def test_a_document_goes_through_the_contract_and_back() -> None:
    wanted = declared(FLOATING)
    message = config.to_message(wanted)
    assert json.loads(message.ports[0].kinds[KIND]) == FLOATING
    assert config.from_message(message, config.Config) == wanted
    assert dict(config.to_message(declared(None)).ports[0].kinds) == {}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"rules": [{"outside": "203.0.113.7"}]}, rf"x.yaml:1: ports\[0\] \({MACS[0]}\) {KIND}.rules\[0\].inside"),
        ({"rules": [], "more": 1}, rf"{KIND}.more"),
        (7, rf"{KIND}: "),
    ],
)
def test_a_wrong_document_is_refused_where_it_is_wrong(document: object, words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        declared(document)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"rules"', '{"rules": 7}'])
def test_a_document_of_the_contract_is_checked_as_well(text: str) -> None:
    with pytest.raises(ConfigInvalid, match=KIND):
        config.from_message(
            pb.Config(ports=[pb.Port(vm=VM, mac=MACS[0], network="blue", kinds={KIND: text})]), config.Config
        )


def test_a_kind_that_is_not_declared_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="'fdb' is not declared at a port"):
        config.from_message(pb.Port(vm=VM, mac=MACS[0], network="blue", kinds={"fdb": "{}"}), config.Port)


def test_only_what_differs_is_loaded() -> None:
    kind = config.KINDS[KIND]
    other = {**RECORD, "outside": "203.0.113.8"}
    counted = {**RECORD, "packets_from": 7}
    assert kind_changes(ORDER, kind, [counted]) == []
    (gone,) = kind_changes(ORDER, kind, [counted, other])
    assert (str(gone.op), [kind.key_of(one) for one in gone.records or ()]) == ("delete", [kind.key_of(other)])
    (new,) = kind_changes(ORDER, kind, [])
    assert (str(new.op), new.records) == ("load", [RECORD])
    assert [str(table.op) for table in kind_changes(pb.PortOrder(), kind, [counted])] == ["delete"]


@pytest.mark.parametrize(
    "configured",
    [b"\xc1", msgpack.packb([]), msgpack.packb({KIND: 7}), msgpack.packb({KIND: [7]}), msgpack.packb({KIND: [{}]})],
)
def test_what_a_source_says_of_them_is_not_believed_unchecked(configured: bytes) -> None:
    with pytest.raises(Corrupt, match=r"(?i)configured|remap"):
        need_of(pb.Need(records=b"\x90", configured=configured), {})


def test_records_of_a_kind_that_is_unknown_here_are_asked_for_by_name() -> None:
    need = need_of(
        pb.Need(kinds={"x-later": 1}, records=b"\x90", configured=msgpack.packb({"x-later": [{"a": 1}]})), {}
    )
    assert (dict(need.kinds), dict(need.configured)) == ({"x-later": 1}, {"x-later": [{"a": 1}]})


def test_set_show_move_and_unset(play) -> None:  # noqa: F811
    async def scenario(w: World, shell: Shell) -> None:
        assert "changed" in await shell("port", "set", f"{VM}/{MACS[0]}", KIND, json.dumps(FLOATING))
        assert "nothing to change" in await shell("port", "set", f"{VM}/{MACS[0]}", KIND, json.dumps(FLOATING))
        await eventually(lambda: records(w, "a") == [RECORD])
        (first, _) = await shell.json("port", "show", VM)
        assert (first[KIND], first["status"]["kinds"][KIND]) == (FLOATING, [RECORD])
        assert "203.0.113.7" in await shell("port", "show", VM)
        await shell("migrate", VM, "--to", "b")
        assert records(w, "b") == [RECORD]
        await shell("port", "unset", MACS[0], KIND)
        await eventually(lambda: records(w, "b") == [])
        assert KIND not in (await shell.json("port", "show", MACS[0], host="b"))[0]

    play(scenario)


NEW = "52:54:00:00:00:77"
NEW_PORT = {"vm": scripted.VM, "mac": NEW, "network": "blue", "host": "a", "device": "new0", KIND: FLOATING}


def test_a_new_port_has_them_when_it_opens(play, tmp_path: Path) -> None:  # noqa: F811
    async def scenario(w: World, shell: Shell) -> None:
        (tmp_path / "new.yaml").write_text(json.dumps({"ports": [NEW_PORT]}))
        opened, driver = [], w.agents["a"].driver
        was, driver.open = driver.open, lambda ref: opened.append(records(w, "a", NEW)) or was(ref)
        await shell("apply", "-f", str(tmp_path / "new.yaml"))
        await eventually(lambda: opened == [[RECORD]])

    play(scenario)


def test_a_port_opens_without_what_cannot_be_set(play) -> None:  # noqa: F811
    async def scenario(w: World, shell: Shell) -> None:  # noqa: ARG001
        driver = w.agents["a"].driver
        was = driver.load

        def load(ref: PortRef, table: Table):
            if table.kind == KIND:
                raise LoadRejected("the rack is too hot", hint="cool it")
            return was(ref, table)

        driver.load = load
        body = pb.Port(vm=scripted.VM, mac=NEW, network="blue", host="a", kinds=ORDER.port.kinds)
        with pytest.raises(NotReady, match=rf"{KIND}: the rack is too hot"):
            await w.agents["a"].household.port(pb.PortOrder(port=body, epoch=1, device="new0"))
        assert [str(status.state) for status in driver.ports() if status.ref.mac == NEW] == ["active"]

    play(scenario)


def records(w: World, host: str, mac: str = MACS[0]) -> list[dict[str, object]]:
    driver = w.agents[host].driver
    here = [status.ref for status in driver.ports() if status.ref.mac == mac and status.state != "stub"]
    return [record for ref in here for table in driver.dump(ref, KIND) for record in table.records or ()]


def test_a_document_from_a_file_and_wrong_ones(play, tmp_path: Path) -> None:  # noqa: F811
    async def scenario(w: World, shell: Shell) -> None:
        file = tmp_path / "floating.yaml"
        file.write_text("rules:\n  - {outside: 203.0.113.7, inside: 192.0.2.9}\n")
        await shell("port", "set", f"{VM}/{MACS[1]}", KIND, "-f", str(file))
        known = {p.mac: dict(p.kinds) for p in w.cluster.store.catalog.ports.values()}
        assert (known[MACS[0]], json.loads(known[MACS[1]][KIND])) == ({}, FLOATING)
        said = await shell("port", "set", VM, KIND, "-f", str(file), code=3)
        assert f"{VM}/{MACS[0]}: {KIND}: outside address 203.0.113.7 of network blue is port {VM}/{MACS[1]}'s" in said
        for arguments, words in (
            ((KIND,), "expected a document"),
            (("fdb", "{}"), "no kind 'fdb'"),
            ((KIND, "rules: 7"), "rules"),
            ((KIND, "--file", "/no/such"), "/no/such"),
            ((KIND, "a: 1\n---\nb: 2"), "expected one document"),
        ):
            assert words in await shell("port", "set", VM, *arguments, code=3)

    play(scenario)


def test_a_host_without_the_kind_is_named(tmp_path: Path) -> None:
    async def test(bench, a, b) -> None:  # noqa: ARG001
        objects = scripted.configuration()
        objects.ports[0].kinds[KIND] = json.dumps(FLOATING)
        await refused(bench.stub.Apply(pb.ApplyRequest(config=objects)), ConfigInvalid, f"no state of kind {KIND}")

    scenario(tmp_path, test)


def test_an_operator_declares_them_at_ports_of_a_hypervisor(tmp_path: Path) -> None:
    async def test(bench, a, b) -> None:  # noqa: ARG001
        await declare(bench, "h1", port())
        (known,) = (await bench.stub.Show(pb.Empty())).ports
        known.kinds[KIND] = json.dumps(FLOATING)
        bench.cluster.store.catalog.hosts["h1"].kinds[KIND] = 1
        await bench.stub.Apply(pb.ApplyRequest(config=pb.Config(ports=[known])))
        await declare(bench, "h1", port(learning=True))
        (after,) = (await bench.stub.Show(pb.Empty())).ports
        assert (json.loads(after.kinds[KIND]), after.learning) == (FLOATING, True)

    scenario(tmp_path, test)


def test_a_need_names_only_what_is_declared() -> None:
    with dummy_host() as host:
        ref = host.stage(1)
        assert KIND not in host.driver.describe([ref]).kinds
        host.driver.load(ref, Table(KIND, records=[RECORD]))
        need = host.driver.describe([PortRef(ref.vm, ref.mac, ref.epoch)])
        assert (need.kinds[KIND], need.configured) == (1, {KIND: [RECORD]})


@pytest.fixture(autouse=True)
def _quiet():
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()
