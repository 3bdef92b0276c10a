"""Debian's own kernel for emulated machines, unpacked and not installed, and the archives that such machines boot from.

    release = kernel()                                  .cache/oldest-kernel/linux-image-6.1.…
    files = [entry("init", 0o100755, script), ...]
    initrd = archive([*files, *module_entries(modules(release, ("virtio_net",)))])

The package is downloaded once. Everything that cannot be had raises Unavailable, which says what to install.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "oldest-kernel"
META_PACKAGE = "linux-image-cloud-amd64"
VERSION = "6.1"
BUSYBOX = Path("/bin/busybox")


class Unavailable(Exception):
    """Something that the machine needs is not here."""


def kernel() -> Path:
    """The unpacked package, its modules indexed. Raises Unavailable."""
    if not BUSYBOX.exists():
        raise Unavailable("install busybox-static")
    there = sorted(CACHE.glob(f"linux-image-{VERSION}.*"))
    return there[-1] if there else _download()


def image(release: Path) -> Path:
    """What QEMU's -kernel takes."""
    return next((release / "boot").glob("vmlinuz-*"))


def modules(release: Path, names: Sequence[str]) -> list[Path]:
    """Files of the modules called `names`, each after those that it needs."""
    (directory,) = (release / "lib" / "modules").iterdir()
    lines = (line.partition(":") for line in (directory / "modules.dep").read_text().splitlines())
    needs = {path: others.split() for path, _, others in lines}
    ordered: dict[str, None] = {}

    def add(path: str) -> None:
        for other in needs[path]:
            add(other)
        ordered[path] = None

    for path in [path for name in names for path in needs if Path(path).stem == name]:
        add(path)
    return [directory / path for path in ordered]


def module_entries(files: Iterable[Path]) -> list[bytes]:
    """Modules as members of an archive, at /modules; `insertions` loads them."""
    return [entry("modules", 0o40755), *(entry(f"modules/{one.name}", 0o100644, one.read_bytes()) for one in files)]


def insertions(files: Iterable[Path]) -> str:
    """Lines of shell that load modules from where `module_entries` put them."""
    return "\n".join(f"/bin/busybox insmod /modules/{one.name}" for one in files)


def archive(entries: Iterable[bytes]) -> bytes:
    """A cpio archive in the "newc" format (the kernel's driver-api/early-userspace/buffer-format)."""
    return b"".join([*entries, entry("TRAILER!!!", 0)])


def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One member of an archive; `mode` with its type."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _download() -> Path:
    package = _package()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=CACHE) as name:
        directory = Path(name)
        _output("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=directory)
        (packed,) = directory.glob("*.deb")
        unpacked = directory / package
        _output("dpkg-deb", "-x", str(packed), str(unpacked))
        release = package.removeprefix("linux-image-")
        _output(str(BUSYBOX), "depmod", "-b", str(unpacked), release)
        with contextlib.suppress(OSError):  # another run was faster
            unpacked.rename(CACHE / package)
    return CACHE / package


def _package() -> str:
    """Name of the kernel's package: the meta package depends on it."""
    for line in _output("apt-cache", "depends", META_PACKAGE).splitlines():
        name = line.partition("Depends: ")[2]
        if name.startswith(f"linux-image-{VERSION}."):
            return name
    raise Unavailable(f"{META_PACKAGE} of this distribution is not Linux {VERSION}, or apt-get update is due")


def _output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Unavailable(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout
