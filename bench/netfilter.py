"""nf_conntrack of a namespace, full of connections, and what reads and writes it: the peers of our tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.figures import Took, verify
from bench.workload import connections
from migrator.lab import netns

LIMITS = ("nf_conntrack_max", "nf_conntrack_buckets")
SYSCTL = Path("/proc/sys/net/netfilter")


@dataclass
class Netfilter:
    """A namespace whose nf_conntrack has room for `count` connections, and their text for `conntrack -R`."""

    space: str
    text: Path
    count: int
    counted: set[tuple[str, ...]] = field(default_factory=set)

    def fill(self) -> Took:
        """Empty it and load all of the text. Raises Unverified."""
        self.run("conntrack", "-F")
        took = self.run("conntrack", "-R", str(self.text))
        verify("entries in nf_conntrack", self.holds(), self.count)
        return took

    def holds(self) -> int:
        command = netns.inside(self.space, ["conntrack", "-C"])
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def listed(self, *options: str) -> Took:
        """`conntrack -L` to nowhere; the first time also to a file, to count who is in it."""
        if options not in self.counted:
            output = self.text.with_name("listed")
            self.run("conntrack", "-L", *options, output=output)
            with output.open("rb") as file:
                verify(f"lines of conntrack -L {' '.join(options)}", sum(1 for _ in file), self.wanted(options))
            self.counted.add(options)
        return self.run("conntrack", "-L", *options)

    def wanted(self, options: tuple[str, ...]) -> int:
        return self.count if not {"-w", "-m"} & set(options) else MARKED

    def netlink(self, how: str) -> dict[str, Took]:
        """See bench.netlink: "dump" and, where it can, "load"."""
        command = netns.inside(self.space, [sys.executable, "-m", "bench.netlink", how, str(self.count)])
        said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for what, figures in said.items():
            verify(f"entries of {how} {what}", figures["entries"], self.count)
        if "load" in said:
            verify(f"entries after {how} load", self.holds(), self.count)
        return {what: Took(one["wall_s"], one["cpu_s"], one["peak"]) for what, one in said.items()}

    def run(self, *command: str, output: Path | None = None) -> Took:
        """Time, CPU and memory of a command in the namespace."""
        with (output or Path(os.devnull)).open("wb") as out:
            began = time.perf_counter()
            process = subprocess.Popen(netns.inside(self.space, list(command)), stdout=out, stderr=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            lasted = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        verify(" ".join(command[:2]), process.returncode, 0)
        return Took(lasted, used.ru_utime + used.ru_stime, used.ru_maxrss << 10)


MARKED = 1_000
ZONE = 7


@contextmanager
def nf_conntrack(count: int, *, marked: bool = False) -> Iterator[Netfilter]:
    """Not filled yet. With `marked` MARKED connections more, which have a mark and a zone of their own."""
    with ExitStack() as stack:
        stack.enter_context(_room(count + MARKED))
        folder = Path(tempfile.mkdtemp(prefix="bench-"))
        stack.callback(shutil.rmtree, folder)
        space = f"mg{os.getpid()}-bench"
        netns.make(space)
        stack.callback(netns.remove, space)
        text = folder / "connections"
        with text.open("w") as file:
            file.writelines(_lines(count))
            if marked:
                file.writelines(_lines(MARKED, address="192.0.2.11", more=f"--mark {ZONE} --zone {ZONE}"))
        yield Netfilter(space, text, count + MARKED * marked)


def _lines(count: int, address: str = "192.0.2.10", more: str = "") -> Iterator[str]:
    """As `conntrack -L -o save` prints them: the same connections as ours."""
    table = connections(count, address)
    remote = np.ascontiguousarray(table["raddr"]).view(np.uint8).reshape(count, 16)[:, 12:].tolist()
    for (a, b, c, d), port in zip(remote, table["rport"].tolist(), strict=True):
        client = f"{a}.{b}.{c}.{d}"
        yield (
            f"-A -t 43200 -u SEEN_REPLY,ASSURED -s {client} -d {address} -r {address} -q {client} -p tcp "
            f"--sport {port} --dport 443 --reply-port-src 443 --reply-port-dst {port} --state ESTABLISHED {more}\n"
        )


@contextmanager
def _room(count: int) -> Iterator[None]:
    """The machine's limits of nf_conntrack, raised for a while where they are too low: also its hash, to be fair."""
    with ExitStack() as stack:
        for name in LIMITS:
            file = SYSCTL / name
            before = file.read_text()
            if int(before) < count:
                stack.callback(_restorer(file, before))
                file.write_text(str(count))
        yield


def _restorer(file: Path, before: str) -> Callable[[], int]:
    return lambda: file.write_text(before)
