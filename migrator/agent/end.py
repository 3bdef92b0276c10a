"""One end of one migration: runs a pure machine. What the two ends share.

An event gives a new state, which is stored, and actions, which are carried out one after the other; what takes long
goes on beside them and comes back as an event. Calls of the driver go through the VM's lane, one thread, in order.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import structlog

from datapath.errors import Error, PortNotFound, StaleEpoch
from datapath.provider import Driver, PortRef
from migrator._pb import migrator_pb2 as pb
from migrator.agent.config import MigrationSection
from migrator.agent.guests import GuestDriver
from migrator.agent.report import Report
from migrator.agent.store import Store
from migrator.errors import JournalFailed
from migrator.faults import reach
from migrator.lifecycle.machine import Action, Event, Role
from migrator.security.transport import PLAIN, Transport

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Heard(Action):
    """See End.heard."""


class Surroundings:
    """What an end needs of its agent.

    `tell` sends a Progress to the coordinator if it is there, and `heard` says whether it is. `ended` is called once
    when an end is over and the coordinator has been told so.
    """

    def __init__(
        self,
        *,
        host: str,
        driver: Driver,
        guests: GuestDriver,
        store: Store,
        settings: MigrationSection,
        tell: Callable[[pb.FromAgent], None],
        heard: Callable[[], bool],
        ended: Callable[[End], None],
        transport: Transport = PLAIN,
    ) -> None:
        self.host = host
        self.driver = driver
        self.guests = guests
        self.store = store
        self.settings = settings
        self.tell = tell
        self.heard = heard
        self.ended = ended
        self.transport = transport
        self._lanes: dict[str, ThreadPoolExecutor] = {}

    def lane(self, vm: str) -> ThreadPoolExecutor:
        """The one thread in which the driver is called for ports of this VM."""
        if vm not in self._lanes:
            self._lanes[vm] = ThreadPoolExecutor(1, thread_name_prefix=f"vm-{vm[:8]}")
        return self._lanes[vm]

    def close_lane(self, vm: str) -> None:
        """Let the thread end after what it has to do; a later call makes a new one."""
        if vm in self._lanes:
            self._lanes.pop(vm).shutdown(wait=False)

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.shutdown(wait=True, cancel_futures=True)
        self._lanes.clear()

    async def call(self, vm: str, function: Callable[..., T], *arguments: Any) -> T:
        """Run `function` in the VM's lane."""
        return await asyncio.get_running_loop().run_in_executor(self.lane(vm), function, *arguments)


class End(abc.ABC):
    """Base of SourceEnd and DestinationEnd."""

    role: Role

    def __init__(self, around: Surroundings, report: Report, refs: Sequence[PortRef], state: Any) -> None:
        self.around = around
        self.driver = around.driver
        self.guests = around.guests
        self.report = report
        self.refs = list(refs)
        self.state = state
        self.log = structlog.get_logger().bind(migration=report.id, vm=report.vm, role=str(self.role))
        self.closed = False
        self.said: dict[str, str] = {}  # the last word told, with its reason
        self.flaw: str | None = None  # the reason of a "degraded" that was told
        self._actions: asyncio.Queue[Action] = asyncio.Queue()
        self._beside: dict[str, asyncio.Task[None]] = {}
        self._deadline: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._runner = asyncio.create_task(self._run())

    # ---- to be said by each end ----

    @abc.abstractmethod
    def _step(self, event: Event) -> tuple[Any, tuple[Action, ...]]: ...

    @abc.abstractmethod
    def _handlers(self) -> Mapping[type[Action], Callable[[Any], Coroutine[Any, Any, None]]]: ...

    @abc.abstractmethod
    def _failure(self, reason: str) -> Event: ...

    @abc.abstractmethod
    def _timeout(self) -> Event: ...

    @abc.abstractmethod
    def _deadline_s(self) -> float | None: ...

    @abc.abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What a restarted agent needs beside the state."""

    @property
    @abc.abstractmethod
    def over(self) -> bool: ...

    @property
    @abc.abstractmethod
    def leased(self) -> bool:
        """Its ports are in a state that must not outlive the agent for long."""

    # ---- the machine ----

    @property
    def vm(self) -> str:
        return self.report.vm

    @property
    def name(self) -> str:
        return f"{self.report.id}.{self.role}"

    def begin(self, actions: Sequence[Action]) -> None:
        """Store the first state and do what comes first."""
        self._save()
        reach(self.role, self.state.phase)
        self._arm()
        for action in actions:
            self._actions.put_nowait(action)

    def post(self, event: Event) -> None:
        """Give the machine an event. Only in the loop's thread."""
        if self.closed:
            return
        before = self.state
        self.state, actions = self._step(event)
        if self.state != before and not self._saved() and self._binding(before):
            self.state = before
            self.post(self._failure("what was to be promised could not be written down"))
            return
        if self.state.phase is not before.phase or isinstance(event, type(self._timeout())):
            self._arm()
        if self.state.phase is not before.phase:
            self.log.info("phase", by=type(event).__name__, phase=str(self.state.phase), was=str(before.phase))
            reach(self.role, self.state.phase)
        for action in actions:
            self._actions.put_nowait(action)
        self.tell_waiters()

    async def until(self, reached: Callable[[], bool], seconds: float) -> bool:
        """Wait until something is so that depends on this end; is it, at the latest after `seconds`?"""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not reached():
                    await self._news.wait()
        return reached()

    def tell_waiters(self) -> None:
        """What `until` waits for may be so now."""
        self._news.set()
        self._news = asyncio.Event()

    def _binding(self, before: Any) -> bool:  # noqa: ARG002
        """Must the step from `before` not be taken unless it is stored? Any other is: the guest waits for no disk."""
        return False

    def _saved(self) -> bool:
        try:
            self._save()
        except JournalFailed as error:
            self.log.error("not stored", phase=str(self.state.phase), error=str(error))
            return False
        return True

    def _save(self) -> None:
        facts = {"role": str(self.role), "state": asdict(self.state), "refs": [asdict(ref) for ref in self.refs]}
        names = ("id", "vm", "epoch", "source", "destination")
        facts |= {name: getattr(self.report, name) for name in names}
        self.around.store.save_end(self.name, facts | self._facts())

    def _arm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        seconds = None if self.over else self._deadline_s()
        if seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, lambda: self.post(self._timeout()))

    async def _run(self) -> None:
        handlers = self._handlers()
        while not (self.over and self._actions.empty() and self.around.heard()):
            action = await self._actions.get()
            try:
                if type(action) is not Heard:
                    await handlers[type(action)](action)
            except Error as error:
                self.log.warning("failed", action=type(action).__name__, error=str(error))
                self.post(self._failure(str(error)))
            except Exception as error:
                self.log.exception("broken", action=type(action).__name__)
                self.post(self._failure(f"{type(error).__name__}: {error}"))
        self._finish()

    def heard(self) -> None:
        """The coordinator is there and has been told: an end that is over may be forgotten."""
        self._actions.put_nowait(Heard())

    def _finish(self) -> None:
        self.close()
        self.around.store.forget_end(self.name)
        self.around.ended(self)

    def close(self) -> None:
        """Stop without touching the switch; what is stored stays."""
        self.closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        for task in self._beside.values():
            task.cancel()
        if self._runner is not asyncio.current_task():
            self._runner.cancel()

    # ---- for handlers ----

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run `function` in the VM's lane."""
        return await self.around.call(self.vm, function, *arguments)

    def beside(self, name: str, work: Work) -> asyncio.Task[None]:
        """Go on with `work` beside the actions. A work of the same name ends."""
        self.stop_beside(name)
        task = self._beside[name] = asyncio.create_task(self._guarded(work))
        return task

    def stop_beside(self, *names: str) -> None:
        for name in names:
            if name in self._beside:
                self._beside.pop(name).cancel()

    async def _guarded(self, work: Work) -> None:
        try:
            await work()
        except Error as error:
            self.log.warning("failed", error=str(error))
            self.post(self._failure(str(error)))
        except Exception as error:
            self.log.exception("broken")
            self.post(self._failure(f"{type(error).__name__}: {error}"))

    def tell(self, what: str, reason: str = "") -> None:
        """Progress for the coordinator; it is told again when it comes back."""
        self.report.reason = reason or self.report.reason
        self.said = {"what": what, "reason": reason}
        if what == "degraded":
            self.flaw = reason
        log = self.log.warning if what in {"failed", "degraded"} else self.log.info
        log(what, reason=reason, **({"times_ms": self.report.times_ms} if what in {"settled", "opened"} else {}))
        self.tell_now(what, reason)

    def tell_again(self) -> None:
        """Who comes back hears the last word; a flaw as well, which no later word takes back."""
        if self.flaw is not None and self.said["what"] != "degraded":
            self.tell_now("degraded", self.flaw)
        if self.said:
            self.tell_now(**self.said)

    def tell_now(self, what: str, reason: str = "") -> None:
        """Progress that is not repeated."""
        problem = pb.Problem(kind="MigrationError", message=reason) if reason else None
        progress = pb.Progress(
            migration=self.report.id,
            role=str(self.role),
            event=what,
            report=self.report.message(str(self.state.phase)),
            problem=problem,
        )
        self.around.tell(pb.FromAgent(progress=progress))

    async def renew_lease(self) -> None:
        if self.leased:
            await self.call(self._lease)

    def _lease(self) -> None:
        if self.leased:
            self._set_lease()

    def _set_lease(self) -> None:
        for ref in self.refs:
            with contextlib.suppress(PortNotFound, StaleEpoch):  # one of several that is gone costs no other its own
                self.driver.set_lease(ref, self.around.settings.lease_s)

    def now(self) -> float:
        return time.monotonic()
