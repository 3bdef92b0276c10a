"""Ports that agents declare: the exact set, where the hypervisor runs the VM, and nowhere twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.rpc import received
from migrator.errors import AlreadyMigrating, ConfigInvalid, PreflightFailed
from tests.unit.pair import eventually
from tests.unit.scripted import MAC, VM, Agent, Bench

OTHER_VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2aff"
SECOND = "52:54:00:12:34:57"


class Hypervised(Agent):
    """An agent whose hypervisor says `guest` of every VM."""

    guest = ""

    def _answer(self, request: int, name: str) -> None:
        if name == "guest":
            self.say(reply=pb.Reply(request=request, guest=self.guest))
        else:
            super()._answer(request, name)


def port(mac: str = MAC, **fields: object) -> pb.Port:
    body = {"vm": VM, "mac": mac, "network": "blue", "device": "t{mac6}", "policy": "web", "name": "shop"}
    return pb.Port(**{**body, "declared_by": "libvirt", **fields})  # type: ignore[arg-type]


async def declare(bench: Bench, host: str, *ports: pb.Port, vm: str = VM) -> pb.ApplyReply:
    return await bench.stub.Declare(pb.DeclareRequest(host=host, vm=vm, ports=ports))


async def refused(call: Awaitable[object], kind: type[Error], words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = received(caught.value, "coordinator")
    assert type(error) is kind and words in str(error), error


async def ports_of(bench: Bench) -> dict[str, pb.Port]:
    return {one.mac: one for one in (await bench.stub.Show(pb.Empty())).ports}


def scenario(folder: Path, test: Callable[[Bench, Hypervised, Hypervised], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Bench(folder) as bench:
            a, b = Hypervised("h1"), Hypervised("h2")
            await bench.attach(a, b)
            objects = pb.Config(
                networks=[pb.Network(name="blue", kind="uplink", vlan=7), pb.Network(name="red", kind="local")],
                policies=[pb.Policy(name="web")],
            )
            await bench.stub.Apply(pb.ApplyRequest(config=objects))
            await test(bench, a, b)

    asyncio.run(main())


def test_a_new_vm_is_opened_told_and_repeating_it_is_nothing(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        reply = await declare(bench, "h1", port(), port(SECOND))
        assert [line.split(": ")[1] for line in reply.changed] == ["added", "added"]
        await a.hear("port", 2)
        orders = [m.port for m in a.heard if m.WhichOneof("message") == "port"]
        assert {(o.port.mac, o.epoch, o.port.host) for o in orders} == {(MAC, 1, "h1"), (SECOND, 1, "h1")}
        assert len((await b.hear("places")).places) == 2
        revision, heard = reply.revision, len(a.heard)
        again = await declare(bench, "h1", port(), port(SECOND))
        assert (list(again.changed), again.revision) == ([], revision)
        assert len(a.heard) == heard

    scenario(tmp_path, test)


def test_the_set_is_exact(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        await declare(bench, "h1", port())
        await declare(bench, "h1", port(SECOND, policy=""))
        found = await ports_of(bench)
        assert list(found) == [SECOND] and found[SECOND].policy == ""
        removal = await a.hear("remove")
        assert (removal.vm, removal.mac, removal.epoch) == (VM, MAC, 1)
        gone = await b.until(lambda: [p for m in b.heard for p in m.places.removed])
        assert [(p.network, p.mac) for p in gone] == [("blue", MAC)]
        await declare(bench, "h1")
        assert (await a.hear("remove", 2)).mac == SECOND and not await ports_of(bench)

    scenario(tmp_path, test)


def test_a_port_of_another_network_is_a_new_one(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        del b
        await declare(bench, "h1", port())
        await declare(bench, "h1", port(network="red"))
        order = await a.hear("port", 2)
        assert (order.port.network, order.epoch) == ("red", 2)
        names = [name for name in a.names() if name in ("port", "remove")]
        assert names == ["port", "remove", "port"], "the old one ends before the new one begins"

    scenario(tmp_path, test)


def test_a_port_with_another_device_is_a_new_machines(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        del b
        await declare(bench, "h1", port(devices={"h1": "vnet3"}))
        await declare(bench, "h1", port(devices={"h1": "vnet4"}))
        order = await a.hear("port", 2)
        assert (order.device, order.epoch) == ("vnet4", 2) and "remove" in a.names()
        assert not (await declare(bench, "h1", port(devices={"h1": "vnet4"}))).warnings
        await declare(bench, "h1", port(device="vnet4"))
        assert (await a.hear("port", 3)).epoch == 2, "only said otherwise"

    scenario(tmp_path, test)


def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        del a, b
        await declare(bench, "h1", port())
        revision = (await bench.stub.Show(pb.Empty())).revision
        for ports, words in [
            ([port(network="nowhere")], "no network nowhere"),
            ([port(SECOND, policy="none")], "no policy none"),
            ([port(), port()], "same MAC"),
            ([port(declared_by="")], "cannot be declared with"),
            ([port(vm=OTHER_VM)], "cannot be declared with"),
            ([port(device="")], "no device on host h1"),
        ]:
            await refused(declare(bench, "h1", *ports), ConfigInvalid, words)
        taken = declare(bench, "h1", port(vm=OTHER_VM, name="other"), vm=OTHER_VM)
        await refused(taken, ConfigInvalid, "is in its network already")
        assert (await bench.stub.Show(pb.Empty())).revision == revision

    scenario(tmp_path, test)


def test_a_vm_that_was_shut_down_and_started_elsewhere_comes_there(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        await declare(bench, "h1", port(), port(SECOND))
        a.guest = "gone"
        await declare(bench, "h2", port())
        found = await ports_of(bench)
        assert list(found) == [MAC] and found[MAC].host == "h2"
        removals = [(await a.hear("remove", 2)) and m.remove for m in a.heard if m.WhichOneof("message") == "remove"]
        assert {(r.mac, r.epoch) for r in removals} == {(MAC, 1), (SECOND, 1)}
        order = await b.hear("port")
        assert (order.port.mac, order.epoch, order.port.host) == (MAC, 2, "h2")
        await declare(bench, "h1")  # a late word of the old host
        assert (await ports_of(bench))[MAC].host == "h2"

    scenario(tmp_path, test)


@pytest.mark.parametrize("said", ["running", "paused", ""])
def test_a_vm_that_may_run_elsewhere_is_refused_with_both_hosts_named(tmp_path: Path, said: str) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        await declare(bench, "h1", port())
        a.guest = said
        await refused(declare(bench, "h2", port()), PreflightFailed, "is at h1, it cannot be declared at h2")
        assert (await ports_of(bench))[MAC].host == "h1" and "port" not in b.names()

    scenario(tmp_path, test)


def test_a_host_that_is_away_is_asked_for_and_one_that_is_forgotten_is_not(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        await declare(bench, "h1", port())
        a.stop()
        await eventually(lambda: bench.cluster.roster.get("h1") is None)
        await refused(declare(bench, "h2", port()), PreflightFailed, "agent is not connected")
        await bench.stub.Remove(pb.Removal(sort="host", name="h1"))
        await declare(bench, "h2", port())
        assert (await b.hear("port")).epoch == 2
        left = pb.Instance(vm=VM, mac=MAC, epoch=1, state="active")
        back = Hypervised("h1", instances=[left])
        await bench.attach(back)
        removal = await back.hear("remove")
        assert (removal.vm, removal.mac, removal.epoch) == (VM, MAC, 1)

    scenario(tmp_path, test)


def test_during_a_move_the_set_stays_and_the_destination_is_not_listened_to(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        del b
        await declare(bench, "h1", port())
        a.silent = {"describe"}
        report = await bench.begin_migration()
        await a.hear("describe")
        assert not (await declare(bench, "h2", port(SECOND))).changed
        assert not (await declare(bench, "h2")).changed
        assert not (await declare(bench, "h1", port())).changed
        await refused(declare(bench, "h1", port(policy="")), AlreadyMigrating, "is being moved")
        await refused(declare(bench, "h1"), AlreadyMigrating, "is being moved")
        await refused(declare(bench, "h3", port()), AlreadyMigrating, "is being moved")
        assert list(await ports_of(bench)) == [MAC]
        await bench.stub.Abort(pb.MigrationRef(id=report.id))

    scenario(tmp_path, test)


def test_the_hypervisors_word_stands_against_the_operators(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        del b
        await bench.stub.Apply(pb.ApplyRequest(config=pb.Config(ports=[port(host="h1", declared_by="")])))
        reply = await declare(bench, "h1", port(policy="", learning=True))
        assert any("an operator's so far" in line for line in reply.warnings)
        known = (await ports_of(bench))[MAC]
        assert (known.declared_by, known.policy, known.learning) == ("libvirt", "", True)
        for changed in (port(policy="web"), port(policy="", declared_by="")):
            call = bench.stub.Apply(pb.ApplyRequest(config=pb.Config(ports=[changed])))
            await refused(call, ConfigInvalid, "edit the metadata of domain shop on h1")
        call = bench.stub.Remove(pb.Removal(sort="port", name=f"{VM}/{MAC}"))
        await refused(call, ConfigInvalid, "edit the metadata of domain shop on h1")
        known.learning = False  # that is the operator's
        await bench.stub.Apply(pb.ApplyRequest(config=pb.Config(ports=[known])))
        assert not (await a.hear("port", 3)).port.learning
        assert not (await declare(bench, "h1", port(policy=""))).changed

    scenario(tmp_path, test)


def test_an_operators_port_of_the_same_vm_stays(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        del a, b
        await bench.stub.Apply(pb.ApplyRequest(config=pb.Config(ports=[port(SECOND, host="h1", declared_by="")])))
        call = bench.stub.Apply(pb.ApplyRequest(config=pb.Config(ports=[port(host="h1")])))
        await refused(call, ConfigInvalid, "declared_by is not for operators")
        await declare(bench, "h1", port())
        await declare(bench, "h1")
        assert list(await ports_of(bench)) == [SECOND]

    scenario(tmp_path, test)


def test_a_name_that_is_taken_refuses_no_start(tmp_path: Path) -> None:
    async def test(bench: Bench, a: Hypervised, b: Hypervised) -> None:
        del a, b
        await declare(bench, "h1", port())
        reply = await declare(bench, "h2", port(SECOND, vm=OTHER_VM), vm=OTHER_VM)
        assert any(f"shop is VM {VM}'s" in line for line in reply.warnings)
        assert (await ports_of(bench))[SECOND].name == ""

    scenario(tmp_path, test)


def test_rules_that_an_older_agent_would_read_as_wider_are_refused(tmp_path: Path) -> None:
    async def test(bench: Bench, _: Hypervised, __: Hypervised) -> None:
        kinds = bench.cluster.store.catalog.hosts["h1"].kinds
        kinds["acl"] = 1
        await declare(bench, "h1", port())
        rule = pb.Rule(direction="to", priority=1, protocol="any", action="allow", label="0x1/0x1")
        wanted = pb.ApplyRequest(config=pb.Config(policies=[pb.Policy(name="web", rules=[rule])]))
        await refused(bench.stub.Apply(wanted), ConfigInvalid, "the agent of h1")
        await refused(bench.stub.Apply(wanted), ConfigInvalid, "knows no rules with label")
        assert not (await bench.stub.Show(pb.Empty())).policies[0].rules
        kinds["acl"] = 2
        await bench.stub.Apply(wanted)
        kinds["acl"] = 1
        await refused(declare(bench, "h1", port(), port(SECOND)), ConfigInvalid, "knows no rules with label")

    scenario(tmp_path, test)
