# SPDX-License-Identifier: GPL-2.0-only
"""What guests boot: Debian's kernel, and an archive with busybox, virtio-net and guestd.

Built once, kept in .cache/.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools import guest_kernel

SOURCE = Path(__file__).resolve().parents[1] / "guest"
CACHE = guest_kernel.ROOT / ".cache" / "libvirt-guest"
MODULES = ("virtio_pci", "virtio_net")
COMPILER = (os.environ.get("CLANG", "clang-19"), "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE")


@dataclass(frozen=True)
class Image:
    kernel: Path
    initrd: Path


def image() -> Image:
    """The files, built when a source has changed. Raises guest_kernel.Unavailable, LabError."""
    release = guest_kernel.kernel()
    initrd = CACHE / f"initrd-{_fingerprint(release)}"
    if not initrd.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            made = Path(directory, "initrd")
            made.write_bytes(_archive(release, _guestd(Path(directory))))
            made.rename(initrd)
    return Image(guest_kernel.image(release), initrd)


def _fingerprint(release: Path) -> str:
    digest = hashlib.sha256(release.name.encode())
    for file in (*sorted(SOURCE.iterdir()), Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _guestd(directory: Path) -> bytes:
    program = directory / "guestd"
    subprocess.run([*COMPILER, "-o", str(program), *map(str, sorted(SOURCE.glob("*.c")))], check=True)
    return program.read_bytes()


def _archive(release: Path, guestd: bytes) -> bytes:
    modules = guest_kernel.modules(release, MODULES)
    init = (SOURCE / "init").read_text().replace("@INSERT@", guest_kernel.insertions(modules))
    entries = [guest_kernel.entry(name, 0o40755) for name in ("bin", "dev", "proc", "sys")]
    entries += [
        guest_kernel.entry("dev/console", 0o20600, device=(5, 1)),
        guest_kernel.entry("bin/busybox", 0o100755, guest_kernel.BUSYBOX.read_bytes()),
        guest_kernel.entry("guestd", 0o100755, guestd),
        guest_kernel.entry("init", 0o100755, init.encode()),
    ]
    return guest_kernel.archive([*entries, *guest_kernel.module_entries(modules)])
