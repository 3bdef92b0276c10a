"""The interface of a switch driver, and what each call promises.

One driver object runs one host's switch. All calls are synchronous and may be made from any thread, but never two at
once for one port; calls for different ports may run side by side. A call that raises has changed nothing unless its
contract says otherwise. Whoever implements this passes `tests/contract`.

The life of a port instance, and who may call what when:

    stage ──load*──▶ staged ──commit──▶ committed ──open──▶ active ──quiesce──▶ quiesced ──redirect──▶ stub
      │ (new VM: stage, load, open)                │  ▲                │  ▲                       │
      └────────────── purge ◀──────────────────────── ┘  └──── resume ────┘  └ (hold: gate shut)      └─ purge, end

A port instance is known by (vm, mac, epoch). A call with a lower epoch than the instance here raises StaleEpoch and
does nothing; one for an instance that is not here raises PortNotFound. A staged instance may be here beside an older
one of the same VM and MAC (A→B→A): the epoch tells them apart.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datapath.errors import UnsupportedKind
from datapath.state.kind import Columns, Record, Table


@dataclass(frozen=True, order=True)
class PortRef:
    """One port instance."""

    vm: str  # uuid, lower case with dashes
    mac: str  # aa:bb:cc:dd:ee:ff
    epoch: int


class PortState(enum.StrEnum):
    STAGED = "staged"
    ACTIVE = "active"
    QUIESCED = "quiesced"
    STUB = "stub"  # tables gone, redirect still acts


class NetworkKind(enum.StrEnum):
    LOCAL = "local"
    UPLINK = "uplink"
    OVERLAY = "overlay"


@dataclass(frozen=True)
class Network:
    """A separate L2 domain. `uplink`: a device here, "" its first, `vlan` 0: untagged, `vni`: of an overlay."""

    name: str
    kind: NetworkKind
    uplink: str = ""
    vlan: int = 0
    vni: int = 0
    mtu: int = 1500
    ageing_s: float = 300.0


@dataclass(frozen=True)
class Place:
    """Where a VM's MAC is, as the coordinator says: `host` is a name known to set_hosts, "" the uplink."""

    network: str
    mac: str
    host: str
    vm: str = ""  # whose MAC it is, "" when it was not said


@dataclass(frozen=True)
class PortStatus:
    """What a port instance is now. Counters are this host's plus what was carried."""

    ref: PortRef
    state: PortState
    committed: bool
    device: str  # "" while no device is there
    ifindex: int
    record: Record  # kind `port`
    gate: str  # "none" | "local" | "redirect", with " shut" behind it when frames are held
    held_to: int
    held_from: int
    connections: int  # at the last sweep
    counters: Mapping[str, int] = field(default_factory=dict)  # packets_from, bytes_to, would_drop, redirected, …
    drops: Mapping[str, int] = field(default_factory=dict)  # name of the reason -> frames, zeroes left out


@dataclass(frozen=True)
class Need:
    """What a VM's ports ask of a destination: limits of the source, not what is used now.

    `kinds` has those that any port may come to need, and those that are declared at one of these ports (Kind.document):
    `configured` has the records of the latter, of all ports.
    """

    kinds: Mapping[str, int]  # kind -> version
    records: Sequence[Record]  # kind `port`, one a port
    rules_max: int
    connections: int  # sum of connections_max
    configured: Mapping[str, Sequence[Record]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """What a load did: nothing is dropped in silence."""

    loaded: int
    rejected: Sequence[tuple[str, int]] = ()  # reason -> how many


@dataclass(frozen=True)
class Pumped:
    """Frames that a hold gave back, in order."""

    passed: int
    dropped: int  # found the hold full: since `hold` at the source, since it was staged at the destination


@dataclass(frozen=True)
class Event:
    """Something the switch saw. `what`: "opened", "device-added", "device-removed", "full", "alarm", "trace", "log".

    `data` has for "trace" and "log": time_ns, direction ("from"/"to"), verdict, reason, rule, length, frame (bytes).
    """

    what: str
    ref: PortRef | None
    data: Mapping[str, Any] = field(default_factory=dict)


class Driver(abc.ABC):
    """One host's switch."""

    name: str

    # ---- the host ----

    @classmethod
    @abc.abstractmethod
    def check(cls, options: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
        """What the driver needs of this machine: (feature, there, what to do if not). For `migrator doctor`."""

    @abc.abstractmethod
    def start(self, options: Mapping[str, Any], on_event: Callable[[Event], None]) -> None:
        """Take over the switch as it is (an earlier run's ports go on passing frames throughout), or make it.

        `options` is the driver's own table of the agent's configuration. `on_event` is called from a thread of the
        driver's. Raises FeatureMissing.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Let go of threads and descriptors. The switch goes on: ports keep passing frames."""

    @abc.abstractmethod
    def destroy(self) -> None:
        """Take the whole switch off this host: programs, pins, devices that the driver made. Implies stop."""

    @abc.abstractmethod
    def kinds(self) -> Mapping[str, int]:
        """Kinds this driver can hold, with the newest version of each."""

    def layout(self) -> str:
        """Names the layouts of this driver's tables on the host, "" when they have no life of their own."""
        return ""

    # ---- configuration of the host ----

    @abc.abstractmethod
    def set_network(self, network: Network) -> None:
        """Make or change a network. Raises UnsupportedKind when the driver cannot carry it (names why)."""

    @abc.abstractmethod
    def remove_network(self, name: str) -> None:
        """Raises NotReady while ports are on it."""

    @abc.abstractmethod
    def networks(self) -> Sequence[Network]: ...

    @abc.abstractmethod
    def set_hosts(self, hosts: Mapping[str, str]) -> None:
        """Underlay addresses of all hosts of the cluster by name; replaces what was set. Others' frames are dropped."""

    @abc.abstractmethod
    def set_place(self, place: Place) -> None:
        """Where a MAC that is not an open port here is. Never touches the entry of an open local port."""

    @abc.abstractmethod
    def remove_place(self, network: str, mac: str) -> None: ...

    # ---- life of a port ----

    @abc.abstractmethod
    def probe(self, need: Need) -> list[str]:
        """Why this host cannot take such ports, each a sentence that names the thing; [] when it can."""

    @abc.abstractmethod
    def stage(self, ref: PortRef, record: Record, device: str) -> None:
        """Make a port instance that passes nothing. `device` may not exist yet; it is attached when it appears.

        Prepares what a switchover needs (tables, hold taps), so that nothing has to be made later. Leaves where frames
        for the VM go as it is. Raises UnsupportedKind, LoadRejected (record), NotReady (instance exists).
        """

    @abc.abstractmethod
    def commit(self, ref: PortRef) -> None:
        """Everything is here: the port may open. Durable across a crash of the agent."""

    @abc.abstractmethod
    def open(self, ref: PortRef, *, broadcast: bool = True) -> Pumped:
        """The guest runs here: frames for the VM come to this port from now on, what the guest sent is judged and goes.

        Needs committed (a new VM: staged; then the tables are what was loaded). Idempotent. `broadcast` False: native
        broadcast stays off until set_broadcast, because the source still passes it. After accept_redirect other frames
        that come by themselves wait as long, behind what the source held, at most a second: flows keep their order.
        """

    @abc.abstractmethod
    def set_broadcast(self, ref: PortRef, on: bool) -> Pumped:
        """Native broadcast for the guest, or none. With it goes what waited behind the source's frames (see `open`).

        `dropped` is all that has found a hold of the port full since it was staged here.
        """

    @abc.abstractmethod
    def hold(self, ref: PortRef) -> None:
        """Frames for the guest wait in the hold from now on. Returns when no program can still deliver past it."""

    @abc.abstractmethod
    def idle(self, ref: PortRef) -> bool | None:
        """Has the guest taken everything from its device's queue? None: cannot be known (no right, no queue, vhost)."""

    @abc.abstractmethod
    def quiesce(self, ref: PortRef) -> None:
        """The guest is stopped: the port passes nothing, its clock stands, its tables do not change any more."""

    @abc.abstractmethod
    def take(self, ref: PortRef) -> list[bytes]:
        """Frames still in the device's queue, judged and counted; [] if it cannot be read.

        Each stands behind a struct virtio_net_hdr of 10 bytes, whatever header the device has.
        """

    @abc.abstractmethod
    def inject(self, ref: PortRef, frames: Sequence[bytes], *, judged: bool) -> int:
        """Put frames in, each behind a struct virtio_net_hdr of 10 bytes.

        `judged` True: to the guest past the policy; False: as if the guest sent them. Returns how many were taken.
        """

    @abc.abstractmethod
    def resume(self, ref: PortRef) -> Pumped:
        """Rollback: active again, held frames go to the guest in order, then the gate opens. From any held state."""

    @abc.abstractmethod
    def accept_redirect(self, ref: PortRef, channel: int, source: str) -> None:
        """Destination: frames on `channel` from `source` are for this port instance. Before the source redirects."""

    @abc.abstractmethod
    def redirect(self, ref: PortRef, channel: int, host: str, judged: Sequence[bytes] = ()) -> Pumped:
        """Source: pass on `judged`, then what is held, then what comes, in order, to `host`. The tables stay."""

    @abc.abstractmethod
    def passed_on(self, ref: PortRef) -> tuple[int, int]:
        """Frames that went on by this instance's redirect, and frames that came to this instance by one.

        Segments of a GSO frame are counted one by one. What came goes before all that set_broadcast lets go.
        """

    @abc.abstractmethod
    def redirect_idle_s(self, ref: PortRef) -> float:
        """Seconds since the last frame went through the redirect (since it began, if none did)."""

    @abc.abstractmethod
    def purge(self, ref: PortRef, *, keep_redirect: bool = False) -> None:
        """Delete all of this instance; with keep_redirect the gate stays (state stub) until purge without it.

        What does not redirect (the host was rebooted since) goes whole.
        Never touches another epoch of the same VM and MAC. Purging what is not here is no error.
        """

    @abc.abstractmethod
    def set_lease(self, ref: PortRef, seconds: float | None) -> None:
        """The port's staged, held or redirecting state stops acting after that time unless renewed. None: no lease."""

    @abc.abstractmethod
    def update(self, ref: PortRef, record: Record) -> None:
        """Change the configuration of a port in place (kind `port`); connections are judged again if it matters."""

    @abc.abstractmethod
    def ports(self, vm: str = "") -> list[PortStatus]:
        """All port instances here, or those of one VM: what this costs does not depend on the others."""

    @abc.abstractmethod
    def port(self, ref: PortRef) -> PortStatus: ...

    @abc.abstractmethod
    def probe_path(self, channel: int, host: str, size: int, timeout_s: float) -> bool:
        """Does a frame of `size` bytes to `host` on `channel` come back? The far end's driver echoes it."""

    @abc.abstractmethod
    def set_trace(self, ref: PortRef, on: bool) -> None:
        """Report every verdict on the port as an Event."""

    # ---- state ----

    @abc.abstractmethod
    def dump(self, ref: PortRef, kind: str) -> Iterator[Table]:
        """All records of a kind, in tables of any size. Under traffic, each record that lives throughout comes once."""

    @abc.abstractmethod
    def load(self, ref: PortRef, table: Table) -> Loaded:
        """Apply a table (load, delete or account) to the instance. All or nothing for malformed input (LoadRejected);
        records that do not fit are counted in `rejected` by reason."""

    def relabel(self, ref: PortRef, columns: Columns) -> int:
        """Give connections another mark and label: key columns, `id`, `mark` and `label` of kind `conntrack`.

        Each is judged again at its next packet. What has ended, or is another connection by now, is left out. Returns
        how many have changed. Raises UnsupportedKind, LoadRejected, and NotReady for a port that is not active.
        """
        raise UnsupportedKind(f"driver {self.name} changes no labels of port {ref.mac}: {len(columns)} columns given")

    @abc.abstractmethod
    def track(self, ref: PortRef) -> None:
        """Begin to note which records change. From here dump followed by drains is complete. Idempotent."""

    @abc.abstractmethod
    def drain(self, ref: PortRef) -> list[Table]:
        """Records that changed since the last drain as they are now, and keys that are gone, of all live kinds.

        After quiesce: complete. Raises NotReady when the note of changes overflowed: dump again.
        """

    @abc.abstractmethod
    def untrack(self, ref: PortRef) -> None: ...

    @abc.abstractmethod
    def settle(self, ref: PortRef) -> Iterator[Table]:
        """Source after the switchover: what was counted (op account), for all accounting kinds and the port itself."""

    @abc.abstractmethod
    def settled(self, ref: PortRef) -> None:
        """Destination: no more accounting comes; entries that ended meanwhile may go."""

    @abc.abstractmethod
    def describe(self, refs: Sequence[PortRef]) -> Need:
        """What these ports ask of a destination."""

    @abc.abstractmethod
    def remains(self) -> Mapping[str, Sequence[str]]:
        """Everything of VMs that this switch holds in kernel and file system, by sort (pins, devices, taps, filters,
        entries) and sorted: what tests compare with a host that never saw the VM."""
