"""What the operator's command asks of an agent on its unix socket, and its configuration file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from datapath.drivers.dummy import DummyDriver
from datapath.state.kind import Op, Table
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.config import read_config
from migrator.agent.daemon import Agent
from migrator.coordinator.rpc import received
from migrator.errors import ConfigInvalid
from migrator.snapshot import decode_section
from tests.unit.pair import MACS, VM, Side, World, connections, eventually, world


async def chunks(data: bytes, head: pb.RestoreHead | None = None) -> AsyncIterator[pb.RestoreChunk]:
    yield pb.RestoreChunk(head=head or pb.RestoreHead())
    for start in range(0, len(data), 1000):
        yield pb.RestoreChunk(data=data[start : start + 1000])


def scenario(tmp_path: Path, test: Any) -> None:
    async def run() -> None:
        async with world(tmp_path, "a") as w:
            async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'a.sock'}") as channel:
                stub: Any = rpc.AgentStub(channel)  # type: ignore[no-untyped-call]
                await test(w, stub)

    asyncio.run(run())


def test_status_and_ports(tmp_path: Path) -> None:
    async def test(w: World, stub: Any) -> None:
        w.fill("a", 3)
        status = await stub.Status(pb.Empty())
        assert (status.host, status.driver, status.coordinator, status.ports) == ("a", "dummy", True, 2)
        assert list(status.networks) == ["blue"]
        ports = (await stub.Ports(pb.Empty())).ports
        assert [(p.instance.mac, p.instance.state, p.network, p.policy) for p in ports] == [
            (mac, "active", "blue", "web") for mac in MACS
        ]
        assert [p.connections for p in ports] == [3, 3]
        assert ports[0].guest == "running"
        assert (tmp_path / "a.sock").stat().st_mode & 0o777 == 0o600

    scenario(tmp_path, test)


def test_a_kind_is_dumped_as_sections(tmp_path: Path) -> None:
    async def test(w: World, stub: Any) -> None:
        w.fill("a", 5)
        sections = [decode_section(chunk.data) async for chunk in stub.Dump(pb.VmRequest(vm=VM, kind="conntrack"))]
        assert [(section.port, section.count) for section in sections] == [(mac, 5) for mac in MACS]
        for request, code in [
            (pb.VmRequest(vm=VM, kind="no-such"), grpc.StatusCode.UNIMPLEMENTED),
            (pb.VmRequest(vm="no-such", kind="conntrack"), grpc.StatusCode.NOT_FOUND),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Dump(request):
                    pass
            assert caught.value.code() is code
            assert received(caught.value, "agent").hint

    scenario(tmp_path, test)


def test_a_checkpoint_is_restored_over_what_is_here(tmp_path: Path) -> None:
    async def test(w: World, stub: Any) -> None:
        w.fill("a", 100)
        before, refs = w.connections("a"), w.active("a")
        data = b"".join([chunk.data async for chunk in stub.Checkpoint(pb.VmRequest(vm=VM))])
        for ref in refs:
            w.driver("a").load(ref, Table("conntrack", columns=connections(7, seed=5000)))
        assert w.connections("a") != before
        reply = await stub.Restore(chunks(data))
        assert reply.loaded["conntrack"] == 200
        assert w.connections("a") == before
        assert w.active("a") == refs

    scenario(tmp_path, test)


def test_a_rule_that_was_withdrawn_does_not_come_back_from_a_file(tmp_path: Path) -> None:
    """The snapshot's connections do, under the policy as it is now, which is in force before the ports open."""

    async def test(w: World, stub: Any) -> None:
        w.fill("a", 10)
        driver, refs, before = w.driver("a"), w.active("a"), w.connections("a")
        rule = {"direction": "to", "protocol": "tcp", "remote": [], "ports": [], "icmp": [], "log": False}
        for ref in refs:
            old = {**rule, "id": 901, "priority": 1, "action": "allow"}
            driver.load(ref, Table("acl", records=[old]))
        data = b"".join([chunk.data async for chunk in stub.Checkpoint(pb.VmRequest(vm=VM))])
        for ref in refs:
            driver.load(ref, Table("acl", Op.DELETE, records=[{"id": 901}]))
            driver.load(ref, Table("acl", records=[{**rule, "id": 902, "priority": 2, "action": "drop"}]))
            driver.update(ref, {**driver.port(ref).record, "policy": "newer", "revision": 1000})
        await stub.Restore(chunks(data))
        assert w.connections("a") == before
        for ref in refs:
            tables = [table for table in driver.dump(ref, "acl") if table.op is Op.LOAD]
            ids = {record["id"] for table in tables for record in table.records or ()}
            assert 902 in ids and 901 not in ids
            assert (driver.port(ref).record["policy"], driver.port(ref).record["revision"]) == ("newer", 1000)

    scenario(tmp_path, test)


def test_a_damaged_snapshot_changes_nothing(tmp_path: Path) -> None:
    async def test(w: World, stub: Any) -> None:
        w.fill("a", 100)
        before, refs = w.connections("a"), w.active("a")
        data = b"".join([chunk.data async for chunk in stub.Checkpoint(pb.VmRequest(vm=VM))])
        for bad in (data[:-20], data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], b""):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Restore(chunks(bad))
            assert caught.value.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.FAILED_PRECONDITION)
        assert (w.connections("a"), w.active("a")) == (before, refs)

    scenario(tmp_path, test)


def test_a_trace_is_on_while_somebody_looks(tmp_path: Path) -> None:
    async def test(w: World, stub: Any) -> None:
        ref = w.active("a")[0]
        port = w.driver("a").switch.ports[ref]
        call = stub.Trace(pb.TraceRequest(vm=VM, mac=ref.mac))
        await eventually(lambda: port.trace)
        frame = bytes(10) + b"\xff" * 6 + bytes.fromhex(ref.mac.replace(":", "")) + b"\x08\x00" + bytes(46)
        w.driver("a").inject(ref, [frame], judged=False)
        event = await asyncio.wait_for(call.read(), 3)
        assert (event.mac, event.direction, event.length) == (ref.mac, "from", len(frame))
        call.cancel()
        await eventually(lambda: not port.trace)

    scenario(tmp_path, test)


def test_remains_are_those_of_the_switch(tmp_path: Path) -> None:
    async def test(w: World, stub: Any) -> None:
        remains = (await stub.Remains(pb.Empty())).remains
        assert {sort: list(names.names) for sort, names in remains.items()} == {
            sort: list(names) for sort, names in w.driver("a").remains().items()
        }

    scenario(tmp_path, test)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[agent]\n", "agent.host"),
        ('[agent]\nhost = "a"\nport = 1\n', "agent.port"),
        ('[agent]\nhost = "a"\n[migration]\nstep_s = -1\n', "migration.step_s"),
        ("[agent\n", "TOML"),
    ],
)
def test_a_bad_configuration_names_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(text)
    with pytest.raises(ConfigInvalid, match=said) as caught:
        read_config(file)
    assert str(file) in str(caught.value)


def test_driver_options_stand_beside_its_name(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(
        '[agent]\nhost = "a"\nlisten = "[::1]:0"\n'
        '[driver]\nname = "dummy"\nfabric = "x"\n[driver.options]\nports_max = 3\n'
    )
    config = read_config(file)
    assert (config.driver.name, config.driver.all_options) == ("dummy", {"ports_max": 3, "fabric": "x"})
    with pytest.raises(ConfigInvalid, match="no-such"):
        read_config(tmp_path / "no-such.toml")


def test_a_second_agent_of_the_host_leaves_the_first_one_alone(tmp_path: Path) -> None:
    async def test(w: World, stub: Any) -> None:
        first = w.agents["a"]
        second = Agent(first.config, driver=DummyDriver(), guests=Side(w.hypervisor, "a"))
        with pytest.raises(ConfigInvalid, match=r"agent\.listen"):
            try:
                await second.start()
            finally:
                await second.stop()
        assert (await stub.Status(pb.Empty())).ports == 2

    scenario(tmp_path, test)


def test_an_agent_that_does_not_know_a_call_is_named_as_older(tmp_path: Path) -> None:
    async def test(w: World, _: Any) -> None:
        async with grpc.aio.insecure_channel(f"unix:{w.directory / 'a.sock'}") as channel:
            newer = channel.unary_unary("/migrator.v1.Agent/Newer")
            with pytest.raises(grpc.RpcError) as caught:
                await newer(b"")
        error = received(caught.value, "agent at a.sock")
        assert str(error) == "agent at a.sock does not know this call: its version is older (upgrade it first)"

    scenario(tmp_path, test)
