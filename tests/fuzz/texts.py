"""Targets: texts that operators, libvirt and the disk hand in: documents, configuration, XML, JSON lines, journals."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import msgpack

from datapath.errors import Error
from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.agent.config import read_config
from migrator.agent.frames import KEPT, TakenFrames
from migrator.agent.libvirt import hooksocket, locking
from migrator.agent.libvirt.domain import XML_BYTES_MAX, device_names, parse, placed, with_devices
from migrator.agent.orders import need_of
from migrator.agent.store import Store
from migrator.coordinator import running
from migrator.coordinator.settings import load
from migrator.documents import read_documents
from migrator.errors import ConfigInvalid
from migrator.lifecycle import coordinator as machine
from migrator.packet import describe
from tests.unit.test_libvirt_domain import FULL, PLAIN, domain, interface

from .hook import hook
from .target import Target

ROOT = Path(__file__).parents[2]
VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"


def text_of(data: bytes) -> str:
    return data.decode(errors="replace")


@cache
def scratch() -> Path:
    """A directory of this process for readers that take files."""
    directory = tempfile.TemporaryDirectory(prefix="fuzz-")
    scratch.directory = directory  # type: ignore[attr-defined]
    return Path(directory.name)


# ---- documents of operators ----


def document(data: bytes) -> None:
    """Read or refused; what was read survives the way over RPC."""
    for name in ("x.yaml", "x.toml"):
        with suppress(ConfigInvalid):
            read = read_documents(text_of(data), name)
            assert config.from_message(config.to_message(read), config.Config) == read, "changes on the way"


def documents() -> Iterator[bytes]:
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        text = path.read_bytes()
        yield text
        yield from text.split(b"---\n")
    yield b'[[networks]]\nname = "blue"\nkind = "overlay"\nvni = 7\n[[ports]]\nvm = "%s"\n' % VM.encode()
    yield b"networks: [&n {name: blue, kind: local}, *n]\nports: [{trunk: {20: red}, vm: x, mac: 52-54-00-00-00-01}]"


def settings(data: bytes) -> None:
    """The daemons' own configuration files."""
    path = scratch() / "daemon.toml"
    path.write_bytes(data)
    with suppress(ConfigInvalid):
        read_config(path)
    with suppress(ConfigInvalid):
        load(path)


def configurations() -> Iterator[bytes]:
    yield b'[agent]\nhost = "a"\nlisten = "0.0.0.0:7401"\n[driver]\nname = "ebpf"\n[migration]\nlease_s = 1.5\n'
    yield b'[coordinator]\nlisten = ["127.0.0.1:7400", "unix:/run/x"]\n[coordinator.deadlines]\nstage_s = 3\n'


# ---- libvirt ----


def xml(data: bytes) -> None:
    """A domain that is read can be rewritten, and its ports are the same then, on the devices that were asked for."""
    text = text_of(data)
    with suppress(ConfigInvalid):
        found = parse(text)
        placed(found.ports, "host")
        wanted = device_names(found)
        again = parse(with_devices(text, wanted))
        assert [port.mac for port in again.ports] == [port.mac for port in found.ports]
        assert all(port.device == wanted.get(port.mac, port.device) for port in again.ports), "the name is not there"


def domains() -> Iterator[bytes]:
    for ports in (FULL, PLAIN, None, ""):
        yield domain(ports).encode()
    yield domain(PLAIN, interface(device="vnet3")).encode()
    yield domain(PLAIN, interface("ethernet", device="", inside="<mtu size='1400'/>")).encode()
    yield domain(PLAIN, interface("hostdev"), interface(mac="52:54:00:00:00:11")).encode()
    yield domain(FULL, lead="lead='no' downtime-ms='250' max-passes='3' strict='yes'").encode()


def hook_socket(data: bytes) -> None:
    """One line from the hook or the lock driver: texts by name, or refused."""

    async def read() -> Mapping[str, str]:
        reader = asyncio.StreamReader(limit=hooksocket.LINE_BYTES)
        reader.feed_data(data)
        reader.feed_eof()
        return await hooksocket._read(reader)

    with suppress(Error):
        request = asyncio.run(read())
        assert all(type(key) is str and type(value) is str for key, value in request.items())
        json.dumps(request).encode()  # as the log and an answer would
        locking._vm(request)


def lines() -> Iterator[bytes]:
    for request in (
        {"op": "hook", "domain": "shop", "operation": "migrate", "sub": "begin", "extra": "-", "xml": "<domain/>"},
        {"op": "release", "uuid": VM, "pid": 77},
        {"op": "acquire", "uuid": VM.replace("-", ""), "pid": 77},
    ):
        yield json.dumps(request).encode() + b"\n"


# ---- what the disk gives back ----


def kept(data: bytes) -> None:
    """Files of the agent: read, or put aside."""
    directory = scratch() / "state"
    store = Store(directory)
    for path in ("sync.pb", "ended.json", "migrations/m.source.json"):
        (directory / path).write_bytes(data)
    store.sync()
    store.ended()
    for end in store.ends():
        assert end.keys() >= {"id", "role", "vm", "state", "order"}
    frames = directory / "migrations" / "m.frames"
    frames.write_bytes(data)
    taken, doubtful = TakenFrames(frames).recall()
    assert doubtful >= 0
    for mac, some in taken.items():
        assert isinstance(mac, str) and all(isinstance(frame, bytes) for frame in some)
    store.close()


def kept_files() -> Iterator[bytes]:
    yield json.dumps({"id": "m", "role": "source", "vm": VM, "state": {"phase": "copying"}, "order": "0a0162"}).encode()
    yield json.dumps({VM: 3}).encode()
    yield KEPT + msgpack.packb({"52:54:00:00:00:01": [b"frame", b"other"]})
    sync = pb.Sync(revision=3, hosts={"a": "10.0.0.1"})
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        store.save_sync(sync)
        yield (Path(directory) / "sync.pb").read_bytes()


def journal(data: bytes) -> None:
    """A migration in the coordinator's journal, and the ports' records in a coordinator's order."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # what Migrations says of such a row
        running.decode(data, pb.Migration())
    with suppress(Error):
        need_of(pb.Need(records=data), {})


def journals() -> Iterator[bytes]:
    samples = {"str": VM, "int": 7, "bool": False, "float": 1.5}
    agreed = running.Agreed(
        **{field.name: samples[str(field.type)] for field in fields(running.Agreed) if str(field.type) in samples}
    )
    yield running.Running(agreed, machine.begin()[0], pb.Migration()).encode()
    yield msgpack.packb([{"mac": "52:54:00:00:00:01", "network": "blue"}])
    yield json.dumps(asdict(agreed)).encode()


# ---- frames, for people ----


def frame(data: bytes) -> None:
    line = describe(data)
    assert "\n" not in line and len(line) < 300, line


def frames() -> Iterator[bytes]:
    for text in (
        "0200000000010200000000028100000a0800450000280001400040060000c000020a0a000001" + "0050303900000001000000025002",
        "ffffffffffff020000000002080600010800060400010200000000020a0000010000000000000a000002",
        "0200000000010200000000020800450000240001200040110000c000020a0a000001003500350010000000000000",
        "02000000000102000000000286dd6000000000203aff"
        + "fe80"
        + "00" * 13
        + "01"
        + "ff02"
        + "00" * 13
        + "01"
        + "87"
        + "00" * 31,
        "02000000000102000000000286dd6000000000102c40"
        + "2001"
        + "00" * 14
        + "2001"
        + "00" * 14
        + "1100000900000001"
        + "00" * 8,
    ):
        yield bytes.fromhex(text)


YAML_WORDS = tuple(
    word.encode()
    for word in (
        *("networks:", "address_sets:", "policies:", "ports:", "rules:", "name:", "kind: ", "vni: ", "vlan: ", "mtu: "),
        *("direction: ", "protocol: ", "remote: ", "icmp: ", "action: ", "trunk: ", "timeouts_ms: ", "devices: "),
        *("!!int ", "!!float ", "!!bool ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ", "!!merge ", "!!null "),
        *("&a ", "*a", "<<: ", "? ", "| ", "---\n", "%YAML 1.1\n", "0x", "0o", "-", ".inf", "[", "{", "'", '"'),
    )
)
XML_WORDS = tuple(
    word.encode()
    for word in (
        *("<domain>", "</domain>", "<metadata>", "<devices>", "<interface type='bridge'>", "</interface>", "<name>"),
        *("<uuid>", "<mac address='52:54:00:00:00:10'/>", "<target dev='", "<port mac='52:54:00:00:00:10' ", "/>"),
        *("<!DOCTYPE a>", "<![CDATA[", "]]>", "<!--", "-->", "<?xml ", "&#0;", "&amp;", "xmlns:p='", "network='blue'"),
        *("urn:vm-netstate-migrator:ports:1", "<address>", "<trunk vlan='10' network='red'/>", "<timeout ", "strict='"),
    )
)
LIBVIRT = ("migrator.agent.libvirt.domain", "migrator.agent.libvirt.metadata", "migrator.config", "xml.etree")
TARGETS = (
    Target("document", document, documents, ("migrator.documents", "migrator.config", "yaml", "tomllib"), YAML_WORDS),
    Target(
        "configuration", settings, configurations, ("migrator.agent.config", "migrator.coordinator.settings", "tomllib")
    ),
    Target("domain-xml", xml, domains, LIBVIRT, XML_WORDS, min(16_384, XML_BYTES_MAX)),
    Target("hook-socket", hook_socket, lines, ("migrator.agent.libvirt.hooksocket", "migrator.agent.libvirt.locking")),
    Target("hook", hook.run, hook.seeds, ("migrator_qemu_hook",)),
    Target("agent-files", kept, kept_files, ("migrator.agent.store", "migrator.agent.frames")),
    Target("journal", journal, journals, ("migrator.coordinator.running", "migrator.agent.orders")),
    Target("packet-text", frame, frames, ("migrator.packet",), (), 512),
)
