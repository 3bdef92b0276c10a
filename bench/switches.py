# SPDX-License-Identifier: GPL-2.0-only
"""Switches between two namespaces, ours and what a user would otherwise use, each with the same two ends and filter.

The filter, where there is one: what belongs to a connection passes; TCP to port SERVICE and UDP to the ports
UDP_PORTS of the right end may begin one from the left; all else is dropped.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pyroute2 import IPRoute

from migrator.lab.processes import wait_until
from tests.netns.driver_lab import Guest, Host, Place, connect, give_address
from tests.netns.driver_lab import hosts as driver_hosts

LEFT, RIGHT = "10.9.0.1", "10.9.0.2"
MACS = ("02:00:00:00:09:01", "02:00:00:00:09:02")
SERVICE = 5201
UDP_PORTS = (0x2000, 0x23FF)  # 0x2000 with a mask, which is how OpenFlow says a range
MTU = 1500
BRIDGE_NETFILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
TIMEOUT_S = 600  # of a datagram's connection: none ends by itself while a table is full
TIMEOUTS_MS = dict.fromkeys(("udp", "udp_stream"), TIMEOUT_S * 1000)

NFT = f"""
table ip guard {{
    chain forward {{
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        ip saddr {LEFT} ip daddr {RIGHT} tcp dport {SERVICE} accept
        ip saddr {LEFT} ip daddr {RIGHT} udp dport {UDP_PORTS[0]}-{UDP_PORTS[1]} accept
    }}
}}
"""

SINK = """
table netdev sink {
    chain in {
        type filter hook ingress device eth0 priority 0;
        meta l4proto udp counter name taken drop
    }
    counter taken { }
}
"""
"""At both ends: datagrams are counted and go no further."""

FLOWS = (
    "table=0,priority=9,arp,actions=NORMAL",
    "table=0,priority=8,ip,ct_state=-trk,actions=ct(table=1)",
    "table=1,priority=9,ip,ct_state=+est+trk,actions=NORMAL",
    f"table=1,priority=8,ip,ct_state=+new+trk,nw_src={LEFT},nw_dst={RIGHT},tcp,tp_dst={SERVICE},actions=ct(commit),NORMAL",
    f"table=1,priority=8,ip,ct_state=+new+trk,nw_src={LEFT},nw_dst={RIGHT},udp,tp_dst=0x2000/0xfc00,"
    "actions=ct(commit),NORMAL",
    "table=1,priority=0,actions=drop",
    "table=0,priority=0,actions=drop",
)


class Switch:
    """Two ends, each a namespace with `eth0`, and what is between them. Names are shown in figures."""

    name = ""
    tracks = True
    window = 0
    """Frames that may be under way; 0: a frame has arrived when the call that sends it returns."""

    def __init__(self, left: Place, right: Place) -> None:
        self.left, self.right = left, right

    @property
    def macs(self) -> tuple[str, str]:
        return MACS

    def cpu_ns(self) -> int:
        """CPU time of processes that forward, besides that of who sends."""
        return 0

    def empty(self) -> int:
        """Forget all connections. How many there may be: as many as nf_conntrack takes on this machine."""
        raise NotImplementedError

    def connections(self) -> int:
        """In the table."""
        raise NotImplementedError

    def make(self) -> None:
        """Build it; `close` ends what of it is more than its namespaces, also after a failure."""

    def close(self) -> None:
        pass


class Ours(Switch):
    name = "this switch"

    def __init__(self, host: Host, left: Guest, right: Guest) -> None:
        super().__init__(left, right)
        self._host, self._guests = host, (left, right)

    @property
    def macs(self) -> tuple[str, str]:
        return self._guests[0].ref.mac, self._guests[1].ref.mac

    def cpu_ns(self) -> int:
        """Of this process's other threads: the driver sweeps in one of them."""
        return time.process_time_ns() - time.thread_time_ns()

    def empty(self) -> int:
        """Ports made anew, each with such a table of its own."""
        limit = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
        for guest in self._guests:
            self._host.run(lambda guest=guest: self._host.driver.purge(guest.ref))  # type: ignore[misc]
            guest.record = cast(Any, {**guest.record, "connections_max": limit, "timeouts_ms": TIMEOUTS_MS})
            self._host.open(guest, policy(inbound=guest.address == RIGHT))
        return limit

    def connections(self) -> int:
        return self._host.run(lambda: max(map(self._count, self._guests)))

    def _count(self, guest: Guest) -> int:
        return sum(len(table) for table in self._host.driver.dump(guest.ref, "conntrack"))


class Bridge(Switch):
    name = "Linux bridge"
    tracks = False

    def __init__(self, left: Place, right: Place, middle: Place) -> None:
        super().__init__(left, right)
        self._middle = middle

    def make(self) -> None:
        left, right, middle = self.left, self.right, self._middle
        for number, (place, mac) in enumerate(zip((left, right), MACS, strict=True)):
            connect(middle, f"p{number}", place, "eth0", mac, MTU)
        middle.run(self._make)
        give_address(left, "eth0", LEFT)
        give_address(right, "eth0", RIGHT)

    def _make(self) -> None:
        with IPRoute() as route:
            route.link("add", ifname="br0", kind="bridge")
            Path("/proc/sys/net/ipv6/conf/br0/disable_ipv6").write_text("1")
            if BRIDGE_NETFILTER.exists():  # a new namespace has it on, and every frame pays for it
                BRIDGE_NETFILTER.write_text("0")
            (bridge,) = route.link_lookup(ifname="br0")
            route.link("set", index=bridge, state="up")
            for name in ("p0", "p1"):
                route.link("set", index=route.link_lookup(ifname=name)[0], master=bridge)


class Filtered(Bridge):
    name = "bridge + nftables"
    tracks = True

    def _make(self) -> None:
        super()._make()
        BRIDGE_NETFILTER.write_text("1")
        for name in ("udp_timeout", "udp_timeout_stream"):
            Path(f"/proc/sys/net/netfilter/nf_conntrack_{name}").write_text(str(TIMEOUT_S))
        subprocess.run(["nft", "-f", "-"], input=NFT, text=True, check=True, timeout=30)

    def empty(self) -> int:
        run(self._middle, ["conntrack", "-F"])
        return int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())  # one for the whole machine

    def connections(self) -> int:
        return int(run(self._middle, ["conntrack", "-C"]))


class OpenVswitch(Bridge):
    """Its datapath in user space, of a daemon of its own with files of its own."""

    name = "Open vSwitch, user space"
    tracks = True
    window = 128

    def __init__(self, left: Place, right: Place, middle: Place, directory: Path) -> None:
        self._files = directory
        self._environment = {**os.environ, **dict.fromkeys(("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"), str(directory))}
        self._daemons: list[subprocess.Popen[bytes]] = []
        super().__init__(left, right, middle)

    def _make(self) -> None:
        socket, data = f"{self._files}/db.sock", f"{self._files}/conf.db"
        self._run("ovsdb-tool", "create", data, "/usr/share/openvswitch/vswitch.ovsschema")
        self._start("ovsdb-server", data, f"--remote=punix:{socket}")
        wait_until("ovsdb-server listens", lambda: Path(socket).exists(), 10.0)
        vsctl = ("ovs-vsctl", "--timeout=20", f"--db=unix:{socket}")
        self._run(
            *vsctl, "--no-wait", "init", "--", "set", "Open_vSwitch", ".", "other_config:userspace-tso-enable=true"
        )
        self._start("ovs-vswitchd", f"unix:{socket}", "--disable-system", f"--unixctl={self._files}/ctl")
        ports = [word for name in ("p0", "p1") for word in ("--", "add-port", "br0", name)]
        self._run(
            *vsctl, "add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev", "fail_mode=secure", *ports
        )
        self._run("ovs-ofctl", "--bundle", "add-flows", f"{self._files}/br0.mgmt", "-", text="\n".join(FLOWS))

    def _run(self, *command: str, text: str = "") -> str:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=30, check=False, env=self._environment
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def _start(self, *command: str) -> None:
        with (self._files / f"{command[0]}.log").open("wb") as log:
            self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=self._environment))

    def cpu_ns(self) -> int:
        tasks = Path(f"/proc/{self._daemons[-1].pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

    def close(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)


def run(place: Place, command: list[str], text: str = "") -> str:
    """Run a command in a place; its output."""
    return place.run(
        lambda: subprocess.run(command, input=text, check=True, capture_output=True, text=True, timeout=60).stdout
    )


def policy(*, inbound: bool) -> list[dict[str, Any]]:
    """The filter as rules of this switch, at the left or at the right."""
    into: list[dict[str, Any]] = [
        {"direction": "to", "protocol": "tcp", "remote": [f"{LEFT}/32"], "ports": [[SERVICE, SERVICE]]},
        {"direction": "to", "protocol": "udp", "remote": [f"{LEFT}/32"], "ports": [list(UDP_PORTS)]},
    ]
    return into if inbound else [{"direction": "from", "protocol": "any"}]


@contextlib.contextmanager
def switches(directory: Path, *, open_vswitch: bool) -> Iterator[list[Switch]]:
    """All of them beside each other."""
    with contextlib.ExitStack() as stack:

        def place() -> Place:
            made = Place()
            stack.callback(made.close)
            return made

        (host,) = stack.enter_context(driver_hosts(1, sweep_interval_s=5.0))  # as an agent has it
        left, right = host.guest(LEFT, policy(inbound=False)), host.guest(RIGHT, policy(inbound=True))
        made: list[Switch] = [
            Bridge(place(), place(), place()),
            Ours(host, left, right),
            Filtered(place(), place(), place()),
        ]
        if open_vswitch:
            made.append(OpenVswitch(place(), place(), place(), directory))
        for switch in made:
            stack.callback(switch.close)
            switch.make()
            for end in (switch.left, switch.right):
                run(end, ["nft", "-f", "-"], SINK)
        yield made
