"""What a source says behind a Begin that is right: a host of the cluster that is broken, or somebody else's.

Whatever comes, the destination answers with an error of ours or goes on, commits nothing that did not come whole, and
the VM's next move is as any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from datapath.registry import KINDS
from datapath.state.kind import Op, Table
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.destination import DestinationEnd
from migrator.agent.stream import PeerStream
from migrator.snapshot import Tally, decode_section, encode_table
from migrator.snapshot.columns import columns_of
from tests.unit.pair import MACS, World, connections, eventually, world

MOST = (1 << 64) - 1
MOST32 = (1 << 32) - 1
EMPTY = pb.Empty()


def say(**field: Any) -> pb.FromSource:
    return pb.FromSource(**field)


def sealed(table: Table, mac: str = MACS[0], number: int = 0) -> list[bytes]:
    return list(encode_table(table, mac, number))


def entries(count: int, op: Op = Op.LOAD) -> Table:
    known, columns = columns_of(KINDS["conntrack"], op), connections(count)
    return Table("conntrack", op, columns={name: column for name, column in columns.items() if name in known})


def round_end(sections: Sequence[bytes], number: int = 0, **wrong: int) -> pb.FromSource:
    tally = Tally()
    for section in sections:
        tally.add_section(decode_section(section))
    return say(round_end=pb.RoundEnd(**{"round": number, "records": tally.records, "digest": tally.digest, **wrong}))


GOOD = sealed(entries(10))
SECTIONS = [say(section=section) for section in GOOD]
FINAL = say(final=pb.Final(round=0, records=0, digest=Tally().digest))
CASES = {
    "begin again": [say(begin=pb.Begin())],
    "nothing": [say()],
    "judged frames": [say(judged=b"\0" * 100)],
    "garbage": [say(section=b"\xff" * 1000)],
    "no section": [say(section=b"")],
    "half a section": [say(section=GOOD[0][: len(GOOD[0]) // 2])],
    "a section of another VM's port": [say(section=one) for one in sealed(entries(3), "02:00:00:00:ff:ff")],
    "a wrong count": [*SECTIONS, round_end(GOOD, records=MOST)],
    "a wrong digest": [*SECTIONS, round_end(GOOD, digest=MOST)],
    "a round of what did not come": [round_end(GOOD)],
    "a round twice": [*SECTIONS, round_end(GOOD), round_end(GOOD)],
    "the last number of a round": [*SECTIONS, round_end(GOOD, MOST32), round_end([], MOST32)],
    "rounds backwards": [round_end([], number) for number in (7, 3, 0)],
    "a wrong final": [*SECTIONS, say(final=pb.Final(round=MOST32, records=MOST, digest=MOST))],
    "accounting before the switchover": [say(section=one) for one in sealed(entries(3, Op.ACCOUNT))],
    "tables that nobody waits for": [say(section=one) for one in sealed(entries(3, Op.FILL))],
    "deletes of what is not here": [say(section=one) for one in sealed(entries(50, Op.DELETE))],
    "settled before the commit": [say(settle_end=EMPTY), say(settle_end=EMPTY)],
    "redirecting before the commit": [say(redirecting=EMPTY, passed_on={MACS[0]: MOST, "zz": MOST, "": 0})],
    "restarts without end": [say(restart=EMPTY)] * 50,
    "a restart behind the final": [FINAL, say(restart=EMPTY)],
    "sections behind the final": [FINAL, *SECTIONS, round_end(GOOD, 1), FINAL],
    "accounting behind the final": [FINAL, *(say(section=one) for one in sealed(entries(3, Op.ACCOUNT)))],
    "an abort behind the final": [FINAL, say(abort=pb.Abort(migration="x" * 5000, reason="\0" * 5000))],
    "aborts": [say(abort=pb.Abort())] * 3,
    "many rounds": [round_end([], number) for number in range(300)],
}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def pair(loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    entered = world(tmp_path_factory.mktemp("pair"), "a", "b", connect_s=60.0, step_s=20.0)
    yield loop.run_until_complete(entered.__aenter__())
    loop.run_until_complete(entered.__aexit__(None, None, None))


@pytest.mark.parametrize("messages", CASES.values(), ids=CASES.keys())
def test_a_source_that_lies_breaks_nothing(
    pair: World, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, messages: list[pb.FromSource]
) -> None:
    wrong: list[str] = []
    loop.set_exception_handler(lambda _, context: wrong.append(repr(context)))

    async def scenario() -> None:
        with monkeypatch.context() as patched, capture_logs() as said:
            patched.setattr(PeerStream, "open", _never)
            migration = await pair.migrate("b")
            end = await _staged(pair)
            async with _lying(pair, end, messages):
                pass
            pair.cluster.migrations.abort(migration)
            assert (await pair.finish(migration, 30.0)).outcome != "complete"
            await eventually(lambda: not any(list(agent.ends) for agent in pair.agents.values()), 30.0)
        assert [line for line in said if line["event"] == "broken"] == []
        assert pair.hypervisor.place == "a" and len(pair.active("a")) == len(MACS)
        assert pair.statuses("b") == []

    loop.run_until_complete(asyncio.wait_for(scenario(), 100.0))
    assert wrong == []


def test_the_next_move_is_as_any_other(pair: World, loop: asyncio.AbstractEventLoop) -> None:
    """Behind all of those above."""
    pair.fill("a", 100)

    async def scenario() -> None:
        assert (await pair.finish(await pair.migrate("b"), 30.0)).outcome == "complete"

    loop.run_until_complete(asyncio.wait_for(scenario(), 60.0))
    assert len(pair.active("b")) == len(MACS)


async def _never(*_: Any) -> None:
    await asyncio.Event().wait()


async def _staged(pair: World) -> DestinationEnd:
    found: list[DestinationEnd] = []

    def staged() -> bool:
        found[:] = [e for e in pair.agents["b"].ends if isinstance(e, DestinationEnd) and e.state.phase == "staged"]
        return bool(found)

    await eventually(staged, 30.0)
    return found[0]


@asynccontextmanager
async def _lying(pair: World, end: DestinationEnd, messages: Sequence[pb.FromSource]) -> AsyncIterator[None]:
    """Send all of them as the source, and read what comes until the destination ends the stream, or has answered."""
    begin = pb.Begin(migration=end.order.migration, vm=end.vm, epoch=end.order.epoch, token=end.order.token)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{pair.port('b')}") as channel:
        call: Any = rpc.PeerStub(channel).Move()  # type: ignore[no-untyped-call]
        try:
            for message in (say(begin=begin), *messages):
                await call.write(message)
            await call.done_writing()
            async with asyncio.timeout(30.0):
                async for _ in call:
                    pass
        except grpc.aio.AioRpcError as error:
            assert error.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), error.details()
        yield
