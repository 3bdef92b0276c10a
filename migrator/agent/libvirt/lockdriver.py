"""libvirt's lock driver of ours on this host: put it there, take it away, see whether libvirtd has loaded it.

libvirtd opens `lock-driver/NAME.so` beside its other modules when qemu.conf says lock_manager = "NAME", once, at its
start: both need a restart of it. It does not start when the file is missing, so the file comes first and goes last.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from datapath.errors import FeatureMissing
from migrator.agent.libvirt import installation
from migrator.errors import ConfigInvalid

NAME = "migrator"
FILE = f"{NAME}.so"
QEMU_CONF = Path("/etc/libvirt/qemu.conf")
REMARK = "# by `migrator libvirt install --strict`: see docs/strict-mode.md"
NETWORK = "/proc/self/ns/net"
_SETTING = re.compile(r"""^\s*lock_manager\s*=\s*["']([^"']*)["']""", re.MULTILINE)
_LIBRARIES = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib")
_BESIDE = ("lock-driver", "connection-driver")  # of what libvirt's packages put there


def source() -> Path:
    """The driver as this version has it: in the package, or in the tree that is run from. Raises FeatureMissing."""
    package = Path(__file__).parents[2]
    for path in (package / "_hooks" / FILE, package.parent / "hooks" / "lock" / FILE):
        if path.exists():
            return path
    raise FeatureMissing("the lock driver has not been built", hint="`make lock-driver`, or install the wheel")


def directory() -> Path:
    """Where libvirtd looks for lock drivers. Raises FeatureMissing."""
    for pattern in _LIBRARIES:
        for library in sorted(Path("/").glob(pattern.lstrip("/"))):
            if any((library / "libvirt" / name).is_dir() for name in _BESIDE):
                return library / "libvirt" / "lock-driver"
    raise FeatureMissing("libvirt's modules are not found", hint="name the directory of its lock drivers")


def configured(conf: Path = QEMU_CONF) -> str:
    """The lock manager that qemu.conf names, "" for none."""
    found = _SETTING.findall(_read(conf))
    return str(found[-1]) if found else ""


def install(place: Path, conf: Path = QEMU_CONF, *, dry_run: bool = False) -> bool:
    """Put the driver there and have qemu.conf name it; False when all is so already.

    Raises ConfigInvalid when it names another, FeatureMissing.
    """
    present = configured(conf)
    if present not in {"", "nop", NAME}:
        raise ConfigInvalid(
            f'{conf} has lock_manager = "{present}", and libvirtd loads one only',
            hint="docs/strict-mode.md says what is lost without it",
        )
    content, target = source().read_bytes(), place / FILE
    same = target.exists() and target.read_bytes() == content
    if same and present == NAME:
        return False
    if not dry_run:
        if not same:
            _replace(target, content, 0o644)
        if present != NAME:
            _replace(conf, f'{_without(conf)}{REMARK}\nlock_manager = "{NAME}"\n'.encode(), 0o600)
    return True


def uninstall(place: Path, conf: Path = QEMU_CONF, *, dry_run: bool = False) -> bool:
    """Remove what `install` puts there; False when qemu.conf does not name it. libvirtd keeps what it has loaded."""
    if configured(conf) != NAME:
        return False
    if not dry_run:
        _replace(conf, _without(conf).encode(), 0o600)
        target = place / FILE
        try:
            target.unlink(missing_ok=True)
        except OSError as error:
            raise FeatureMissing(f"{target}: {error.strerror}", hint="run it as root") from error
    return True


def missing() -> str:
    """Why the libvirtd of this host would start a VM without asking, "" when it asks."""
    daemons = list(_daemons())
    if not daemons:
        return "no libvirtd is seen on this host"
    for process, name in daemons:
        try:
            loaded = f"/{FILE}" in (process / "maps").read_text()
        except OSError as error:
            return f"it cannot be seen what {name} has loaded: {error.strerror}"
        if not loaded:
            return f"{name} (process {process.name}) has not loaded the lock driver"
    return ""


def _daemons() -> Iterator[tuple[Path, str]]:
    """Directory in /proc and name of libvirt's daemons. They share our network; files a service may see its own way."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end at any moment
            name = (process / "comm").read_text().strip()
            if name in installation.DAEMONS and os.readlink(process / "ns" / "net") == os.readlink(NETWORK):  # noqa: PTH115
                yield process, name


def _without(conf: Path) -> str:
    """The file without a setting of a lock manager and our remark on it."""
    lines = _read(conf).splitlines(keepends=True)
    kept = [line for line in lines if line.strip() != REMARK and not _SETTING.match(line)]
    text = "".join(kept)
    return text if not text or text.endswith("\n") else f"{text}\n"


def _read(conf: Path) -> str:
    try:
        return conf.read_text()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeError) as error:
        raise FeatureMissing(f"{conf}: {error}", hint="run it as root") from error


def _replace(path: Path, content: bytes, mode: int) -> None:
    """As a whole or not at all, never in place: a libvirtd may have it mapped. One that is there keeps its mode."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(content)
        made.chmod(path.stat().st_mode & 0o7777 if path.exists() else mode)
        made.replace(path)
    except OSError as error:
        raise FeatureMissing(f"{path}: {error.strerror}", hint="run it as root") from error
    finally:
        made.unlink(missing_ok=True)
