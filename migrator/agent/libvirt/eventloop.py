"""libvirt's own events on asyncio: libvirtaio, made fit for calls from threads.

Libvirt takes one event implementation a process, for good, and calls it from whatever thread uses a connection.
libvirtaio hands such calls to the loop as if they came from the loop's own thread: a timer started by another thread
sleeps until something else wakes the loop. So libvirtaio sees the loop through a `Doorway`, which passes on everything
by call_soon_threadsafe, in the order in which it came. A process with one loop after another has one implementation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import libvirt
import libvirtaio

_Coroutine = Coroutine[Any, Any, Any]


class _Later:
    """A task that is made in the loop's thread; libvirtaio only ever cancels it."""

    def __init__(self, door: Doorway, work: _Coroutine) -> None:
        self._door = door
        self._work: _Coroutine | None = work
        self._task: asyncio.Task[Any] | None = None

    def begin(self) -> None:
        if self._work is not None:
            self._task = asyncio.get_running_loop().create_task(self._work)

    def cancel(self) -> None:
        self._door.pass_on(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif self._work is not None:
            self._work.close()
        self._work = None


class Doorway:
    """As much of an event loop as libvirtaio uses. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def pass_on(self, function: Callable[..., object], *arguments: Any) -> bool:
        """False when there is no loop any more."""
        try:
            assert self.loop is not None
            self.loop.call_soon_threadsafe(_quietly, function, *arguments)
        except RuntimeError:  # it is closed
            return False
        return True

    def add_reader(self, fd: int, function: Callable[..., object], *arguments: Any) -> None:
        self.pass_on(lambda: self._running().add_reader(fd, function, *arguments))

    def add_writer(self, fd: int, function: Callable[..., object], *arguments: Any) -> None:
        self.pass_on(lambda: self._running().add_writer(fd, function, *arguments))

    def remove_reader(self, fd: int) -> None:
        self.pass_on(lambda: self._running().remove_reader(fd))

    def remove_writer(self, fd: int) -> None:
        self.pass_on(lambda: self._running().remove_writer(fd))

    def create_task(self, work: _Coroutine) -> _Later:
        later = _Later(self, work)
        if not self.pass_on(later.begin):
            work.close()
        return later

    def _running(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()


def _quietly(function: Callable[..., object], *arguments: Any) -> None:
    """A descriptor that was closed before the loop came to it needs no watch any more."""
    try:
        function(*arguments)
    except (OSError, ValueError):
        return


_DOOR = Doorway()
_registered: libvirtaio.virEventAsyncIOImpl | None = None


def use_running_loop() -> None:
    """Have libvirt's events of this process come to the running loop; connections of an earlier loop are dead."""
    global _registered
    _DOOR.loop = asyncio.get_running_loop()
    if _registered is None:
        libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; libvirt would print them as well
        # libvirtaio schedules what frees a callback by ensure_future(loop=...), which only calls create_task.
        _registered = libvirtaio.virEventAsyncIOImpl(loop=_DOOR)
        _registered.register()
