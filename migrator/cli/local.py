"""What commands ask of this host's agent: ports, and the state of one kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from migrator._pb import migrator_pb2 as pb
from migrator.cli.changes import declared
from migrator.cli.context import Context
from migrator.errors import ObjectNotFound
from migrator.snapshot import Section, decode_section


def find_ports(context: Context, word: str) -> list[pb.Port]:
    """Declared ports that `word` names: a VM's uuid or name, a MAC, or VM/MAC. Raises ObjectNotFound."""
    wanted = word.lower()
    ports = [p for p in declared(context).ports if wanted in (p.vm, p.mac, f"{p.vm}/{p.mac}") or word == p.name]
    if not ports:
        raise ObjectNotFound(f"no VM or port {word!r}", hint="`migrator port list` shows all")
    return ports


def here(context: Context) -> Sequence[pb.PortStatus]:
    """Port instances of this host's agent. Raises PeerLost."""
    ports: Sequence[pb.PortStatus] = context.agent.Ports(pb.Empty()).ports
    return ports


def dump(context: Context, vm: str, kind: str) -> Iterator[Section]:
    """All records of a kind of a VM's ports here, one section at a time."""
    for chunk in context.agent.Dump(pb.VmRequest(vm=vm, kind=kind), timeout=None):
        yield decode_section(chunk.data)
