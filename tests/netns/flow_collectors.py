# SPDX-License-Identifier: GPL-2.0-only
"""Collectors of NetFlow and IPFIX in a network namespace: nfdump's nfcapd, pmacct's nfacctd, and a capture that
tshark reads. And the truth that they are compared with: what a guest's kernel counted."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from migrator.lab import netns
from migrator.lab.machines import GUEST_DEVICE, Machine
from migrator.lab.processes import wait_until
from migrator.lab.topology import Lab

NFCAPD_PORT, NFACCTD_PORT = 2055, 2056
TOOLS = ("nfcapd", "nfdump", "nfacctd", "tcpdump", "tshark", "nft")


@dataclass
class Sum:
    """Packets and bytes, and of how many flow records."""

    packets: int = 0
    bytes: int = 0
    records: int = 0

    def add(self, packets: int, amount: int) -> None:
        self.packets, self.bytes, self.records = self.packets + packets, self.bytes + amount, self.records + 1


@dataclass
class Found:
    """What a collector made of it: sums by direction (from the guest, to the guest), and what it complained of."""

    guest: str
    sums: dict[str, Sum] = field(default_factory=lambda: {"from": Sum(), "to": Sum()})
    complaints: list[str] = field(default_factory=list)

    def add(self, source: str, packets: int, amount: int) -> None:
        self.sums["from" if source == self.guest else "to"].add(packets, amount)

    def counted(self) -> dict[str, tuple[int, int]]:
        return {way: (one.packets, one.bytes) for way, one in self.sums.items()}


class Collectors:
    """They run from `begin`; `finish` lets them read what has come, ends them and gives their words."""

    def __init__(self, directory: Path, address: str, namespace: str = "") -> None:
        """`namespace`: where `address` is, "" the one that the calling thread is in."""
        missing = [tool for tool in TOOLS if shutil.which(tool, path="/usr/bin:/usr/sbin:/bin:/sbin") is None]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)} (tools/packages)")
        self._namespace, self.directory, self.address = namespace, directory, address
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def endpoints(self) -> list[str]:
        return [f"{self.address}:{NFCAPD_PORT}", f"{self.address}:{NFACCTD_PORT}"]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        flows = self.directory / "nfcapd"
        flows.mkdir()
        config = self.directory / "nfacctd.conf"
        lines = {
            "nfacctd_ip": self.address,
            "nfacctd_port": NFACCTD_PORT,
            "nfacctd_disable_checks": "false",
            "plugins": "print",
            "aggregate": "src_host, dst_host, src_port, dst_port, proto",
            "print_output": "json",
            "print_output_file": self.directory / "nfacctd.json",
            "print_output_file_append": "true",
            "print_refresh_time": 1,
            "logfile": self.directory / "nfacctd.messages",
        }
        config.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
        with contextlib.ExitStack() as stack:
            stack.callback(self._kill)
            self._start("nfcapd", "-w", flows, "-p", NFCAPD_PORT, "-b", self.address, "-t", 3600, "-B", 4 << 20)
            self._start("nfacctd", "-f", config)
            self._start("tcpdump", "-Z", "root", "-U", "-i", "any", "-w", self.pcap, "udp", "port", NFCAPD_PORT)
            wait_until("the collectors listen", self._listen)
            yield

    @property
    def pcap(self) -> Path:
        return self.directory / "datagrams.pcap"

    def _start(self, name: str, *arguments: Any) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(self._inside(name, *arguments), stdout=log, stderr=log)

    def _inside(self, *command: Any) -> list[str]:
        words = [str(part) for part in command]
        return netns.inside(self._namespace, words) if self._namespace else words

    def _sockets(self) -> dict[int, int]:
        """UDP port -> bytes that wait to be read."""
        found = {}
        table = netns.run(self._inside("cat", "/proc/thread-self/net/udp"))
        for line in table.splitlines()[1:]:
            parts = line.split()
            found[int(parts[1].split(":")[1], 16)] = int(parts[4].split(":")[1], 16)
        return found

    def _listen(self) -> bool:
        there = self._sockets()
        captures = "listening on" in (self.directory / "tcpdump.log").read_text(errors="replace")
        return {NFCAPD_PORT, NFACCTD_PORT} <= there.keys() and captures

    def finish(self) -> None:
        """All that was sent has been read; then they write and leave."""
        wait_until("the collectors have read all", lambda: not any(self._sockets().values()))
        for name, number in (("nfcapd", signal.SIGTERM), ("nfacctd", signal.SIGINT), ("tcpdump", signal.SIGINT)):
            self._processes[name].send_signal(number)
        for process in self._processes.values():
            process.wait(20)

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(20)

    # ---- what they found ----

    def nfdump(self, guest: str) -> Found:
        found = Found(guest)
        for file in sorted((self.directory / "nfcapd").glob("nfcapd.*")):
            text = _output("nfdump", "-r", file, "-q", "-o", "fmt:%sa;%pkt;%byt", "-N")
            for line in filter(None, (one.strip() for one in text.splitlines())):
                source, packets, amount = (part.strip() for part in line.split(";"))
                found.add(source, int(packets), int(amount))
            stat = _output("nfdump", "-I", "-r", file)
            found.complaints += [line for line in stat.splitlines() if re.match(r"Sequence failures: [^0]", line)]
        log = (self.directory / "nfcapd.log").read_text(errors="replace")
        found.complaints += [
            line
            for line in log.splitlines()
            if re.search(r"Sequence Errors: [1-9]|Bad Packets: [1-9]|(?i:unknown|skip|error|warn)", line)
            and not re.search(r"Sequence Errors: 0, Bad Packets: 0", line)
        ]
        return found

    def nfacctd(self, guest: str) -> Found:
        found = Found(guest)
        output = self.directory / "nfacctd.json"
        for line in output.read_text().splitlines() if output.exists() else ():
            one = json.loads(line)
            found.add(one["ip_src"], int(one["packets"]), int(one["bytes"]))
        log = (self.directory / "nfacctd.messages").read_text(errors="replace")
        found.complaints += [line for line in log.splitlines() if re.search(r"WARN|ERROR|expecting|[Dd]iscard", line)]
        return found

    def tshark(self, *fields: str) -> list[list[str]]:
        """Fields of each datagram."""
        arguments = [part for name in fields for part in ("-e", name)]
        decode = ("-d", f"udp.port=={NFCAPD_PORT},cflow")
        text = _output("tshark", "-r", self.pcap, *decode, "-T", "fields", *arguments)
        return [line.split("\t") for line in text.splitlines()]

    def malformed(self) -> list[str]:
        decode = ("-d", f"udp.port=={NFCAPD_PORT},cflow")
        # tshark expects sequences by the sender's port, which is another on each host and by chance the same again;
        # nfcapd and nfacctd go by address and domain, as RFC 3954 does
        order = "cflow.unexpected_sequence_number"
        wrong = f'_ws.malformed || _ws.expert.severity == "Error" || (_ws.expert.severity == "Warning" && !{order})'
        return _output("tshark", "-r", self.pcap, *decode, "-Y", wrong).splitlines()


def _output(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Truth:
    """IPv4 packets of TCP, UDP and echoes that a guest's own kernel sent and got."""

    RULES = """table ip truth {
  chain out { type filter hook output priority -300; meta l4proto { tcp, udp } counter; icmp type { 0, 8 } counter; }
  chain in { type filter hook input priority -300; meta l4proto { tcp, udp } counter; icmp type { 0, 8 } counter; }
}
"""

    def __init__(self, lab: Lab, machine: Machine, *others: Machine) -> None:
        """`others` send to it. Before any connection is made: TCP makes no skb of more than one segment, and nobody
        joins some, or a guest's kernel would count them as one packet."""
        for one in (machine, *others):
            off = ["ethtool", "-K", GUEST_DEVICE, "tso", "off", "gso", "off", "gro", "off"]
            netns.run(netns.inside(lab.name(one.name), off))
            netns.ip("link", "set", GUEST_DEVICE, "gso_max_segs", "1", namespace=lab.name(one.name))
        self._namespace = lab.name(machine.name)
        netns.run(netns.inside(self._namespace, ["nft", "-f", "-"]), self.RULES)

    def counted(self) -> dict[str, tuple[int, int]]:
        """Direction -> (packets, bytes)."""
        listing = json.loads(netns.run(netns.inside(self._namespace, ["nft", "-j", "list", "table", "ip", "truth"])))
        sums = {"out": [0, 0], "in": [0, 0]}
        for one in listing["nftables"]:
            for part in one.get("rule", {}).get("expr", ()):
                if "counter" in part:
                    sums[one["rule"]["chain"]][0] += part["counter"]["packets"]
                    sums[one["rule"]["chain"]][1] += part["counter"]["bytes"]
        return {"from": (sums["out"][0], sums["out"][1]), "to": (sums["in"][0], sums["in"][1])}
