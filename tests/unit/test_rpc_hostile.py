"""Every method of every service, called with messages of valid shape and hostile content, on real servers.

Whatever comes, the answer is a success or an error of ours, nothing breaks, and what was refused has changed nothing.
The methods are those of the descriptor: one that is added is called here, too.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from tests.contract.samples import MAC
from tests.unit.hostile_messages import changed, messages
from tests.unit.pair import MACS, VM, World, world

EXAMPLES = int(os.environ.get("RPC_EXAMPLES", "20"))
CALL_S = 20.0
ENDLESS_S = 0.05  # a stream that ends by itself never is read for so long
SETTLE_S = 0.02
REFUSALS = frozenset(grpc.StatusCode) - {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
ENDLESS = {"Watch", "Trace"}
OURSELVES = "Internal error from Core"
"""What grpc.aio says to its own caller who writes to a call that the server has ended: the answer is lost then."""
OTHER = "0b1d6a0e-94c1-4f0e-8d55-6a7a3d2f1c02"
SNAPSHOT = (Path(__file__).parents[1] / "fixtures" / "format1-none.mgs").read_bytes()
METHODS = [method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]


class Stage:
    """A cluster of two hosts in an event loop of its own, and what went wrong in it."""

    def __init__(self, directory: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.wrong: list[str] = []
        self.loop.set_exception_handler(lambda _, context: self.wrong.append(repr(context)))
        self.world: World = self.run(self.stack.enter_async_context(world(directory, "a", "b", guests="none")))
        self.channels: dict[str, Any] = {}

    def run(self, work: Any) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(CALL_S * 3):
                return await work

        return self.loop.run_until_complete(bounded())

    def channel(self, service: str) -> Any:
        addresses = {
            "Coordinator": self.world.address,
            "Peer": f"127.0.0.1:{self.world.port('b')}",
            "Agent": f"unix:{self.world.directory}/a.sock",
            "State": f"127.0.0.1:{self.world.port('a')}",
        }
        if service not in self.channels:
            self.channels[service] = grpc.aio.insecure_channel(addresses[service])
        return self.channels[service]

    def state(self) -> list[Any]:
        """All that a refused call must not change."""
        store = self.world.cluster.store
        ports = [
            (host, str(status.ref), status.state, status.gate, status.record)
            for host in self.world.agents
            for status in self.world.statuses(host)
        ]
        objects = {
            (sort, name): message.SerializeToString(deterministic=True)
            for sort, known in store.catalog.objects.items()
            for name, message in known.items()
            if sort != "host"
        }
        return [store.catalog.config(0).SerializeToString(deterministic=True), objects, sorted(ports, key=repr)]

    def settled(self) -> list[Any]:
        """The state once all that earlier calls began is over: migrations, orders to agents."""
        last: list[Any] = []

        async def settle() -> None:
            await self.world.quiet()
            while last[:1] != [self.state()]:
                last[:] = [self.state()]
                await asyncio.sleep(SETTLE_S)

        self.run(settle())
        return last

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close()
        await self.stack.aclose()

    def end(self) -> None:
        self.run(self.close())
        self.loop.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("rpc"))
    yield made
    made.end()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.end()


@pytest.fixture
def quiet(stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[object], None]]:
    """Fails for whatever was logged as an error, with what was sent."""
    with structlog.testing.capture_logs() as lines:

        def check(sent: object) -> None:
            broken = [line for line in lines if line["log_level"] in ("error", "critical") or line.get("exc_info")]
            logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
            found = [*map(repr, broken), *logged, *stage.wrong]
            lines.clear(), caplog.clear(), stage.wrong.clear()
            assert not found, f"{str(sent)[:2000]}\nbroke: {found[0][:2000]}"

        yield check


async def call(stage: Stage, method: MethodDescriptor, sent: Sequence[Message]) -> grpc.StatusCode:
    """The status of one call. An endless stream is cancelled after a moment, which counts as success."""
    service = method.containing_service
    kinds = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
    stub = getattr(stage.channel(service.name), "_".join(kinds))(
        f"/{service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )

    try:
        answer = stub(timeout=CALL_S) if method.client_streaming else stub(sent[0], timeout=CALL_S)
        if method.client_streaming:
            await _write(answer, sent)
        if not method.server_streaming:
            await answer
            return grpc.StatusCode.OK
        try:
            async with asyncio.timeout(ENDLESS_S if method.name in ENDLESS else CALL_S):
                async for _ in answer:
                    pass
        except TimeoutError:
            answer.cancel()
            assert method.name in ENDLESS, "no end of the answer"
    except grpc.aio.AioRpcError as error:
        if str(error.details()).startswith(OURSELVES):
            return grpc.StatusCode.CANCELLED
        return error.code()
    return grpc.StatusCode.OK


async def _write(answer: Any, sent: Sequence[Message]) -> None:
    """All messages, until the other side has ended the call: what it says then is read as its answer."""
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for message in sent:
            await answer.write(message)
        await answer.done_writing()


def sample() -> dict[str, list[list[Message]]]:
    """Calls that would succeed, by method: what is hostile in a part of one gets further than what is so in all."""
    rules = [pb.Rule(direction="to", action="reject", protocol="tcp", ports=["80"], remote=["@office"], priority=7)]
    port = pb.Port(vm=VM, mac="52:54:00:00:00:03", network="red", device="tap3", addresses=["10.2.0.3"], policy="shop")
    config = pb.Config(
        networks=[pb.Network(name="red", kind="overlay", vni=7)],
        address_sets=[pb.AddressSet(name="office", prefixes=["192.0.2.0/24", "2001:db8::/32"])],
        policies=[pb.Policy(name="shop", rules=rules)],
        ports=[port],
    )
    declared = pb.Port(vm=OTHER, mac="52:54:00:00:00:09", network="blue", device="tap9", declared_by="libvirt")
    hello = pb.FromAgent(hello=pb.Hello(host="x1", version="1", driver="dummy", underlay="10.0.0.9", peer="10.0.0.9:1"))
    news = [
        pb.FromAgent(places=pb.PlacesKnown(revision=1)),
        pb.FromAgent(progress=pb.Progress(migration="m", role="source", event="paused")),
        pb.FromAgent(guest=pb.GuestEvent(vm=VM, state="gone")),
        pb.FromAgent(redirect_idle=pb.RedirectIdle(vm=VM, epoch=1, idle_s=70)),
        pb.FromAgent(instance=pb.Instance(vm=VM, mac=MACS[0], epoch=1, state="active")),
        pb.FromAgent(reply=pb.Reply(request=1)),
    ]
    head = pb.RestoreChunk(head=pb.RestoreHead(devices={MAC: "tap0"}, epoch=3))
    return {
        "Apply": [[pb.ApplyRequest(config=config)]],
        "Remove": [[pb.Removal(sort="policy", name="shop")], [pb.Removal(sort="port", name=f"{VM}/{port.mac}")]],
        "Migrate": [
            [pb.MigrateRequest(vm=VM, to=to, timeout_s=5, dry_run=dry)] for to in "ab" for dry in (True, False)
        ],
        "Declare": [[pb.DeclareRequest(host="a", vm=OTHER, ports=[declared])], [pb.DeclareRequest(host="a", vm=OTHER)]],
        "Watch": [[pb.WatchRequest(from_revision=1, sorts=["port"])]],
        "Attach": [[hello, *news]],
        "Dump": [[pb.VmRequest(vm=VM, kind="acl")]],
        "Checkpoint": [[pb.VmRequest(vm=VM)]],
        "Restore": [[head, *(pb.RestoreChunk(data=data) for data in (SNAPSHOT[:100], SNAPSHOT[100:]))]],
        "Trace": [[pb.TraceRequest(vm=VM, mac=MACS[0])]],
    }


@st.composite
def calls(draw: st.DrawFn, method: MethodDescriptor) -> list[Message]:
    """What is sent in one call: one that would succeed with something changed in it, or anything."""
    known = sample().get(method.name)
    if known and draw(st.integers(0, 3)):
        sent = draw(st.sampled_from(known))
        place = draw(st.integers(0, len(sent) - 1))
        sent[place] = draw(changed(sent[place]))
        return sent
    if not method.client_streaming:
        return [draw(messages(method.input_type))]
    return draw(st.lists(messages(method.input_type), max_size=5))


OPTIONS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="RPC_EXAMPLES" not in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.containing_service.name}.{method.name}")
@OPTIONS
@given(data=st.data())
def test_any_message(stage: Stage, quiet: Callable[[object], None], method: MethodDescriptor, data: Any) -> None:
    sent = data.draw(calls(method))
    before = stage.settled()
    code = stage.run(call(stage, method, sent))
    quiet(sent)
    assert code is grpc.StatusCode.OK or code in REFUSALS, f"{code} for {str(sent)[:2000]}"
    if code is not grpc.StatusCode.OK and not method.client_streaming:
        after = stage.settled()
        assert after == before, f"{code}, and yet something has changed, for {str(sent)[:2000]}"
    quiet(sent)


def one(stage: Stage, name: str, *sent: Message) -> grpc.StatusCode:
    (method,) = (method for method in METHODS if method.name == name)
    status: grpc.StatusCode = stage.run(call(stage, method, list(sent)))
    return status


def policy(name: str, *numbers: int) -> pb.ApplyRequest:
    rules = [
        pb.Rule(id=number, direction="to", action="allow", protocol="any", priority=at)
        for at, number in enumerate(numbers)
    ]
    return pb.ApplyRequest(config=pb.Config(policies=[pb.Policy(name=name, rules=rules)]))


def test_who_takes_the_highest_rule_id_leaves_ids_for_others(fresh: Stage) -> None:
    """The next one did not fit its field: no rule without an id could be declared from then on."""
    assert one(fresh, "Apply", policy("last", (1 << 32) - 1)) is grpc.StatusCode.OK
    assert one(fresh, "Apply", policy("more", 0, 0)) is grpc.StatusCode.OK
    assert not fresh.wrong
    policies = fresh.world.cluster.store.catalog.policies
    ids = [rule.id for known in policies.values() for rule in known.rules]
    assert len(set(ids)) == len(ids) and min(ids) > 0


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e308])
def test_a_migration_has_a_time_that_timers_know(stage: Stage, seconds: float) -> None:
    """What is no number went into the event loop's heap of timers, which has no order with it."""
    where = stage.world.cluster.store.catalog.host_of(VM)
    request = pb.MigrateRequest(vm=VM, to="b" if where == "a" else "a", timeout_s=seconds)
    before = stage.settled()
    assert one(stage, "Migrate", request) is grpc.StatusCode.FAILED_PRECONDITION
    assert stage.settled() == before


@pytest.mark.parametrize("epoch", [1 << 32, (1 << 64) - 1])
def test_an_epoch_that_no_switch_has_restores_nothing(stage: Stage, epoch: int) -> None:
    """The ports that are there were gone by the time the switch could not write it down."""
    before = stage.settled()
    chunks = [pb.RestoreChunk(head=pb.RestoreHead(epoch=epoch)), pb.RestoreChunk(data=SNAPSHOT)]
    assert one(stage, "Restore", *chunks) is grpc.StatusCode.INVALID_ARGUMENT
    assert stage.settled() == before


def test_an_agents_epoch_that_no_switch_has_is_not_gone_on_from(fresh: Stage) -> None:
    """It did not fit the journal either: no port could be declared for the VM."""
    mine = pb.Instance(vm=OTHER, mac="52:54:00:00:00:77", epoch=(1 << 64) - 1, state="active")

    async def attached() -> None:
        stub = rpc.CoordinatorStub(fresh.channel("Coordinator"))  # type: ignore[no-untyped-call]
        agent = stub.Attach()
        await agent.write(pb.FromAgent(hello=pb.Hello(host="x2", instances=[mine])))
        await agent.read()
        port = pb.Port(vm=OTHER, mac=mine.mac, network="blue", device="tap7", host="x2")
        await stub.Apply(pb.ApplyRequest(config=pb.Config(ports=[port])))
        await stub.Remove(pb.Removal(sort="port", name=f"{OTHER}/{mine.mac}"))
        agent.cancel()

    fresh.run(attached())
    assert not fresh.wrong
