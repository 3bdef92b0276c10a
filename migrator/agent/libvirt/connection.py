"""The connection to libvirtd: it comes back by itself, and nobody waits for it for ever.

Two connections of libvirt's are one here: events come by the first, calls are made by the second, so that no call
delays an event. A call runs in a thread of its own, never in the loop; a call that takes as long as a migration has a
third connection for itself. Threads are daemons: one that libvirtd never answers must not keep the agent from ending.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import libvirt
import structlog

from migrator.agent.guests.word import GuestFailed
from migrator.agent.libvirt.eventloop import use_running_loop

T = TypeVar("T")
Libvirt = Any
"""libvirt.virConnect, which has no types."""

CALL_S = 10.0
KEEPALIVE_S = 5
KEEPALIVE_MISSES = 3
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 5.0
STUCK_MAX = 16  # calls that were not answered in time: then the connection is taken for dead

_HINTS = {
    libvirt.VIR_ERR_NO_DOMAIN: "the VM is not on this host",
    libvirt.VIR_ERR_OPERATION_TIMEOUT: "another job holds the VM: virsh domjobinfo",
    libvirt.VIR_ERR_AUTH_FAILED: "the agent has to run as root, or be let in by libvirtd's polkit rules",
    libvirt.VIR_ERR_NO_SUPPORT: "this libvirt cannot do it: at least 9.0 is needed",
    libvirt.VIR_ERR_SYSTEM_ERROR: "is libvirtd running?",
    libvirt.VIR_ERR_INTERNAL_ERROR: "journalctl -u libvirtd tells more",
}


class Connection:
    """`opened(conn, closing)` runs in a thread whenever libvirtd has been reached, to register for events, and puts
    what ends that on `closing`; what it returns goes to `up` in the loop. `down(reason)` follows when it is lost.
    """

    def __init__(
        self,
        uri: str,
        *,
        opened: Callable[[Libvirt, ExitStack], T],
        up: Callable[[T], None],
        down: Callable[[str], None],
    ) -> None:
        self.uri = uri
        self._opened = opened
        self._tell_up = up
        self._tell_down = down
        self._calls: Libvirt | None = None
        self._runner: asyncio.Task[None] | None = None
        self._reached = asyncio.Event()
        self._broken = asyncio.Event()
        self._stuck = 0
        self._log = structlog.get_logger().bind(uri=uri)

    @property
    def up(self) -> bool:
        return self._calls is not None

    async def start(self, patience_s: float) -> bool:
        """Begin to connect; True when libvirtd was reached within that time. Else it is tried on."""
        use_running_loop()
        self._runner = asyncio.create_task(self._run())
        return await _within(self._reached, patience_s)

    async def stop(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
            self._runner = None

    async def call(self, function: Callable[[Libvirt], T], *, within_s: float = CALL_S) -> T:
        """Run `function` with the connection for calls. Raises GuestFailed, with libvirt's words and a hint."""
        conn = self._calls
        if conn is None:
            raise GuestFailed(f"libvirt is not reached at {self.uri}", hint="is libvirtd running?")
        try:
            async with asyncio.timeout(within_s):
                return await in_thread(lambda: function(conn))
        except TimeoutError:
            self._count_stuck()
            raise GuestFailed(
                f"libvirt did not answer within {within_s:.0f} s", hint="another job may hold the VM: virsh domjobinfo"
            ) from None
        except libvirt.libvirtError as error:
            raise failure(error) from error

    async def call_alone(self, function: Callable[[Libvirt], T]) -> T:
        """Run `function` with a connection that nobody else uses, for as long as it takes. Raises GuestFailed."""

        def work() -> T:
            closing = ExitStack()
            try:
                return function(_open(self.uri, closing))
            finally:
                _close(closing)

        try:
            return await in_thread(work)
        except libvirt.libvirtError as error:
            raise failure(error) from error

    def _count_stuck(self) -> None:
        self._stuck += 1
        if self._stuck >= STUCK_MAX:
            self._broken.set()  # closing it frees the threads that wait

    async def _run(self) -> None:
        pause, told = RETRY_FIRST_S, False
        while True:
            try:
                await self._once()
                pause, told = RETRY_FIRST_S, False
            except GuestFailed as error:
                if not told:
                    self._log.warning("libvirt is not reached, tried on", error=str(error))
                told = True
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 2, RETRY_MAX_S)

    async def _once(self) -> None:
        """Connect, and stay so until it breaks. Raises GuestFailed when it cannot be had."""
        self._broken, self._stuck = asyncio.Event(), 0
        lost = _Lost(asyncio.get_running_loop(), self._broken)
        closing = ExitStack()

        def reach() -> tuple[Libvirt, Any]:
            events, calls = (_open(self.uri, closing) for _ in range(2))
            for conn in (events, calls):
                conn.registerCloseCallback(lost.closed, None)
                closing.callback(conn.unregisterCloseCallback)
            return calls, self._opened(events, closing)

        try:
            self._calls, found = await in_thread(reach)
            self._log.info("libvirt is reached")
            self._tell_up(found)
            self._reached.set()
            await self._broken.wait()
        except libvirt.libvirtError as error:
            raise failure(error) from error
        finally:
            was_up, self._calls = self._calls is not None, None
            self._reached.clear()
            # In a thread, for it may wait for an answer that never comes.
            threading.Thread(target=_close, args=(closing,), name="libvirt-close", daemon=True).start()
        if was_up:
            self._tell_down(lost.reason)


class _Lost:
    """Why a connection ended; libvirt says so in any thread."""

    _REASONS = ("an error", "end of file", "no answer to keepalive", "closed")

    def __init__(self, loop: asyncio.AbstractEventLoop, broken: asyncio.Event) -> None:
        self._loop = loop
        self._broken = broken
        self.reason = "too many calls were not answered"

    def closed(self, conn: Libvirt, reason: int, opaque: object) -> None:
        del conn, opaque
        self.reason = self._REASONS[reason] if 0 <= reason < len(self._REASONS) else str(reason)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._broken.set)


def failure(error: libvirt.libvirtError) -> GuestFailed:
    """Libvirt's error as ours."""
    text = error.get_error_message() or str(error)
    return GuestFailed(f"libvirt: {text}", hint=_HINTS.get(error.get_error_code(), ""))


async def in_thread(function: Callable[[], T]) -> T:
    """What `function` returns or raises in a daemon thread of its own; who stops waiting leaves it alone."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(how: Callable[[Any], None], what: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if future.done() else how(what))

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # it is the waiting task's, whatever it is
            settle(future.set_exception, error)
        else:
            settle(future.set_result, result)

    threading.Thread(target=work, name="libvirt-call", daemon=True).start()
    return await future


def _open(uri: str, closing: ExitStack) -> Libvirt:
    conn = libvirt.open(uri)
    closing.callback(conn.close)
    conn.setKeepAlive(KEEPALIVE_S, KEEPALIVE_MISSES)
    return conn


def _close(closing: ExitStack) -> None:
    """Everything on the stack is done whatever fails of it: what was closed from the other side fails."""
    with suppress(libvirt.libvirtError):
        closing.close()


async def _within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
