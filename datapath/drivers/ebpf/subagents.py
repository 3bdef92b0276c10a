"""sFlow sub-agents of this host: each a sampled port, what it was told of and what it tells its collectors.

Numbers that collectors see are in the map `samplings`, stored before a datagram leaves: an agent that dies in between
leaves a gap of one datagram, and none that comes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datapath.drivers.ebpf.clock import ktime_ns
from datapath.drivers.ebpf.collectors import Collectors, Endpoint
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.maps import Mapped, Records
from datapath.export import sflow
from datapath.export.segment import wire_header
from datapath.state.kind import Record

_FIELDS = ("pool", "drops", "length", "segment", "size", "headers", "vlan", "direction", "captured", "last")


def age_ns(began: int) -> int:
    """Since a ktime that may be before this host's was 0: then it is stored as what wraps to it."""
    return (ktime_ns() - began) % (1 << 64)


@dataclass
class SubAgent:
    """One port. Whoever calls holds the lock of all of them."""

    instance: Instance
    record: Record
    numbers: Mapped  # the map `samplings`
    collectors: Collectors
    network_vlan: Callable[[Instance, int], int]  # tag of the guest's wire -> that of its network
    due_ns: int = 0  # ktime of the next counter sample
    before: Mapping[str, int] = field(default_factory=dict)  # what the port had counted where it came from

    def __post_init__(self) -> None:
        record = self.record
        self.agent = sflow.SubAgent(
            record["agent"], record["sub_agent"], record["interface"], record["network_interface"], record["rate"]
        )
        self._head = self.agent.head()
        self._endpoints: list[Endpoint] = [(address, port) for address, port in record["collectors"]]

    @property
    def slot(self) -> int:
        return self.instance.slot

    def tell(self, samples: Records) -> None:
        """Flow samples of struct sample, in datagrams; none waits for more to come."""
        encoded: list[bytes] = []
        size = 0
        for sample in self._encoded(samples):
            if size + len(sample) > sflow.DATAGRAM_BYTES - len(self._head) - 12:
                self._send_flows(encoded)
                encoded, size = [], 0
            encoded.append(sample)
            size += len(sample)
        if encoded:
            self._send_flows(encoded)

    def _send_flows(self, encoded: Sequence[bytes]) -> None:
        self.numbers.store(self.slot, "flow_samples", int(self.numbers.view["flow_samples"][self.slot]) + len(encoded))
        self._send(encoded)

    def _encoded(self, samples: Records) -> list[bytes]:
        columns = [samples[name].tolist() for name in _FIELDS]
        data, stride = samples["data"].tobytes(), samples["data"].shape[1]
        number = int(self.numbers.view["flow_samples"][self.slot])
        encoded = []
        vlans: dict[int, int] = {}
        for at, values in enumerate(zip(*columns, strict=True)):
            pool, drops, length, segment, size, headers, vlan, direction, captured, last = values
            header = data[at * stride : at * stride + captured]
            if headers:
                header = wire_header(header, number=segment, size=size, length=length, last=bool(last))
            if vlan not in vlans:
                vlans[vlan] = self.network_vlan(self.instance, vlan)
            ways = (vlan, vlans[vlan]) if direction == 0 else (vlans[vlan], vlan)
            number += 1
            encoded.append(
                sflow.flow_sample(
                    self.agent,
                    number,
                    pool,
                    drops,
                    from_guest=direction == 0,
                    length=length,
                    header=header,
                    vlans=ways,
                )
            )
        return encoded

    def tell_counters(self, own: Mapping[str, int], *, up: bool) -> None:
        """A counter sample of what the port has counted: `own` here, the rest before."""
        number = int(self.numbers.view["counter_samples"][self.slot]) + 1
        self.numbers.store(self.slot, "counter_samples", number)
        self._send([sflow.counter_sample(self.agent, number, self.totals(own), up=up)])

    def totals(self, own: Mapping[str, int]) -> dict[str, int]:
        """What hosts before counted comes twice: with the last changes, so that no total is ever less than one that
        was told, and as accounting, which is what counts from then on."""
        carried: Mapping[str, Any] = self.instance.entry.carried.get("counters", {})
        names = ("packets_from", "bytes_from", "packets_to", "bytes_to")
        return {n: int(own.get(n, 0)) + max(int(self.before.get(n, 0)), int(carried.get(n, 0))) for n in names}

    def _send(self, samples: Sequence[bytes]) -> None:
        view, slot = self.numbers.view, self.slot
        number = int(view["datagrams"][slot]) + 1
        uptime_ms = age_ns(int(view["began"][slot])) // 1_000_000
        self.numbers.store(slot, "datagrams", number)
        failed = self.collectors.send(sflow.datagram(self._head, number, uptime_ms, samples), self._endpoints)
        if failed:
            self.numbers.store(slot, "unsent", int(view["unsent"][slot]) + failed)
