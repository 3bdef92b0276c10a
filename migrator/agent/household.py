"""What a hypervisor's driver asks of its agent (`migrator.agent.side.AgentSide`), answered.

Declarations go to the coordinator. What was declared is kept here and said again at each attach: after an outage of the
coordinator the newest word on every VM counts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from datapath.errors import Error, NotReady
from datapath.provider import PortState
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent import transaction
from migrator.agent.destination import DestinationEnd
from migrator.agent.local import checkpoint_of, port_status, refs_of, restore_of
from migrator.agent.source import SourceEnd
from migrator.agent.stream import CHANNEL_OPTIONS
from migrator.coordinator.rpc import received
from migrator.errors import (
    AlreadyMigrating,
    Corrupt,
    IllegalTransition,
    JournalFailed,
    MigrationNotFound,
    PreflightFailed,
)
from migrator.lifecycle.source_words import Phase
from migrator.snapshot import SnapshotReader

if TYPE_CHECKING:
    from migrator.agent.daemon import Agent

CALL_S = 10.0
AGAIN_S = 5.0
LOOK_S = 0.5
OPEN_S = 10.0  # from a declaration to its open ports
_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]


class Household:
    """Implements AgentSide for one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._address = agent.config.agent.coordinator
        self._channel: Any = None
        self._material: Any = None  # that the channel was made with
        self._old: list[Any] = []
        self._truth: dict[str, Sequence[pb.Port]] = {}  # VM -> what was declared last; (): to be withdrawn yet
        self._orders: dict[tuple[str, str], pb.PortOrder] = {}
        self._problems: dict[tuple[str, str], Error] = {}
        self._news = asyncio.Event()
        self._round = 0  # of saying all again
        self._log = structlog.get_logger()

    @property
    def host(self) -> str:
        return self._agent.host

    @property
    def state_dir(self) -> Path:
        return self._agent.config.agent.state_dir

    # ---- ports ----

    async def declare(self, vm: str, ports: Sequence[pb.Port]) -> list[str]:
        """See AgentSide. Returns when the ports are open, so that what is restored into them finds them."""
        self._truth[vm] = ports
        reply = await self._declare(vm, ports)
        await self._opened(vm, {port.mac for port in ports})
        return list(reply.warnings)

    async def withdraw(self, vm: str) -> None:
        """See AgentSide."""
        self._truth[vm] = ()
        await self._declare(vm, ())

    async def _declare(self, vm: str, ports: Sequence[pb.Port], *, wait: bool = False) -> pb.ApplyReply:
        for port in ports:
            self._problems.pop((vm, port.mac), None)
        request = pb.DeclareRequest(host=self.host, vm=vm, ports=ports)
        reply: pb.ApplyReply = await self._ask("Declare", request, wait=wait)
        if not ports and self._truth.get(vm) == ():
            del self._truth[vm]
        return reply

    async def attached(self) -> None:
        """The coordinator is there (again): say all of it once more, and again what it cannot take yet."""
        self._round += 1
        this, left = self._round, dict(self._truth)
        while left and self._round == this and self._agent.link.connected:
            for vm, ports in list(left.items()):
                if self._truth.get(vm) is not ports or await self._said_again(vm, ports):
                    del left[vm]
            if left:
                await asyncio.sleep(AGAIN_S)

    async def _said_again(self, vm: str, ports: Sequence[pb.Port]) -> bool:
        try:
            await self._declare(vm, ports, wait=True)
        except Error as error:
            self._log.warning("ports are not as the hypervisor has them", vm=vm, error=str(error))
            return False
        return True

    async def port(self, order: pb.PortOrder) -> None:
        """Carry out an order for a port; `declare` hears what became of it. Raises what the switch does."""
        key = (order.port.vm, order.port.mac)
        self._orders[key] = order
        try:
            await self._agent.hosting.port(order)
        except Error as error:
            self._problems[key] = error
            raise
        else:
            self._problems.pop(key, None)
        finally:
            self._news.set()
            self._news = asyncio.Event()

    def synced(self, sync: pb.Sync) -> None:
        """All that the coordinator orders of this host."""
        self._orders = {(order.port.vm, order.port.mac): order for order in sync.ports}

    def removed(self, removal: pb.PortRemoval) -> None:
        """A port instance has ended."""
        order = self._orders.get((removal.vm, removal.mac))
        if order is not None and order.epoch <= removal.epoch:
            del self._orders[removal.vm, removal.mac]

    async def _opened(self, vm: str, macs: set[str]) -> None:
        """Raises why the switch could not make them, NotReady when it takes too long.

        What the switch is not ready for may pass: an instance of the VM's last stay is about to go.
        """
        failed: Error | None = None
        try:
            async with asyncio.timeout(OPEN_S):
                while missing := macs - await self._active(vm):
                    news = self._news
                    failed = next((e for mac in missing if (e := self._problems.get((vm, mac)))), None)
                    if failed is not None and not isinstance(failed, NotReady):
                        raise failed
                    if self.leaving(vm) not in {"", Phase.STUB} or self.arriving(vm):
                        return  # a move decides over them
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), LOOK_S)
        except TimeoutError:
            raise failed or NotReady(
                f"the ports of VM {vm} are not open on {self.host} after {OPEN_S:g} s", hint="see the agent's log"
            ) from None

    async def _active(self, vm: str) -> set[str]:
        statuses = await asyncio.to_thread(self._agent.driver.ports, vm)
        return {one.ref.mac for one in statuses if one.state is PortState.ACTIVE}

    # ---- migrations ----

    async def bring(self, vm: str, *, strict: bool = False) -> AsyncIterator[pb.Migration]:
        """See AgentSide."""
        in_hand = next((end for end in self._agent.ends.of(vm) if isinstance(end, DestinationEnd)), None)
        if in_hand is not None and self.arriving(vm):
            if strict and not in_hand.order.strict:
                raise PreflightFailed(f"VM {vm} is to be moved strictly only", hint="`migrator migrate --strict`")
            async for report in self._stream("Follow", pb.MigrationRef(id=in_hand.report.id)):
                yield report
            return
        try:
            request = pb.MigrateRequest(vm=vm, to=self.host, ordered_elsewhere=True, strict=strict)
            async for report in self._stream("Migrate", request):
                yield report
        except AlreadyMigrating:
            coming = await self._coming(vm)
            if not coming:
                raise
            async for report in self._stream("Follow", pb.MigrationRef(id=coming)):
                yield report

    async def call_off(self, vm: str, reason: str) -> None:
        """See AgentSide."""
        coming = await self._coming(vm)
        if coming:
            with contextlib.suppress(IllegalTransition, MigrationNotFound):  # its guest has come, or it is over
                await self._ask("Abort", pb.MigrationRef(id=coming, reason=reason))

    async def _coming(self, vm: str) -> str:
        """Id of the migration of the VM to this host that the coordinator has in hand, "" for none."""
        listed: pb.MigrationList = await self._ask("Migrations", pb.Empty())
        found = (m.id for m in reversed(listed.migrations) if m.vm == vm and m.destination == self.host and not m.done)
        return next(found, "")

    async def left(self, vm: str, seconds: float) -> bool:
        """See AgentSide."""
        return await transaction.left(self._agent.ends, vm, seconds)

    async def may_start(self, vm: str, seconds: float) -> str:
        """See AgentSide."""
        return await transaction.may_start(self._agent.ends, vm, seconds)

    def arriving(self, vm: str) -> str:
        """See AgentSide."""
        return self._phase(vm, DestinationEnd)

    def leaving(self, vm: str) -> str:
        """See AgentSide."""
        return self._phase(vm, SourceEnd)

    def _phase(self, vm: str, kind: type[DestinationEnd | SourceEnd]) -> str:
        ends = (end for end in self._agent.ends.of(vm) if isinstance(end, kind) and not end.over)
        return next((str(end.state.phase) for end in ends), "")

    # ---- state ----

    async def statuses(self) -> AsyncIterator[pb.PortStatus]:
        """See AgentSide."""
        for status in await asyncio.to_thread(self._agent.driver.ports):
            yield port_status(self._agent, status)

    async def checkpoint(self, vm: str, path: Path) -> None:
        """See AgentSide."""
        new = path.with_name(f".{path.name}.new")
        try:
            with new.open("wb") as file:
                new.chmod(0o600)
                async for data in checkpoint_of(self._agent, vm):
                    file.write(data)
            new.replace(path)
        except OSError as error:
            raise JournalFailed(f"{path}: {error.strerror}", hint="is there room?") from error
        finally:
            new.unlink(missing_ok=True)

    async def restore(self, vm: str, path: Path) -> dict[str, int]:
        """See AgentSide. What the coordinator said of the ports since the snapshot was taken counts again after it."""
        with path.open("rb") as stream:
            of = SnapshotReader(stream).header.vm
        if of != vm:
            raise Corrupt(f"{path} is a snapshot of VM {of}, not of {vm}")
        restored = await restore_of(self._agent, path, await self._devices(vm), 0)
        for order in [order for (owner, _), order in self._orders.items() if owner == vm]:
            await self._agent.hosting.port(order)
        return restored.loaded

    async def _devices(self, vm: str) -> Mapping[str, str]:
        refs = set(await refs_of(self._agent, vm))
        statuses = await asyncio.to_thread(self._agent.driver.ports, vm)
        return {one.ref.mac: one.device for one in statuses if one.ref in refs and one.device}

    # ---- the coordinator ----

    def _stub(self) -> Any:
        material = self._agent.transport.material()
        if self._channel is None or material is not self._material:
            if self._channel is not None:
                self._old.append(self._channel)  # what is under way on it comes to its end
            self._material = material
            self._channel = self._agent.transport.to_coordinator(self._address, _OPTIONS)
        return rpc.CoordinatorStub(self._channel)  # type: ignore[no-untyped-call]

    async def _ask(self, name: str, request: Any, *, wait: bool = False) -> Any:
        """One call; `wait`: for the connection to be made again, if it has to be."""
        try:
            return await getattr(self._stub(), name)(request, timeout=CALL_S, wait_for_ready=wait)
        except grpc.aio.AioRpcError as error:
            raise received(error, f"the coordinator at {self._address}") from None

    async def _stream(self, name: str, request: Any) -> AsyncIterator[pb.Migration]:
        call = getattr(self._stub(), name)(request)
        try:
            async for report in call:
                yield report
        except grpc.aio.AioRpcError as error:
            raise received(error, f"the coordinator at {self._address}") from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """Let go of the coordinator."""
        for channel in (*self._old, self._channel):
            if channel is not None:
                await channel.close()
        self._old, self._channel = [], None
