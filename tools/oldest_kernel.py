#!/usr/bin/python3
"""Run a command on the oldest Linux that is promised: Debian 12's own 6.1, in a virtual machine, on this checkout.

    tools/oldest_kernel.py .venv/bin/python -m pytest tests/bpf

The machine is emulated (no KVM needed) and sees this host's file system, read-only and with an overlay that is
forgotten afterwards. It has no network. The kernel package is downloaded once and unpacked to .cache/; it is not
installed.

Exit code: the command's; 69 when something that is needed cannot be had (stderr says what); 124 past the deadline.
Needs root, qemu-system-x86 and its virtiofsd, busybox-static, and for the first run a Debian mirror with that kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from guest_kernel import BUSYBOX, ROOT, Unavailable, archive, entry, image, insertions, kernel, module_entries, modules

QEMU = "qemu-system-x86_64"
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
BOOT_MODULES = ("virtio_pci", "virtiofs", "overlay")  # before there is a root; the kernel asks for the others itself
_DIRECTORIES = ("bin", "checkout", "dev", "host", "lib", "over", "proc", "root")
MEMORY = "1536M"
EX_UNAVAILABLE, TIMED_OUT = 69, 124
_SOCKET_S = 10

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
{insert}
mount -t proc proc /proc
echo /bin/modprobe > /proc/sys/kernel/modprobe
mount -t virtiofs -o ro host /host
mount -t tmpfs tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work overlay /root
mount -t proc proc /root/proc
mount -t sysfs sysfs /root/sys
mount -t devtmpfs devtmpfs /root/dev
mkdir /root/dev/net && mknod /root/dev/net/tun c 10 200
mount --bind /root{root} /checkout
for directory in tmp run var/tmp; do mount -t tmpfs tmpfs /root/$directory; done
mkdir -p /root{root} && mount --bind /checkout /root{root}
ip link set lo up
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp NO_COLOR=1 PYTHONDONTWRITEBYTECODE=1
chroot /root /bin/sh -c {command}
echo $? > /root/dev/ttyS1
poweroff -f
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deadline", type=float, default=1800, metavar="SECONDS", help="of the whole run")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        return run(options.command or ["uname", "-a"], options.deadline)
    except Unavailable as error:
        print(f"oldest kernel: {error}", file=sys.stderr)
        return EX_UNAVAILABLE


def run(command: list[str], deadline_s: float) -> int:
    """Boot, run the command at the root of the checkout with its output on stdout, power off. Returns its exit code."""
    _prerequisites()
    release = kernel()
    with tempfile.TemporaryDirectory(prefix="oldest-kernel-") as name:
        directory = Path(name)
        (directory / "initrd").write_bytes(_initrd(release, f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}"))
        with _shared_root(directory / "fs"):
            machine = subprocess.Popen(_qemu(release, directory), stdin=subprocess.DEVNULL)
            try:
                machine.wait(deadline_s)
            except subprocess.TimeoutExpired:
                return TIMED_OUT
            finally:
                machine.kill()
                machine.wait()
        status = (directory / "status").read_text().strip()
    if not status:
        raise Unavailable("the machine ended before the command did; see its console above")
    return int(status)


def _qemu(release: Path, directory: Path) -> list[str]:
    arguments = f"""{QEMU} -nodefaults -no-user-config -display none -no-reboot -machine q35 -accel tcg -cpu max -smp 1
        -m {MEMORY} -object memory-backend-memfd,id=memory,size={MEMORY},share=on -numa node,memdev=memory
        -chardev socket,id=fs,path={directory}/fs -device vhost-user-fs-pci,chardev=fs,tag=host
        -serial stdio -serial file:{directory}/status -kernel {image(release)}
        -initrd {directory}/initrd"""
    return [*arguments.split(), "-append", "console=ttyS0 quiet panic=-1 mitigations=off"]


@contextlib.contextmanager
def _shared_root(socket: Path) -> Iterator[None]:
    """This host's file system for the machine, which mounts it read-only."""
    command = [str(VIRTIOFSD), f"--socket-path={socket}", "-o", "source=/,sandbox=chroot,cache=always", "-f"]
    with socket.with_suffix(".log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            end = time.monotonic() + _SOCKET_S
            while not socket.exists():
                if server.poll() is not None or time.monotonic() > end:
                    raise Unavailable(f"{VIRTIOFSD}: {Path(log.name).read_text().strip()}")
                select.select([], [], [], 0.01)
            yield
        finally:
            server.terminate()
            server.wait()


def _prerequisites() -> None:
    """Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("needs root, to share the file system with the machine")
    if os.uname().machine != "x86_64":
        raise Unavailable(f"no machine for {os.uname().machine}")
    for path, package in ((shutil.which(QEMU), "qemu-system-x86"), (VIRTIOFSD, "qemu-system-common")):
        if path is None or not Path(path).exists():
            raise Unavailable(f"install {package}")


def _initrd(release: Path, command: str) -> bytes:
    """An archive with busybox, the modules that reach the file system, and an init that runs the command."""
    needed = modules(release, BOOT_MODULES)
    parts = [entry(name, 0o40755) for name in _DIRECTORIES]
    parts.append(entry("dev/console", 0o20600, device=(5, 1)))
    parts.append(entry("bin/busybox", 0o100755, BUSYBOX.read_bytes()))
    parts.append(entry("lib/modules", 0o120777, f"/host{release}/lib/modules".encode()))
    filled = {"insert": insertions(needed), "command": shlex.quote(command), "root": shlex.quote(str(ROOT))}
    parts.append(entry("init", 0o100755, _INIT.format(**filled).encode()))
    return archive([*parts, *module_entries(needed)])


if __name__ == "__main__":
    sys.exit(main())
