# SPDX-License-Identifier: GPL-2.0-only
"""Other versions of the project: a copy of the packages with a few changes, its own BPF object and version number."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datapath.build import compile_object
from migrator.lab.processes import Daemon

ROOT = Path(__file__).parents[2]
PACKAGES = ("datapath", "migrator")
_METADATA = "Metadata-Version: 2.1\nName: vm-netstate-migrator\nVersion: {}\n"
_ENTRIES = "[migrator.drivers]\nebpf = datapath.drivers.ebpf.driver:EbpfDriver\n"


@dataclass(frozen=True)
class Edit:
    """`old`, which is in the file of the repository once, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Version:
    """`tree` holds the packages as an installation of that version would."""

    name: str
    tree: Path

    def applied(self, daemon: Daemon) -> Daemon:
        """The same daemon, to be started with this version's code."""
        command = ["env", "-C", str(self.tree), *daemon.command]  # `python -m` looks there first
        return Daemon(daemon.name, daemon.namespace, command, daemon.log)


def make_version(directory: Path, name: str, *edits: Edit, flags: Sequence[str] = ()) -> Version:
    """A version `name` below `directory`: this one with edits, the BPF programs compiled with `flags`."""
    tree = directory / name
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__", "*.o"))
    for edit in edits:
        file = tree / edit.file
        text = file.read_text()
        assert text.count(edit.old) == 1, f"{edit.file} has {edit.old!r} {text.count(edit.old)} times"
        file.write_text(text.replace(edit.old, edit.new))
    bpf = tree / "datapath" / "bpf"
    compile_object(bpf / "switch.bpf.c", bpf / "switch.bpf.o", *flags, f"-I{bpf}")
    info = tree / f"vm_netstate_migrator-{name}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(_METADATA.format(name))
    (info / "entry_points.txt").write_text(_ENTRIES)
    return Version(name, tree)
