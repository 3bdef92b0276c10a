"""libvirt's hook on this host: put it there, take it away, see whether it works. Calls no libvirt.

The hook is a file of its own in `hooks/qemu.d/`, which libvirt runs after `hooks/qemu` and beside whatever else is
there, in the order of names. libvirtd looks once, when it starts, whether there is any hook for QEMU at all: only the
very first one needs a reload (SIGHUP) or a restart to be seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datapath.errors import FeatureMissing
from migrator.errors import ConfigInvalid

DIRECTORY = Path("/etc/libvirt/hooks")
NAME = "90-migrator"
CONFIG = Path("/etc/migrator/hook.conf")
HOOK_SOCKET = "/run/migrator/hook.sock"
TOLD = Path("/run/migrator")
MARK = b"urn:vm-netstate-migrator:ports:"
DAEMONS = ("libvirtd", "virtqemud")
ASK_S = 2.0


@dataclass(frozen=True)
class Daemon:
    """A libvirt daemon of this host. `sees`: it has found a hook for QEMU when it started, or was told since."""

    pid: int
    name: str
    started: float  # seconds since the epoch
    sees: bool


def source() -> Path:
    """The hook as this version has it: in the package, or in the tree that is run from."""
    package = Path(__file__).parents[2]
    packaged = package / "_hooks" / "qemu"
    return packaged if packaged.exists() else package.parent / "hooks" / "qemu"


def target(directory: Path = DIRECTORY) -> Path:
    return directory / "qemu.d" / NAME


def state(directory: Path = DIRECTORY) -> str:
    """absent, current, different (of another version), not executable, or foreign (not ours)."""
    path = target(directory)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return "absent"
    except OSError as error:
        raise FeatureMissing(f"{path}: {error.strerror}", hint="run it as root") from error
    if MARK not in content:
        return "foreign"
    if not os.access(path, os.X_OK):
        return "not executable"
    return "current" if content == source().read_bytes() else "different"


def others(directory: Path = DIRECTORY) -> list[Path]:
    """Other hooks for QEMU that libvirt runs on this host. Folders in qemu.d belong to dispatchers: they are none."""
    found = [directory / "qemu", *sorted((directory / "qemu.d").glob("*"))]
    return [path for path in found if path != target(directory) and path.is_file() and os.access(path, os.X_OK)]


def install(directory: Path = DIRECTORY, *, dry_run: bool = False) -> bool:
    """Put the hook there; False when it is there already. Raises ConfigInvalid, FeatureMissing."""
    path, present = target(directory), state(directory)
    if present == "current":
        return False
    if present == "foreign":
        raise ConfigInvalid(f"{path} is another program's", hint="move it away or rename it")
    if not directory.parent.is_dir():
        raise FeatureMissing(f"{directory.parent} does not exist", hint="install libvirt's daemon, or name --directory")
    if not dry_run:
        _write(path, present)
    return True


def _write(path: Path, present: str) -> None:
    """As a whole or not at all. One that replaces another keeps its time: libvirtd has seen that one."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(source().read_bytes())
        made.chmod(0o755)
        if present == "different":
            since = path.stat().st_mtime
            os.utime(made, (since, since))
        made.replace(path)
    except OSError as error:
        raise FeatureMissing(f"{path}: {error.strerror}", hint="run it as root") from error
    finally:
        made.unlink(missing_ok=True)


def uninstall(directory: Path = DIRECTORY, *, dry_run: bool = False) -> bool:
    """Remove what `install` puts there; False when it is not there. Raises ConfigInvalid for what is not ours."""
    path, present = target(directory), state(directory)
    if present == "absent":
        return False
    if present == "foreign":
        raise ConfigInvalid(f"{path} is another program's", hint="it was left alone")
    if not dry_run:
        try:
            path.unlink()
        except OSError as error:
            raise FeatureMissing(f"{path}: {error.strerror}", hint="run it as root") from error
    return True


def daemons(directory: Path = DIRECTORY) -> list[Daemon]:
    """libvirt's daemons that see the same files as we do."""
    first = _first_hook(directory)
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # it may end at any moment
            if process.name.isdigit() and (process / "comm").read_text().strip() in DAEMONS and _here(process):
                started = _started(process)
                name = (process / "comm").read_text().strip()
                # it is told when the hook is there: the same tick of the clock is soon enough
                sees = first is not None and (first < started or max(first, started) <= _told(int(process.name)))
                found.append(Daemon(int(process.name), name, started, sees))
    return sorted(found, key=lambda daemon: daemon.pid)


def reload(daemon: Daemon) -> None:
    """Have a daemon look for hooks again; what it runs is not touched."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(daemon.pid, signal.SIGHUP)
        with contextlib.suppress(OSError):  # then `status` says it once more than it need
            note = _note(daemon.pid)
            note.parent.mkdir(exist_ok=True)
            note.touch()


def _note(pid: int) -> Path:
    """Its time is when that process was told to look for hooks: no other sign of it is to be had."""
    return TOLD / f"libvirtd-{pid}.told"


def _told(pid: int) -> float:
    try:
        return _note(pid).stat().st_mtime
    except OSError:
        return 0.0


def _first_hook(directory: Path) -> float | None:
    """Since when there is a hook for QEMU at all."""
    times = [max(path.stat().st_mtime, path.stat().st_ctime) for path in others(directory)]
    if state(directory) in {"current", "different"}:
        times.append(target(directory).stat().st_mtime)
    return min(times, default=None)


def _here(process: Path) -> bool:
    return os.readlink(process / "ns" / "mnt") == os.readlink("/proc/self/ns/mnt")  # noqa: PTH115 (no path)


def _started(process: Path) -> float:
    ticks = int((process / "stat").read_text().rpartition(")")[2].split()[19])
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def hook_socket() -> Path:
    """The socket that the hook will use: its own file says so."""
    found = HOOK_SOCKET
    with contextlib.suppress(OSError):
        for line in CONFIG.read_text().splitlines():
            key, _, value = line.partition("#")[0].partition("=")
            if key.strip() == "socket":
                found = value.strip().strip("\"'")
    return Path(found)


def ask_agent(path: Path) -> dict[str, Any]:
    """What the agent says of its hook socket: host, hooks (asked since its start). Raises FeatureMissing."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.settimeout(ASK_S)
            agent.connect(str(path))
            agent.sendall(b'{"op": "status"}\n')
            with agent.makefile("rb") as lines:
                answer = json.loads(lines.readline())
    except (OSError, ValueError) as error:
        raise FeatureMissing(
            f"no agent answers at {path}: {error}", hint='is it running, with driver = "libvirt" in [guests]?'
        ) from error
    return dict(answer)
