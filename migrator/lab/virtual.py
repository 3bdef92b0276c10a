# SPDX-License-Identifier: GPL-2.0-only
"""What a virtual machine does when it is stopped, resumed and moved, in the terms of the process-guest protocol.

No frame and no socket here: `Surroundings` carries out what the machine decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from datapath.errors import Error

Message = dict[str, Any]

RARP_MS = (0.1, 42, 192, 442, 792)  # after the resume, as QEMU


@dataclass
class Behaviour:
    """How this hypervisor behaves in its next move; times in milliseconds."""

    memory_ms: float = 200  # until RAM has converged
    memory_bytes: int = 256 << 20
    downtime_ms: float = 20  # from the stop to the resume at the destination
    self_stop_ms: float | None = None  # stops by itself so long after the move began; None: waits to be told
    swallow: bool = True  # treats frames after a stop as QEMU does
    linger_ms: float = 15  # the source's tap outlives the resume elsewhere
    fail_after_ms: float | None = None  # after the stop: fails, and resumes at the source
    refuse: bool = False  # refuses to begin a move


class Surroundings(Protocol):
    """Taps, timers and agents of a machine."""

    def appear(self, host: str) -> None: ...
    def vanish(self, host: str) -> None: ...
    def run(self, host: str, *, came_back: bool) -> None: ...
    def halt(self, host: str, *, swallow: bool) -> None: ...
    def announce(self, host: str) -> None: ...
    def tell(self, host: str, event: Message) -> None: ...
    def after(self, seconds: float, action: Callable[[], None]) -> None: ...


class Machine:
    """One VM: where it is, whether it runs, whether it moves.

    `move` numbers the moves, so that a timer of one that has ended does nothing.
    """

    def __init__(self, vm: str, place: str, behaviour: Behaviour, around: Surroundings) -> None:
        self.vm = vm
        self.place = place
        self.behaviour = behaviour
        self.around = around
        self.running = False
        self.destination = ""  # "" while it does not move
        self.move = 0
        self.began = 0.0
        self.times: dict[str, float] = {}  # CLOCK_MONOTONIC of the last stop, resume, …

    def state_at(self, host: str) -> str:
        """The word for the host's agent."""
        if host == self.place:
            return "running" if self.running else "paused"
        return "incoming" if host == self.destination else "absent"

    def serve(self, host: str, request: Message) -> Message:
        """Answer one request of the process-guest protocol."""
        operations: dict[str, Callable[[Message], Message]] = {
            "suspend": lambda _: self.suspend(),
            "resume": lambda _: self.resume(),
            "migrate": lambda r: self.migrate(str(r["to"])),
            "cancel": lambda _: self.cancel(),
            "remaining": lambda _: self.remaining(),
        }
        if host != self.place:
            return {"error": f"the VM is not here but at {self.place}"}
        operation = operations.get(str(request.get("op")))
        return operation(request) if operation else {"error": f"no operation {request.get('op')!r}"}

    def suspend(self) -> Message:
        if not self.running:
            return {"error": "the VM does not run"}
        self._stop(swallow=self.behaviour.swallow)
        return {}

    def resume(self) -> Message:
        if self.running:
            return {"error": "the VM runs"}
        if self.destination:
            return {"error": f"the VM is moving to {self.destination}"}
        self._start(self.place, "user")
        return {}

    def migrate(self, destination: str) -> Message:
        if self.destination:
            return {"error": f"the VM is moving to {self.destination}"}
        if self.behaviour.refuse or destination == self.place:
            return {"error": f"cannot move to {destination}"}
        try:
            self.around.appear(destination)
        except (OSError, Error) as error:
            return {"error": f"cannot begin at {destination}: {error}"}
        self.destination, self.began, self.move = destination, time.monotonic(), self.move + 1
        if not self.running:  # moved while paused: stays paused
            self._later(self.behaviour.memory_ms, self._arrive)
        elif self.behaviour.self_stop_ms is not None:
            self._later(self.behaviour.self_stop_ms, lambda: self._stop(swallow=self.behaviour.swallow))
        return {}

    def cancel(self) -> Message:
        if not self.destination:
            return {"error": "the VM does not move"}
        self._fail("cancelled")
        return {}

    def remaining(self) -> Message:
        if not self.destination:
            return {"error": "the VM does not move"}
        share = (time.monotonic() - self.began) * 1e3 / max(self.behaviour.memory_ms, 1e-3)
        return {"bytes": int(self.behaviour.memory_bytes * max(0.0, 1.0 - share)), "converged": share >= 1.0}

    def boot(self) -> None:
        """Begin to run for the first time."""
        self._start(self.place, "booted")

    def _start(self, host: str, reason: str) -> None:
        came_back = host == self.place
        self.place, self.running = host, True
        self.times["resumed"] = time.monotonic()
        self.around.run(host, came_back=came_back)
        for delay in RARP_MS:
            self.around.after(delay / 1e3, lambda: self.around.announce(host))
        self.around.tell(host, {"event": "resumed", "reason": reason})

    def _stop(self, *, swallow: bool) -> None:
        if not self.running:
            return
        self.running = False
        self.times["stopped"] = time.monotonic()
        self.around.halt(self.place, swallow=swallow)
        self.around.tell(self.place, {"event": "paused", "reason": "migrated" if self.destination else "user"})
        if not self.destination:
            return
        if self.behaviour.fail_after_ms is not None:
            self._later(self.behaviour.fail_after_ms, lambda: self._fail("failed"))
        else:
            self._later(self.behaviour.downtime_ms, self._arrive)

    def _arrive(self) -> None:
        """The move is complete: the VM is at the destination, running unless it was moved while paused."""
        source, destination, stopped = self.place, self.destination, self.times.get("stopped", 0.0)
        self.destination = ""
        if stopped >= self.began:
            self._start(destination, "migrated")
        else:
            self.place = destination
            self.around.tell(destination, {"event": "paused", "reason": "migrated"})
        self.around.after(self.behaviour.linger_ms / 1e3, lambda: self._leave(source))

    def _leave(self, source: str) -> None:
        if source in (self.place, self.destination):  # it has come back, or is about to
            return
        self.around.vanish(source)
        self.around.tell(source, {"event": "stopped", "reason": "migrated"})

    def _fail(self, reason: str) -> None:
        destination, was_running = self.destination, self.running
        self.destination, self.move = "", self.move + 1
        self.around.vanish(destination)
        self.around.tell(destination, {"event": "stopped", "reason": "failed"})
        self.around.tell(self.place, {"event": "migration-failed", "reason": reason})
        if not was_running and self.times.get("stopped", 0.0) >= self.began:
            self._start(self.place, "failed")

    def _later(self, milliseconds: float, action: Callable[[], None]) -> None:
        move = self.move
        self.around.after(milliseconds / 1e3, lambda: action() if move == self.move and self.destination else None)
