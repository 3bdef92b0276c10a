# SPDX-License-Identifier: GPL-2.0-only
"""Traffic of the scenarios: conversations over TCP, numbered streams, and how they are judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migrator.lab.machines import Machine
from migrator.lab.processes import PATIENT_S, Worker, wait_until

from .world import NUMBERS, SERVICE


@dataclass
class Conversations:
    """TCP connections between a VM and a peer, begun by either side, with data flowing and compared byte for byte."""

    clients: list[Worker] = field(default_factory=list)
    total: int = 0

    @classmethod
    def begin(
        cls, vm: Machine, peer: Machine, *, inbound: int, outbound: int, every_ms: float = 500, ipv6: bool = False
    ) -> Conversations:
        made = cls()
        for server, client, count in ((vm, peer, inbound), (peer, vm, outbound)):
            if count:
                made._open(server, client, count, every_ms, ipv6)
        return made

    def _open(self, server: Machine, client: Machine, count: int, every_ms: float, ipv6: bool) -> None:
        server.worker("tcp").call("listen", address="::" if ipv6 else "0.0.0.0", port=SERVICE)
        worker = client.worker("tcp")
        address = server.address6 if ipv6 else server.address
        opened = worker.call(
            "connect",
            address=address,
            port=SERVICE,
            count=count,
            timeout_s=20,
        )
        assert opened == {"connected": count, "failed": 0}
        worker.call("flow", every_ms=every_ms, size=64)
        self.clients.append(worker)
        self.total += count

    def check(self, size: int = 2000, timeout_s: float = PATIENT_S) -> dict[str, Any]:
        """A message on each, there and back: connections lost, and bytes compared so far."""
        for client in self.clients:
            client.ask("check", size=size, timeout_s=timeout_s)
        answers = [client.answer("check", timeout_s + 10) for client in self.clients]
        reasons = sorted({reason for a in answers for reason in a["reasons"]})
        return {"lost": sum(a["lost"] for a in answers), "bytes": sum(a["bytes"] for a in answers), "reasons": reasons}

    def assert_whole(self) -> None:
        checked = self.check()
        assert checked["lost"] == 0, f"{checked['lost']} of {self.total} connections lost: {checked['reasons']}"

    def flow_on(self, size: int) -> None:
        """Wait until so many more bytes have come back on all together."""
        goal = self.bytes() + size
        wait_until("data flows", lambda: self.bytes() >= goal, 30.0)

    def bytes(self) -> int:
        return int(sum(client.call("status")["bytes"] for client in self.clients))


class Streams:
    """A numbered UDP stream each way, one datagram every `every_ms`: to the guest (flow 1) and from it (flow 2).

    `own`: each end listens on its own address only, for a guest that has several.
    """

    def __init__(
        self, vm: Machine, peer: Machine, every_ms: float = 1.0, *, ipv6: bool = False, own: bool = False
    ) -> None:
        self.ends = (vm.worker("probe"), peer.worker("probe"))  # at the guest, at the peer
        anywhere = "::" if ipv6 else "0.0.0.0"
        for end, machine in zip(self.ends, (vm, peer), strict=True):
            end.call("receive", address=machine.address if own else anywhere, port=NUMBERS)
        source = {} if own else {"source_port": NUMBERS + 10}
        targets = (peer.address6, vm.address6) if ipv6 else (peer.address, vm.address)
        self.ends[1].call("send", flow=1, address=targets[1], port=NUMBERS, every_ms=every_ms, **source)
        self.ends[0].call("send", flow=2, address=targets[0], port=NUMBERS, every_ms=every_ms, **source)
        self.run_on(30)

    def run_on(self, count: int) -> None:
        """Wait until so many more numbers have arrived at both ends."""
        goals = [self.received(flow) + count for flow in (1, 2)]
        wait_until(
            "numbers arrive", lambda: all(self.received(f) >= g for f, g in zip((1, 2), goals, strict=True)), 20.0
        )

    def sent(self, flow: int) -> int:
        return int(self.ends[2 - flow].call("sending", flow=flow)["sent"])

    def received(self, flow: int) -> int:
        return int(self.ends[flow - 1].call("report")["flows"].get(str(flow), {}).get("received", 0))

    def finish(self) -> dict[int, dict[str, Any]]:
        """Stop both; by flow: sent, missing, doubled, overtaken."""
        result = {}
        for flow, sender, receiver in ((1, self.ends[1], self.ends[0]), (2, self.ends[0], self.ends[1])):
            sent = sender.call("stop", flow=flow)["sent"]
            result[flow] = wait_until(
                f"the end of flow {flow}", lambda r=receiver, f=flow, s=sent: _complete(r, f, s), 10.0
            )
            result[flow]["sent"] = sent
        return result

    def assert_perfect(self) -> None:
        """Nothing lost, doubled or out of order in either direction."""
        for flow, report in self.finish().items():
            assert report["sent"] > 100, "the stream was too short to prove anything"
            found = {name: report[name] for name in ("missing_count", "doubled", "overtaken")}
            assert not any(found.values()), (
                f"flow {flow} of {report['sent']}: {found}, missing {report['missing'][:20]}"
            )


def _complete(receiver: Worker, flow: int, sent: int) -> dict[str, Any] | None:
    report: dict[str, Any] = receiver.call("report")["flows"][str(flow)]
    return report if report["newest"] == sent - 1 else None
