# SPDX-License-Identifier: GPL-2.0-only
"""Collectors of sFlow in a network namespace: sfcapd (nfdump), sfacctd (pmacct), and a plain receiver for tshark.

Each port of SFCAPD, SFACCTD and PLAIN is one collector; every datagram goes to all three.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from migrator.lab import netns
from tests.sflow import Datagram, read

from .private import wait_until

SFCAPD, SFACCTD, PLAIN = 6343, 6344, 6345
_COMPLAINT = re.compile(r"warn|error|unknown|sequence|expecting|discard|malformed|invalid|drop", re.I)
_SUMMARY = re.compile(r"(?i)sequence errors?: *0\b|bad packets?: *0\b|unknown: *0\b|ignored: *0\b")


class Rig:
    """What the three have heard; `stop` before their totals are read."""

    def __init__(self, namespace: str, address: str, directory: Path) -> None:
        self.address, self._directory = address, directory
        self.datagrams: list[bytes] = []
        self._namespace, self._stack = namespace, contextlib.ExitStack()
        self._capd = self._sfcapd()
        self._acctd = self._sfacctd()
        self._plain()

    @property
    def collectors(self) -> list[str]:
        return [f"{self.address}:{port}" for port in (SFCAPD, SFACCTD, PLAIN)]

    # ---- running ----

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self._directory / f"{name}.log").open("wb") as log:
            started = subprocess.Popen(netns.inside(self._namespace, list(command)), stdout=log, stderr=log)
        self._stack.callback(_end, started)
        return started

    def _sfcapd(self) -> subprocess.Popen[bytes]:
        (self._directory / "flows").mkdir()
        found = self._start(
            "sfcapd", "sfcapd", "-4", "-b", self.address, "-p", str(SFCAPD), "-w", str(self._directory / "flows")
        )
        self._listens(SFCAPD)
        return found

    def _sfacctd(self) -> subprocess.Popen[bytes]:
        config = {
            "daemonize": "false",
            "debug": "false",
            "sfacctd_ip": self.address,
            "sfacctd_port": SFACCTD,
            "sfacctd_disable_checks": "false",
            "sfacctd_renormalize": "false",
            "plugins": "print[all]",
            "plugin_pipe_size": 10_240_000,
            "plugin_buffer_size": 10_240,
            "aggregate[all]": "src_host, dst_host, in_iface, out_iface",
            "print_refresh_time[all]": 3600,
            "print_output[all]": "json",
            "print_output_file[all]": self._directory / "accounted.json",
        }
        path = self._directory / "sfacctd.conf"
        path.write_text("".join(f"{key}: {value}\n" for key, value in config.items()))
        found = self._start("sfacctd", "sfacctd", "-f", str(path))
        self._listens(SFACCTD)
        return found

    def _plain(self) -> None:
        with netns.entered(netns.path(self._namespace)):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._stack.callback(made.close)
        made.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        made.bind((self.address, PLAIN))
        made.settimeout(0.1)
        ended = threading.Event()

        def receive() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    self.datagrams.append(made.recv(65536))

        thread = threading.Thread(target=receive)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(ended.set)

    def _listens(self, port: int) -> None:
        """Bound, as /proc/net/udp of the namespace says."""
        number = int(ipaddress.IPv4Address(self.address))
        local = f"{socket.htonl(number):08X}:{port:04X}"
        command = netns.inside(self._namespace, ["cat", "/proc/net/udp"])
        wait_until(lambda: local in subprocess.check_output(command, text=True), f"a collector listens at {port}")

    def stop(self) -> None:
        """Both daemons write what they have."""
        for process in (self._capd, self._acctd):
            process.send_signal(signal.SIGINT)
            process.wait(30)
        wait_until(lambda: "Purging cache - END" in self._log("sfacctd"), "sfacctd has written what it has")

    def close(self) -> None:
        self._stack.close()

    # ---- what they say ----

    def read(self) -> list[Datagram]:
        """All datagrams so far, as the plain receiver got them. Raises Malformed."""
        return [read(data) for data in list(self.datagrams)]

    def complaints(self) -> list[str]:
        """Lines of the daemons' logs that warn, after `stop`."""
        lines = [line for name in ("sfcapd", "sfacctd") for line in self._log(name).splitlines()]
        lines = [line for line in lines if "'--build=" not in line]  # how it was compiled
        return [line for line in lines if _COMPLAINT.search(_SUMMARY.sub("", line))]

    def _log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text(errors="replace")

    def nfdump(self) -> tuple[int, int]:
        """(packets, bytes with FCS) that sfcapd has stored: samples scaled by the rate."""
        command = ["nfdump", "-R", str(self._directory / "flows"), "-q", "-N", "-o", "fmt:%pkt %byt"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
        numbers = [[int(word) for word in line.split()] for line in lines if line.strip()]
        return sum(one[0] for one in numbers), sum(one[1] for one in numbers)

    def pmacct(self) -> tuple[int, int, set[tuple[int, int]]]:
        """(samples, bytes of their frames with FCS, {(input, output)}) that sfacctd has accounted."""
        text = (self._directory / "accounted.json").read_text()
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        ways = {(int(row["iface_in"]), int(row["iface_out"])) for row in rows}
        return sum(row["packets"] for row in rows), sum(row["bytes"] for row in rows), ways

    def tshark(self) -> list[str]:
        """What Wireshark's dissector finds wrong with the datagrams, a line each: malformed, or a warning and above."""
        path = self._directory / "datagrams.pcap"
        path.write_bytes(_pcap(self.datagrams))
        fields = ["-e", "frame.number", "-e", "_ws.malformed", "-e", "_ws.expert.message", "-e", "sflow_245.version"]
        command = ["tshark", "-r", str(path), "-d", f"udp.port=={SFCAPD},sflow", "-T", "fields", *fields]
        command += ["-Y", "not sflow_245.version or _ws.malformed or _ws.expert.severity >= 6291456"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        return found.stdout.splitlines()


@contextlib.contextmanager
def rig(namespace: str, address: str, directory: Path) -> Iterator[Rig]:
    made = Rig(namespace, address, directory)
    try:
        yield made
    finally:
        made.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # sfacctd, which hears only SIGINT, has nothing to write any more
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pcap(datagrams: Sequence[bytes]) -> bytes:
    """Each in UDP in IPv4, link type 101 (raw IP)."""
    parts = [struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)]
    for data in datagrams:
        udp = struct.pack("!HHHH", 40000, SFCAPD, 8 + len(data), 0) + data
        packet = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), bytes(4)) + udp
        parts.append(struct.pack("=IIII", 0, 0, len(packet), len(packet)) + packet)
    return b"".join(parts)


# ---- one continuous source ----


def assert_continuous(told: Sequence[Datagram]) -> None:
    """One sub-agent that never began anew: no number is left out, comes twice or goes back."""
    assert told, "nothing was told"
    assert len({(one.agent, one.sub_agent) for one in told}) == 1
    flows = [flow for one in told for flow in one.flows]
    counters = [sample for one in told for sample in one.counters]
    _consecutive("datagrams", [one.sequence for one in told])
    _consecutive("flow samples", [flow.sequence for flow in flows])
    _consecutive("counter samples", [sample.sequence for sample in counters])
    _growing("uptime", [one.uptime_ms for one in told])
    _growing("drops", [flow.drops for flow in flows])
    for name in ("in_octets", "in_unicast", "out_octets", "out_unicast"):
        _growing(name, [sample.values[name] for sample in counters])
    assert len({flow.source for flow in flows} | {sample.source for sample in counters}) <= 1


def _consecutive(what: str, numbers: Sequence[int]) -> None:
    bad = [(one, other) for one, other in pairwise(numbers) if other != one + 1]
    assert not bad, f"{what}: not one after the other: {bad[:5]}"
    assert not numbers or numbers[0] == 1, f"{what} begin with {numbers[0]}"


def _growing(what: str, numbers: Sequence[int]) -> None:
    bad = [(one, other) for one, other in pairwise(numbers) if other < one]
    assert not bad, f"{what} goes back: {bad[:5]}"


def four_sigma(estimate: float, truth: float, variance: float) -> None:
    """The estimate is within 4 standard deviations of the truth: missed once in 16,000 if it is unbiased."""
    assert abs(estimate - truth) <= 4 * variance**0.5, f"{estimate} for {truth}: 4 sigma are {4 * variance**0.5:.0f}"
