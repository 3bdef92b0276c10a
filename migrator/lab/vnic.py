# SPDX-License-Identifier: GPL-2.0-only
"""The vNIC process: stands for QEMU. It copies frames between the guest's namespace and the host where the VM runs.

    python -m migrator.lab.vnic '{"vm": uuid, "guest": namespace, "at": host, "nics": […], "hosts": {…}, …}'

One process is one VM. On every host it serves the process-guest protocol to the agent (`<uuid>.sock`); on its
standard input it takes orders from the lab (JSON lines: status, behave, migrate, suspend, resume, cancel). The end of
its input is its end.

As QEMU does: RAM takes a while to converge; a stop during a migration leads to the resume at the destination after
`downtime_ms`, with five RARPs; the source's tap is gone 15 ms later; a stop may lose one frame and keep another in the
NIC's own queue. As QEMU might: it stops by itself, and fails late.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from migrator.lab import tap
from migrator.lab.lines import LineServer, Message
from migrator.lab.loop import Loop, Orders
from migrator.lab.nic import Nic
from migrator.lab.virtual import Behaviour, Machine

SWALLOW_S = 0.006  # how long after a stop QEMU's main loop still reads


class Vnic:
    """The surroundings of one machine: taps, timers, sockets."""

    def __init__(self, loop: Loop, setup: Message) -> None:
        self.loop = loop
        self.buffer = bytearray(tap.FRAME_MAX)
        self.namespaces = {name: Path(host["netns"]) for name, host in setup["hosts"].items()}
        self.nics = [Nic(**nic) for nic in setup["nics"]]
        self.machine = Machine(setup["vm"], setup["at"], Behaviour(**setup.get("behaviour", {})), self)
        self.servers = {
            name: self._server(name, Path(host["guests"]) / f"{setup['vm']}.sock")
            for name, host in setup["hosts"].items()
        }
        for nic in self.nics:
            nic.plug(Path(setup["guest"]))
        self.appear(setup["at"])

    # ---- what the machine asks of its surroundings ----

    def appear(self, host: str) -> None:
        """Make the taps of the VM on a host."""
        self.vanish(host)  # those of an earlier stay may linger
        for nic in self.nics:
            nic.appear(host, self.namespaces[host])

    def vanish(self, host: str) -> None:
        """Take the taps of the VM off a host."""
        for nic in self.nics:
            if host in nic.host:
                self.loop.forget(nic.host[host])
                nic.vanish(host)

    def run(self, host: str, *, came_back: bool) -> None:
        """Copy frames between guest and host from now on."""
        for nic in self.nics:
            nic.give_kept(here=came_back)
            self.loop.watch(nic.guest, partial(nic.copy_out, host, self.buffer))
            self.loop.watch(nic.host[host], partial(self._first, nic, host))

    def _first(self, nic: Nic, host: str) -> None:
        """The first frames after a start: when they came is what a switchover took."""
        before = nic.to_guest
        nic.copy_in(host, self.buffer)
        if nic.to_guest > before:
            self.machine.times["first_frame"] = time.monotonic()
            self.loop.watch(nic.host[host], partial(nic.copy_in, host, self.buffer))

    def halt(self, host: str, *, swallow: bool) -> None:
        """The vCPUs stand. With `swallow`, frames that still come for a while are treated as QEMU treats them."""
        for nic in self.nics:
            self.loop.forget(nic.guest)
            self.loop.forget(nic.host[host])
            if swallow:
                self._swallow(nic, host, time.monotonic() + SWALLOW_S)

    def announce(self, host: str) -> None:
        """A RARP for each NIC, as QEMU sends."""
        if self.machine.place == host and self.machine.running:
            for nic in self.nics:
                nic.send(host, rarp(nic.mac))

    def tell(self, host: str, event: Message) -> None:
        """An event for the host's agent."""
        self.servers[host].tell({**event, "time": time.monotonic()})

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` later."""
        self.loop.after(seconds, action)

    # ---- orders of the lab ----

    def operations(self) -> dict[str, Callable[[Message], Message]]:
        return {
            "status": lambda _: self.status(),
            "behave": self.behave,
            **{name: partial(self._machine, name) for name in ("migrate", "suspend", "resume", "cancel", "remaining")},
        }

    def behave(self, order: Message) -> Message:
        """How the next moves go: fields of Behaviour; what is not named has its default."""
        self.machine.behaviour = Behaviour(**order)
        return {}

    def status(self) -> Message:
        """Where the VM is, what its NICs counted, and the times of its last moves."""
        counts = {
            name: sum(getattr(nic, name) for nic in self.nics)
            for name in ("to_guest", "from_guest", "swallowed", "refused")
        }
        return {
            "place": self.machine.place,
            "running": self.machine.running,
            "kept": sum(len(n.kept) for n in self.nics),
            "migrating": self.machine.destination,
            "times": self.machine.times,
            **counts,
        }

    def close(self) -> None:
        for server in self.servers.values():
            server.close()

    def _machine(self, name: str, order: Message) -> Message:
        return self.machine.serve(self.machine.place, {**order, "op": name})

    def _swallow(self, nic: Nic, host: str, until: float) -> None:
        if self.machine.running or host not in nic.host:
            return
        while not nic.kept and nic.swallow(host):
            pass
        if time.monotonic() < until and not nic.kept:
            self.loop.after(0.0005, lambda: self._swallow(nic, host, until))

    def _server(self, host: str, path: Path) -> LineServer:
        path.parent.mkdir(parents=True, exist_ok=True)
        server = LineServer(path, lambda: self._hello(host), lambda request: self.machine.serve(host, request))
        self.loop.watch(server.listener.fileno(), lambda: self._accept(server))
        return server

    def _accept(self, server: LineServer) -> None:
        client = server.accept()
        self.loop.watch(client, lambda: self._client(server, client))

    def _client(self, server: LineServer, client: int) -> None:
        if not server.read(client):
            self.loop.forget(client)
            server.drop(client)

    def _hello(self, host: str) -> Message:
        nics = [{"mac": nic.mac, "device": nic.devices[host]} for nic in self.nics]
        return {"event": "hello", "vm": self.machine.vm, "state": self.machine.state_at(host), "nics": nics}


def rarp(mac: str) -> bytes:
    """The frame that QEMU sends when a VM begins to run: a reverse request for its own MAC (RFC 903), padded."""
    own = bytes.fromhex(mac.replace(":", ""))
    body = b"\x00\x01\x08\x00\x06\x04\x00\x03" + own + bytes(4) + own + bytes(4)
    return b"\xff" * 6 + own + b"\x80\x35" + body + bytes(60 - 14 - len(body))


def main(arguments: list[str]) -> int:
    with contextlib.suppress(OSError):  # frames wait on this process: ahead of what only computes
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    loop = Loop()
    vnic = Vnic(loop, json.loads(arguments[1]))
    orders = Orders(loop, vnic.operations())
    vnic.machine.boot()
    orders.answer({"ready": True})
    try:
        loop.run()
    finally:
        vnic.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
