# SPDX-License-Identifier: GPL-2.0-only
"""What the demonstration shows: a VM that serves, clients outside, probes, background entries, and a move of it all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from migrator._pb import migrator_pb2 as pb
from migrator.lab.cluster import Cluster
from migrator.lab.errors import LabError
from migrator.lab.machines import Machine, Port, add_outsider, add_vm
from migrator.lab.processes import Worker, wait_until

NETWORK = "office"
SERVICE, CALLBACK, PROBE = 443, 8443, 9001
BACKGROUND = (10000, 10100)  # destination ports of the background's flows
SAMPLE_S = 0.1
PROBE_MS = 10
CHUNK = 1 << 20

POLICY = {
    "name": "web",
    "rules": [  # what is not named is dropped; answers and callbacks pass by state alone
        {"direction": "to", "priority": 10, "protocol": "tcp", "ports": [str(SERVICE)], "action": "allow"},
        {"direction": "from", "priority": 10, "protocol": "tcp", "ports": [str(CALLBACK)], "action": "allow"},
        {"direction": "to", "priority": 20, "protocol": "udp", "ports": [str(PROBE)], "action": "allow"},
        {
            "direction": "from",
            "priority": 30,
            "protocol": "udp",
            "ports": [f"{BACKGROUND[0]}-{BACKGROUND[1]}"],
            "action": "allow",
        },
    ],
}


@dataclass
class Sample:
    """Connections alive at a moment (CLOCK_MONOTONIC)."""

    time: float
    alive: int


@dataclass
class Scene:
    """One VM with its clients. `begin` sets the traffic going; `move` moves it; `verdict` says what became of it."""

    cluster: Cluster
    connections: int
    entries: int
    vm: Machine = field(init=False)
    clients: Machine = field(init=False)
    talkers: list[Worker] = field(default_factory=list)
    probes: Worker = field(init=False)
    samples: list[Sample] = field(default_factory=list)

    def begin(self, number: int) -> None:
        """A fresh VM at h1, every connection established, the background there, probes running."""
        self.vm = add_vm(
            self.cluster,
            f"web{number}",
            "h1",
            [Port(f"02:00:00:00:01:{number:02x}", NETWORK, (f"10.1.0.{number}",))],
            policy=POLICY["name"],
            connections_max=1 << 18,
            timeouts_ms={"udp": 600_000},
        )
        mac = f"02:00:00:00:02:{number:02x}"
        self.clients = add_outsider(self.cluster, f"out{number}", Port(mac, NETWORK, (f"10.1.2.{number}",)))
        self.cluster.declare(self.vm)
        self._connect()
        self._fill(mac)
        self.vm.worker("probe").call("echo", address="0.0.0.0", port=PROBE)
        self.probes = self.clients.worker("probe")
        self.probes.call("send", flow=1, address=self.vm.address, port=PROBE, every_ms=PROBE_MS)
        wait_until("probes are answered", lambda: self._answered() > 20)

    def _connect(self) -> None:
        """Half of the connections come in, half go out."""
        for server, client, port in ((self.vm, self.clients, SERVICE), (self.clients, self.vm, CALLBACK)):
            server.worker("tcp").call("listen", address="0.0.0.0", port=port)
            talker = client.worker("tcp")
            opened = talker.call("connect", address=server.address, port=port, count=self.connections // 2)
            if opened["failed"]:
                raise LabError(f"{opened['failed']} connections were not established")
            talker.call("flow", every_ms=500, size=64)
            self.talkers.append(talker)

    def _fill(self, mac: str) -> None:
        """Background flows to an address that nobody answers from."""
        blaster = self.vm.worker("raw")
        blaster.call(
            "blast",
            source=self.vm.address,
            destination="10.1.200.1",
            source_mac=self.vm.ports[0].mac,
            destination_mac=mac,
            count=self.entries,
            pps=60_000,
            port_base=BACKGROUND[0],
        )
        wait_until("the background is sent", lambda: blaster.call("blasting")["over"], 60.0)
        wait_until("the background is tracked", lambda: self.tracked("h1") >= self.entries, 60.0)

    def tracked(self, host: str) -> int:
        """Connections that a host tracks for the VM."""
        return sum(p.connections for p in self.cluster.ports(host) if p.instance.vm == self.vm.uuid)

    def _answered(self) -> int:
        return int(self.probes.call("report")["flows"].get("1", {}).get("received", 0))

    def watch(self, seconds: float) -> None:
        """Let it go on for a while, noting what is alive."""
        end = time.monotonic() + seconds
        self.watch_while(lambda: time.monotonic() < end)

    def watch_while(self, condition: Callable[[], bool]) -> None:
        """Note what is alive as long as a condition holds."""
        while condition():
            alive = sum(talker.call("status")["answering"] for talker in self.talkers)
            self.samples.append(Sample(time.monotonic(), alive))
            time.sleep(SAMPLE_S)

    def move(self, to: str, *, without_state: bool = False) -> tuple[pb.Migration, dict[str, float]]:
        """Move the VM; the last report, and the times (CLOCK_MONOTONIC) at which the guest stopped and went on."""
        reports: list[pb.Migration] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                reports.append(self.cluster.migrate(self.vm, to, without_state=without_state))
            except BaseException as error:
                failures.append(error)

        mover = threading.Thread(target=run, name="move")
        mover.start()
        self.watch_while(mover.is_alive)
        mover.join()
        if failures:
            raise failures[0]
        if not reports[0].outcome or reports[0].outcome in ("aborted", "refused"):
            raise LabError(f"the move to {to} was {reports[0].outcome}: {reports[0].reason}")
        return reports[0], self.vm.order("status")["times"]

    def check(self, timeout_s: float) -> dict[str, int]:
        """A message over each connection, there and back: how many are lost, how many bytes agreed so far."""
        for talker in self.talkers:
            talker.call("ask", size=64)
        end = time.monotonic() + timeout_s
        self.watch_while(lambda: time.monotonic() < end and not all(v["over"] for v in self._verdicts()))
        return {key: sum(verdict[key] for verdict in self._verdicts()) for key in ("total", "lost", "bytes")}

    def _verdicts(self) -> list[dict[str, Any]]:
        return [talker.call("verdict") for talker in self.talkers]

    def verified(self) -> int:
        """Bytes that came back and agreed, so far."""
        return int(sum(talker.call("status")["bytes"] for talker in self.talkers))

    def checkpoint(self, host: str) -> bytes:
        """A snapshot of the VM where it is."""
        request = pb.VmRequest(vm=self.vm.uuid)
        return b"".join(c.data for c in self.cluster.agent_stub(host).Checkpoint(request, timeout=60))

    def restore(self, host: str, snapshot: bytes) -> None:
        """Put a snapshot of the VM in the place of its ports."""
        parts = [snapshot[n : n + CHUNK] for n in range(0, len(snapshot), CHUNK)]
        chunks = [pb.RestoreChunk(head=pb.RestoreHead()), *(pb.RestoreChunk(data=part) for part in parts)]
        self.cluster.agent_stub(host).Restore(iter(chunks), timeout=60)

    def probe_counts(self, grace_s: float = 2.0) -> dict[str, int]:
        """Probes sent so far, those without an answer after a while of grace, and answers that came twice."""
        sent = int(self.probes.call("sending", flow=1)["sent"])
        deadline = time.monotonic() + grace_s
        report = self.probes.call("report", below=sent)["flows"]["1"]
        while report["newest"] < sent - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
            report = self.probes.call("report", below=sent)["flows"]["1"]
        return {"sent": sent, "lost": sent - report["received"], "doubled": report["doubled"]}

    def probe_times(self) -> tuple[list[float], set[int]]:
        """When each probe was sent, and the numbers of those that nobody answered."""
        timeline = self.probes.call("timeline", flow=1)
        return timeline["sent"], set(timeline["missing"])
