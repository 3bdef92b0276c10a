"""The service Agent on the local unix socket: what the operator's command asks of this host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from datapath.errors import PortNotFound, UnsupportedKind
from datapath.provider import PortRef, PortState, PortStatus
from migrator import protocol
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.relabelling import Relabelling
from migrator.agent.restoring import replace
from migrator.checkpoint import Restored, checkpoint
from migrator.coordinator.rpc import reported
from migrator.errors import AlreadyMigrating, ConfigInvalid, Corrupt
from migrator.snapshot import encode_table

if TYPE_CHECKING:
    from migrator.agent.daemon import Agent

CHUNK_BYTES = 1 << 20
EPOCH_MAX = (1 << 32) - 1  # half a word of the switch
SHOWN = frozenset({PortState.ACTIVE, PortState.QUIESCED, PortState.STAGED})


def port_status(agent: Agent, status: PortStatus) -> pb.PortStatus:
    """A port of this host's switch as people see it."""
    guest = agent.guests.state(status.ref.vm)
    return pb.PortStatus(
        instance=agent.instance(status),
        device=status.device,
        network=str(status.record.get("network", "")),
        gate=status.gate,
        addresses=status.record.get("addresses", ()),
        policy=str(status.record.get("policy", "")),
        connections=status.connections,
        connections_max=int(status.record.get("connections_max", 0)),
        counters=dict(status.counters),
        drops=dict(status.drops),
        held_to=status.held_to,
        held_from=status.held_from,
        guest=str(guest) if guest else "",
    )


async def refs_of(agent: Agent, vm: str) -> list[PortRef]:
    """The VM's ports here that have tables: of several epochs the one that runs. Raises PortNotFound."""
    statuses = await asyncio.to_thread(agent.driver.ports, vm)
    found = [s.ref for s in statuses if s.state is PortState.ACTIVE]
    found = found or [s.ref for s in statuses if s.state in SHOWN]
    if not found:
        raise PortNotFound(f"VM {vm} has no port on {agent.host}", hint="migrator vm show tells where it is")
    newest = {ref.mac: ref for ref in sorted(found)}  # a port that was added later has a later epoch
    return sorted(newest.values())


async def checkpoint_of(agent: Agent, vm: str) -> AsyncIterator[bytes]:
    """A snapshot of the VM's ports here, object by object. Raises PortNotFound."""
    refs = await refs_of(agent, vm)
    objects = await agent.around.call(vm, lambda: checkpoint(agent.driver, refs, agent.host))
    while (data := await agent.around.call(vm, next, objects, None)) is not None:
        yield data


async def restore_of(agent: Agent, path: Path, devices: Mapping[str, str], epoch: int) -> Restored:
    """A snapshot in place of what is here of its VM.

    Raises SnapshotError, ConfigInvalid (epoch), AlreadyMigrating, PreflightFailed.
    """
    if not 0 <= epoch <= EPOCH_MAX:
        raise ConfigInvalid(f"epoch: expected 0 to {EPOCH_MAX}, not {epoch}")
    plan = await asyncio.to_thread(replace, agent.driver, path, agent.store.sync())
    if agent.ends.in_hand(plan.vm):
        raise AlreadyMigrating(f"VM {plan.vm} is being moved", hint="restore it afterwards")
    return await agent.around.call(plan.vm, plan.carry_out, dict(devices), epoch)


class AgentService(rpc.AgentServicer):
    """See proto/migrator/v1/migrator.proto."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._relabelling = asyncio.Lock()  # who changes some bits of a label has read the others before

    async def Status(self, request: pb.Empty, context: Any) -> pb.AgentStatus:  # noqa: N802, ARG002
        async with reported(context):
            agent = self._agent
            statuses = await asyncio.to_thread(agent.driver.ports)
            networks = await asyncio.to_thread(agent.driver.networks)
            hello = await agent.hello()
            return pb.AgentStatus(
                host=agent.host,
                version=hello.version,
                protocol=protocol.text(hello.protocol),
                layout=hello.layout,
                driver=agent.driver.name,
                coordinator=agent.link.connected,
                ports=len(statuses),
                networks=sorted(network.name for network in networks),
                gauges={
                    "migrations": sum(1 for _ in agent.ends),
                    "connections": sum(status.connections for status in statuses),
                    **{f"ports_{state}": sum(s.state is state for s in statuses) for state in PortState},
                },
            )

    async def Ports(self, request: pb.Empty, context: Any) -> pb.PortStatusList:  # noqa: N802, ARG002
        async with reported(context):
            statuses = await asyncio.to_thread(self._agent.driver.ports)
            return pb.PortStatusList(ports=[port_status(self._agent, status) for status in statuses])

    async def Dump(self, request: pb.VmRequest, context: Any) -> AsyncIterator[pb.Chunk]:  # noqa: N802
        async with reported(context):
            if request.kind not in self._agent.driver.kinds():
                held = ", ".join(self._agent.driver.kinds())
                raise UnsupportedKind(f"kind {request.kind!r} is not held here", hint=f"held: {held}")
            for ref in await refs_of(self._agent, request.vm):
                tables = self._agent.driver.dump(ref, request.kind)
                while (table := await self._agent.around.call(request.vm, next, tables, None)) is not None:
                    for section in encode_table(table, ref.mac):
                        yield pb.Chunk(data=section)

    async def Checkpoint(self, request: pb.VmRequest, context: Any) -> AsyncIterator[pb.Chunk]:  # noqa: N802
        async with reported(context):
            async for data in checkpoint_of(self._agent, request.vm):
                for start in range(0, len(data), CHUNK_BYTES):
                    yield pb.Chunk(data=data[start : start + CHUNK_BYTES])

    async def Restore(  # noqa: N802
        self, requests: AsyncIterator[pb.RestoreChunk], context: Any
    ) -> pb.RestoreReply:
        async with reported(context):
            head: pb.RestoreHead | None = None
            with TemporaryDirectory(prefix="restore-", dir=self._agent.config.agent.state_dir) as directory:
                path = Path(directory) / "snapshot"
                with path.open("wb") as file:
                    async for part in requests:
                        if part.WhichOneof("message") == "head":
                            head = part.head
                        else:
                            file.write(part.data)
                if head is None:
                    raise Corrupt("no head before the snapshot")
                restored = await restore_of(self._agent, path, dict(head.devices), head.epoch)
                return pb.RestoreReply(loaded=restored.loaded, rejected=restored.skipped)

    async def Trace(self, request: pb.TraceRequest, context: Any) -> AsyncIterator[pb.TraceEvent]:  # noqa: N802
        async with reported(context):
            async for event in self._agent.traces.look(request.vm, request.mac):
                yield event

    async def Relabel(self, request: pb.RelabelRequest, context: Any) -> pb.RelabelReply:  # noqa: N802
        async with reported(context):
            change = Relabelling(request)
            refs = [ref for ref in await refs_of(self._agent, request.vm) if request.mac in ("", ref.mac)]
            if not refs:
                raise PortNotFound(f"VM {request.vm} has no port {request.mac} on {self._agent.host}")
            async with self._relabelling:
                await change.carry_out(self._agent.around, refs, self._agent.watching.switching)
            return pb.RelabelReply(matched=change.matched, changed=change.changed)

    async def Remains(self, request: pb.Empty, context: Any) -> pb.RemainsReply:  # noqa: N802, ARG002
        async with reported(context):
            remains = await asyncio.to_thread(self._agent.driver.remains)
            return pb.RemainsReply(remains={sort: pb.Names(names=names) for sort, names in remains.items()})
