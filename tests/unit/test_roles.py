# SPDX-License-Identifier: GPL-2.0-only
"""Who may call what: the table against the services, every role at every method, agents that go beyond their host."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.source import SourceEnd
from migrator.agent.stream import PeerStream
from migrator.coordinator import rpc as reporting
from migrator.coordinator.rpc import received
from migrator.errors import Forbidden, PeerLost, ResourceExhausted
from migrator.lifecycle.machine import Role as End
from migrator.security import authority
from migrator.security.guard import Guard
from migrator.security.identity import ANYONE, ROOT, Identity, Role
from migrator.security.limits import Limits, Meter
from migrator.security.roles import METHODS, require_role
from migrator.security.settings import folder
from migrator.security.transport import PLAIN, Transport

from .certified import OPTIONS, TIMEOUT_S, refusal
from .pair import VM, World, eventually, world

TREE = Path(__file__).parents[2]
SERVICES = pb.DESCRIPTOR.services_by_name.values()
ALL = {f"{service.name}/{method.name}": method for service in SERVICES for method in service.methods}
CLIENTS = [role for role in Role if role is not Role.ANYONE]


def test_every_method_has_a_row_and_no_other_has() -> None:
    assert set(METHODS) == set(ALL)
    assert all(roles for roles, _ in METHODS.values())
    assert not any(Role.COORDINATOR in roles for roles, _ in METHODS.values()), "it calls nobody"
    for method, (roles, bound) in METHODS.items():
        assert bool(bound) == (Role.AGENT in roles), f"{method}: what an agent may do is bound to its host"


def test_the_documents_table_is_this_one() -> None:
    text = (TREE / "docs" / "security.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+/\w+)` \| ([^|]*) \|", text, flags=re.M))
    assert rows == {method: ", ".join(roles) for method, (roles, _) in METHODS.items()}


class Everything(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Every method of every service, answered with nothing."""

    def service(self, details: Any) -> Any:
        method = ALL.get(details.method.removeprefix("/migrator.v1."))
        if method is None:
            return None

        async def one(_: Any, __: Any) -> bytes:
            return b""

        async def several(_: Any, __: Any) -> AsyncIterator[bytes]:
            yield b""

        answer = several if method.server_streaming else one
        return getattr(grpc, f"{kind(method)}_rpc_method_handler")(answer)


def kind(method: Any) -> str:
    words = {False: "unary", True: "stream"}
    return f"{words[method.client_streaming]}_{words[method.server_streaming]}"


async def called(channel: Any, name: str) -> grpc.StatusCode:
    async def nothing() -> AsyncIterator[bytes]:
        yield b""

    method = ALL[name]
    call = getattr(channel, kind(method))(f"/migrator.v1.{name}")
    answer = call(nothing() if method.client_streaming else b"", timeout=TIMEOUT_S)
    try:
        if method.server_streaming:
            async for _ in answer:
                pass
        else:
            await answer
    except grpc.aio.AioRpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def test_every_role_may_call_what_its_row_says_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        ca = authority.create(tmp_path / "pki")
        for role in CLIENTS:
            ca.issue(Identity(role, "x"), tmp_path / role)
        serving = Transport(folder(tmp_path / "coordinator"))
        server = grpc.aio.server(interceptors=[Guard(serving)])
        server.add_generic_rpc_handlers((Everything(),))
        port = serving.listen(server, "127.0.0.1:0")
        await server.start()
        for role in (Role.AGENT, Role.OPERATOR, Role.VIEWER):
            client = Transport(folder(tmp_path / role))
            async with client.to_coordinator(f"127.0.0.1:{port}", OPTIONS) as channel:
                for name, (roles, _) in METHODS.items():
                    allowed = grpc.StatusCode.OK if role in roles else grpc.StatusCode.PERMISSION_DENIED
                    assert await called(channel, name) is allowed, (role, name)
        await server.stop(0)

    asyncio.run(scenario())


def test_a_method_without_a_row_is_nobodys() -> None:
    for identity in (ANYONE, *(Identity(role, "x") for role in CLIENTS)):
        with pytest.raises(Forbidden, match="nobody"):
            require_role(identity, "/migrator.v1.Coordinator/Shutdown")


def test_a_refusal_names_the_caller_is_counted_and_is_logged_once() -> None:
    async def scenario() -> None:
        server = grpc.aio.server(interceptors=[Guard(PLAIN, lambda _: Identity(Role.VIEWER, "refused-once"))])
        server.add_generic_rpc_handlers((Everything(),))
        path = f"unix-abstract:test-roles-{id(server)}"
        server.add_insecure_port(path)
        await server.start()
        async with grpc.aio.insecure_channel(path) as channel:
            for _ in range(5):
                assert await called(channel, "Coordinator/Apply") is grpc.StatusCode.PERMISSION_DENIED
        await server.stop(0)

    counted = reporting.REFUSED.labels("Forbidden")._value
    before = counted.get()
    with capture_logs() as logs:
        asyncio.run(scenario())
    assert counted.get() == before + 5
    said = [line for line in logs if "refused-once" in str(line)]
    assert len(said) == 1 and said[0]["log_level"] == "warning"
    assert "migrator://viewer/refused-once may not call Coordinator/Apply" in said[0]["message"]


# ---- agents beyond their host ----


def coordinator(w: World, role: str, name: str) -> Any:
    channel = Transport(w.tls(role, name)).to_coordinator(w.address, OPTIONS)
    w.stack.push_async_callback(channel.close)
    return rpc.CoordinatorStub(channel)  # type: ignore[no-untyped-call]


async def refused(call: Any, kind: type[Exception] = Forbidden, match: str = "") -> None:
    error = received(await refusal(call), "it")
    assert isinstance(error, kind) and re.search(match, str(error)), error


def run(tmp_path: Path, test: Any, **settings: Any) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b", "c", tls=True, **settings) as w:
            await test(w)

    asyncio.run(scenario())


def test_a_vm_moves_over_tls(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        w.fill("a", 1000)
        held = w.connections("a")
        assert (await w.finish(await w.migrate("b"))).outcome == "complete"
        assert w.connections("b") == held

    run(tmp_path, test)


def test_an_agent_speaks_for_no_other_host(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        stub = coordinator(w, "agent", "c")

        async def hello() -> AsyncIterator[pb.FromAgent]:
            yield pb.FromAgent(hello=pb.Hello(host="a", version="1"))

        await refused(stub.Attach(hello(), timeout=TIMEOUT_S), match="agent/c may not attach as host 'a'")
        await refused(stub.Declare(pb.DeclareRequest(host="a", vm=VM), timeout=TIMEOUT_S), match="declare ports")
        assert w.active("a") and (session := w.cluster.roster.get("a")) and session.open

    run(tmp_path, test)


def test_an_agent_orders_no_move_but_what_a_hypervisor_has_begun_to_it(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        async def not_leaving(vm: str) -> bool:  # noqa: ARG001
            return False

        stub = coordinator(w, "agent", "c")
        for order in (
            pb.MigrateRequest(vm=VM, to="c"),
            pb.MigrateRequest(vm=VM, to="b", ordered_elsewhere=True),
            pb.MigrateRequest(vm=VM, to="c", ordered_elsewhere=True, without_state=True),
            pb.MigrateRequest(vm=VM, to="c", ordered_elsewhere=True, dry_run=True),
        ):
            await refused(stub.Migrate(order, timeout=TIMEOUT_S))
        w.hypervisor.side("a").leaving = not_leaving  # type: ignore[method-assign]
        order = pb.MigrateRequest(vm=VM, to="c", ordered_elsewhere=True)
        last = [report async for report in stub.Migrate(order, timeout=TIMEOUT_S)][-1]
        assert last.outcome == "refused" and "not being moved out of a" in last.reason
        assert not w.statuses("c") and w.active("a")

    run(tmp_path, test)


async def under_way(w: World) -> tuple[str, pb.StartSource]:
    """A move from a to b that stays before its switchover, and its order."""
    w.hypervisor.converged = False
    migration = await w.migrate("b")
    await eventually(
        lambda: any(isinstance(e, SourceEnd) and str(e.state.phase) == "watching" for e in w.agents["a"].ends)
    )
    end = next(end for end in w.agents["a"].ends if end.role is End.SOURCE)
    return migration, end.order


def test_no_third_host_brings_state_with_a_stolen_token(tmp_path: Path) -> None:
    """It has seen everything that the order says. The move goes on as if it had not tried."""

    async def test(w: World) -> None:
        migration, order = await under_way(w)
        begin = pb.Begin(migration=migration, vm=VM, epoch=order.epoch, token=order.token)
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        heard: list[pb.FromDestination] = []
        stream = PeerStream(order, heard.append, ended.set_result, Transport(w.tls("agent", "c")))
        await stream.open(begin, 5.0)
        assert "agent/c may not bring VM" in await asyncio.wait_for(ended, TIMEOUT_S) and not heard
        await stream.close()
        async with Transport(w.tls("agent", "c")).to_agent(order.peer, "b", OPTIONS) as channel:
            stub: Any = rpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            query = pb.MoveQuery(migration=migration, vm=VM, epoch=order.epoch)
            await refused(stub.Ask(query, timeout=TIMEOUT_S), match="may not ask for VM")
        w.hypervisor.converged = True
        assert (await w.finish(migration)).outcome == "complete"

    run(tmp_path, test)


def test_state_goes_to_nobody_but_the_host_that_the_order_names(tmp_path: Path) -> None:
    """Another host has taken the destination's address: it gets not a byte, whatever its certificate is."""

    async def test(w: World) -> None:
        migration, order = await under_way(w)
        order.peer = w.agents["c"].peer
        stream = PeerStream(order, lambda _: None, lambda _: None, w.agents["a"].transport)
        with pytest.raises(PeerLost, match="with a certificate for its host"):
            await stream.open(pb.Begin(migration=migration, vm=VM, epoch=order.epoch, token=order.token), 1.0)
        await stream.close()

    run(tmp_path, test)


def test_no_third_host_commits_or_ends_a_move(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        migration, _ = await under_way(w)
        for word in ("committed", "opened", "aborted", "settled"):
            w.agents["c"].link.send(
                pb.FromAgent(progress=pb.Progress(migration=migration, role="destination", event=word))
            )
        stub = coordinator(w, "agent", "c")
        await refused(stub.Abort(pb.MigrationRef(id=migration), timeout=TIMEOUT_S), match="no part in")
        await refused(stub.Follow(pb.MigrationRef(id=migration), timeout=TIMEOUT_S), match="no part in")
        await refused(stub.Resolve(pb.ResolveRequest(id=migration, guest_at="c"), timeout=TIMEOUT_S))
        assert not (await stub.Migrations(pb.Empty(), timeout=TIMEOUT_S)).migrations
        own = coordinator(w, "agent", "b")
        listed = (await own.Migrations(pb.Empty(), timeout=TIMEOUT_S)).migrations
        assert [(one.id, one.phase) for one in listed] == [(migration, "authorised")]
        w.hypervisor.converged = True
        assert (await w.finish(migration)).outcome == "complete"

    run(tmp_path, test)


def test_an_order_and_a_stream_that_are_said_again_do_nothing(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        w.fill("a", 100)
        migration, order = await under_way(w)
        w.hypervisor.converged = True
        assert (await w.finish(migration)).outcome == "complete"
        await w.quiet()
        held = w.connections("b")
        begin = pb.Begin(migration=migration, vm=VM, epoch=order.epoch, token=order.token)
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stream = PeerStream(order, lambda _: None, ended.set_result, w.agents["a"].transport)
        await stream.open(begin, 5.0)
        assert "closed the stream" in await asyncio.wait_for(ended, TIMEOUT_S)
        await stream.close()
        said = received(
            await refusal(coordinator(w, "agent", "a").Abort(pb.MigrationRef(id=migration), timeout=TIMEOUT_S)), "it"
        )
        assert "has ended" in str(said) or "not in hand" in str(said) or "moved the VM already" in str(said), said
        assert w.connections("b") == held and len(w.active("b")) == 2 and not w.active("a")

    run(tmp_path, test)


def test_a_viewer_looks_and_changes_nothing(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        stub = coordinator(w, "viewer", "guest")
        assert (await stub.Show(pb.Empty(), timeout=TIMEOUT_S)).ports
        assert len((await stub.Hosts(pb.Empty(), timeout=TIMEOUT_S)).hosts) == 3
        await refused(
            stub.Migrate(pb.MigrateRequest(vm=VM, to="b"), timeout=TIMEOUT_S), match="viewer/guest may not call"
        )
        await refused(stub.Remove(pb.Removal(sort="host", name="c"), timeout=TIMEOUT_S))
        assert not (await stub.Migrations(pb.Empty(), timeout=TIMEOUT_S)).migrations

    run(tmp_path, test)


def test_a_source_that_moves_nothing_is_believed_by_no_destination(tmp_path: Path) -> None:
    """An agent of the cluster with a certificate, but without the coordinator's order."""

    async def test(w: World) -> None:
        for begin in (pb.Begin(), pb.Begin(migration="m", vm=VM, epoch=9, token=b"x" * 32)):
            async with Transport(w.tls("agent", "a")).to_agent(w.agents["b"].peer, "b", OPTIONS) as channel:
                stub: Any = rpc.PeerStub(channel)  # type: ignore[no-untyped-call]

                async def words(begin: pb.Begin = begin) -> AsyncIterator[pb.FromSource]:
                    yield pb.FromSource(begin=begin)
                    await asyncio.Event().wait()  # a word into a call that has ended would be gRPC's own error

                await refused(stub.Move(words(), timeout=TIMEOUT_S), match="no such migration is prepared")
        assert not w.statuses("b")

    run(tmp_path, test)


# ---- how much ----


def test_a_caller_has_its_rate_and_costs_no_other_theirs() -> None:
    now = [0.0]
    meter = Meter(Limits(rate=10, burst=3, calls=2), clock=lambda: now[0])
    one, other = Identity(Role.AGENT, "h1"), Identity(Role.AGENT, "h2")

    def call(identity: Identity) -> None:
        with meter.call(identity):
            pass

    for _ in range(3):
        call(one)
    with pytest.raises(ResourceExhausted, match=r"agent/h1 calls more than 10 times a second"):
        call(one)
    call(other)
    now[0] += 0.1
    call(one)
    with pytest.raises(ResourceExhausted):
        call(one)
    for _ in range(1000):
        call(ANYONE)
        call(ROOT)


def test_a_caller_has_so_many_calls_at_once() -> None:
    meter = Meter(Limits(rate=10, burst=100, calls=2))
    one = Identity(Role.OPERATOR, "x")
    with meter.call(one), meter.call(one):
        with pytest.raises(ResourceExhausted, match="2 calls under way"), meter.call(one):
            pass
    with meter.call(one):
        pass


def test_callers_beyond_number_are_forgotten_one_by_one() -> None:
    meter = Meter(Limits(burst=1, rate=0.001))
    for number in range(5000):
        with meter.call(Identity(Role.AGENT, f"h{number}")):
            pass
    assert len(meter._callers) <= 4096


def test_too_much_is_said_as_such_over_grpc(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        stub = coordinator(w, "viewer", "busy")
        guard_limits = Limits(rate=0.001, burst=2)
        server = grpc.aio.server(interceptors=[Guard(Transport(w.tls("coordinator", "c")), limits=guard_limits)])
        server.add_generic_rpc_handlers((Everything(),))
        port = Transport(w.tls("coordinator", "c")).listen(server, "127.0.0.1:0")
        await server.start()
        async with Transport(w.tls("viewer", "busy")).to_coordinator(f"127.0.0.1:{port}", OPTIONS) as channel:
            codes = [await called(channel, "Coordinator/Show") for _ in range(3)]
        assert codes == [grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED]
        await server.stop(0)
        assert (await stub.Show(pb.Empty(), timeout=TIMEOUT_S)).ports

    run(tmp_path, test)


@pytest.mark.parametrize("size", [65 << 20])
def test_a_message_that_is_too_large_is_refused_by_its_size(tmp_path: Path, size: int) -> None:
    async def test(w: World) -> None:
        stub = coordinator(w, "operator", "x")
        request = pb.ApplyRequest(config=pb.Config(networks=[pb.Network(name="x" * size)]))
        error = await refusal(stub.Apply(request, timeout=60))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(received(error, "it"), ResourceExhausted)

    run(tmp_path, test)
