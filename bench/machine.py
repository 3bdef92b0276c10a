"""What figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def describe() -> dict[str, object]:
    """Of the machine and of what is measured. Figures of two runs are comparable when these are the same."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name"),
        "cpus": os.cpu_count(),
        "memory_mib": int(_line("/proc/meminfo", "MemTotal").split()[0]) >> 10,
        "kernel": platform.release(),
        "virtual": "hypervisor" in _line("/proc/cpuinfo", "flags").split(),
        "python": platform.python_version(),
        "revision": _revision(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def busy(seconds: float = 2) -> float:
    """CPUs that others use now, and that the hypervisor took away: what figures of the next minutes are beside.

    The load average of a minute would tell the benchmark before.
    """
    before, began = _idle(), time.monotonic()
    time.sleep(seconds)
    idle, lasted = _idle() - before, time.monotonic() - began
    return round(max(0.0, (os.cpu_count() or 1) - idle / lasted), 2)


def _idle() -> float:
    """Seconds that all CPUs together had nothing to do, see proc_stat(5)."""
    values = Path("/proc/stat").read_text().splitlines()[0].split()
    return (int(values[4]) + int(values[5])) / os.sysconf("SC_CLK_TCK")


def _line(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return "0"


def _revision() -> str:
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
