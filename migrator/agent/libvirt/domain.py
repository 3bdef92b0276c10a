"""The XML of a libvirt domain, as far as it concerns its network: pure, nothing here calls libvirt or touches a device.

Which interfaces are ours the domain's metadata says (`migrator.agent.libvirt.metadata`). The text comes from whoever
may define domains and is read by a process that runs as root: documents that are too large, too deep or declare a
document type are refused before anything is made of them.
"""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.parsers import expat

from migrator._pb import migrator_pb2 as pb
from migrator.agent.libvirt.metadata import AS_CONFIGURED, ELEMENT, Lead, Metadata, port_of, read_metadata
from migrator.errors import ConfigInvalid

XML_BYTES_MAX = 4 << 20
DEPTH_MAX = 64
GENERATED = ("vnet", "vif", "macvtap", "macvlan")
"""Beginnings of device names that libvirt gives by itself, anew at each start (virNetDevGenerateName)."""
PATTERN = "p{mac6}{vm8}"
"""Device of a port whose interface has no name of its own, on every host but the one that has made one already."""

_USE = "use type='ethernet' or type='bridge'"
_KINDS: Mapping[str, tuple[str, str]] = {
    "hostdev": ("a device of the host is given to the guest (SR-IOV), and its frames pass no program", _USE),
    "vhostuser": ("another process switches its frames in user space", _USE),
    "direct": ("macvtap hands its frames to the device below, past the switch", _USE),
    "network": ("the device is libvirt's virtual network's, with addresses and rules of its own", _USE),
    "user": ("it has no device on the host", _USE),
    "internal": ("it has no device of its own on the host", _USE),
    "vdpa": ("its frames pass no program of the host", _USE),
    "null": ("it is connected to nothing", _USE),
    "server": ("it has no device on the host", _USE),
    "client": ("it has no device on the host", _USE),
    "mcast": ("it has no device on the host", _USE),
    "udp": ("it has no device on the host", _USE),
    "vds": ("its switch is not of this host", _USE),
}
_PARTS: Mapping[str, tuple[str, str]] = {
    "bandwidth": ("libvirt's own traffic shaping would sit on the same device", "remove <bandwidth>"),
    "virtualport": ("the port is another switch's", "remove <virtualport>"),
    "vlan": ("tags are the switch's business", "remove <vlan>, name the network in the metadata, trunks by <trunk>"),
    "filterref": ("frames do not pass the filters of libvirt's nwfilter", "remove <filterref>, give the port a policy"),
}
_SORTS = ("ethernet", "bridge")


@dataclass(frozen=True)
class Interface:
    """One `<interface>` of the domain."""

    mac: str  # lower case
    kind: str  # its attribute type
    device: str  # name on the host; "" when libvirt has not given one yet
    managed: bool  # libvirt makes and removes the device
    queues: int
    mtu: int  # 0: not said

    @property
    def fixed(self) -> bool:
        """The device has the same name at each start and on each host."""
        return bool(self.device) and not self.device.startswith(GENERATED)


@dataclass(frozen=True)
class Domain:
    """What a domain says of its network.

    `ours`: it has our metadata. `ports`: one for each interface that the metadata names and that can be owned; `host`
    is "", `device` as in the XML ("" none yet). `refused`: sentences, one for each named interface that cannot be
    owned. `missing`: MACs that the metadata names and no interface has (yet).
    """

    uuid: str
    name: str
    ours: bool
    interfaces: tuple[Interface, ...] = ()
    ports: tuple[pb.Port, ...] = ()
    refused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    lead: Lead = AS_CONFIGURED
    strict: bool | None = None  # as in Metadata

    @property
    def owned(self) -> tuple[Interface, ...]:
        """The interfaces of `ports`."""
        macs = {port.mac for port in self.ports}
        return tuple(interface for interface in self.interfaces if interface.mac in macs)


def parse(xml: str) -> Domain:
    """Read a domain. One without our metadata has no ports, and nothing else of it is looked at.

    Raises ConfigInvalid that names the domain, the interface by its MAC, the attribute and what was expected.
    """
    root = read_xml(xml)
    if _local(root.tag) != "domain":
        raise ConfigInvalid(f"expected a <domain>, not <{_local(root.tag)}>")
    name = (root.findtext("name") or "").strip()
    vm = _uuid(name, root.findtext("uuid") or "")
    element = root.find(f"metadata/{ELEMENT}")
    if element is None:
        return Domain(vm, name, ours=False)
    metadata = read_metadata(f"domain {name}", element)
    interfaces = tuple(_interface(name, item) for item in root.findall("devices/interface"))
    return _domain(vm, name, metadata, interfaces, root)


def _domain(
    vm: str, name: str, metadata: Metadata, interfaces: Sequence[Interface], root: ElementTree.Element
) -> Domain:
    elements = dict(zip((i.mac for i in interfaces), root.findall("devices/interface"), strict=True))
    _refuse_twins(name, interfaces)
    by_mac = {interface.mac: interface for interface in interfaces}
    refused: list[str] = []
    ports: list[pb.Port] = []
    for mac, attributes in metadata.ports.items():
        if mac not in by_mac:
            continue
        interface = by_mac[mac]
        reasons = [f"domain {name}, interface {mac}: {text}" for text in _obstacles(interface, elements[mac])]
        refused += reasons
        if not reasons:
            where = f"domain {name}, port {mac}"
            ports.append(port_of(where, vm, name, attributes, device=interface.device, mtu=interface.mtu))
    missing = tuple(mac for mac in metadata.ports if mac not in by_mac)
    what = (tuple(interfaces), tuple(ports), tuple(refused), missing)
    return Domain(vm, name, True, *what, metadata.lead, metadata.strict)


def placed(ports: Sequence[pb.Port], host: str) -> list[pb.Port]:
    """The ports as they are declared for `host`: a device that libvirt named by itself is of this host only.

    On every other host such a port is on PATTERN: the hook that runs there before a migration has the interface made
    under that name (`with_devices`).
    """
    made = []
    for port in ports:
        copy = pb.Port()
        copy.CopyFrom(port)
        if not port.device or port.device.startswith(GENERATED):
            copy.device = PATTERN
            if port.device:
                copy.devices[host] = port.device
        made.append(copy)
    return made


def device_names(domain: Domain) -> dict[str, str]:
    """MAC -> name that the interface needs on a host it comes to, for those whose name is not fixed."""
    names = {}
    for interface in domain.owned:
        if not interface.fixed:
            mac6 = interface.mac.replace(":", "")[-6:]
            names[interface.mac] = PATTERN.replace("{mac6}", mac6).replace("{vm8}", domain.uuid[:8])
    return names


def with_devices(xml: str, devices: Mapping[str, str]) -> str:
    """The domain with `<target dev>` of these interfaces (by MAC) changed. Raises ConfigInvalid as `parse`."""
    root = read_xml(xml)
    for item in root.findall("devices/interface"):
        device = devices.get(_attribute(item, "mac", "address").lower())
        if device is None:
            continue
        target = item.find("target")
        if target is None:
            target = ElementTree.SubElement(item, "target")
        target.set("dev", device)
    return ElementTree.tostring(root, encoding="unicode")


def read_xml(xml: str) -> ElementTree.Element:
    """A tree of hostile text: no document type, so no entities; bounded in size and depth. Raises ConfigInvalid."""
    if len(xml.encode(errors="surrogatepass")) > XML_BYTES_MAX:
        raise ConfigInvalid(f"domain XML of more than {XML_BYTES_MAX} bytes")
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate(namespace_separator="}")
    depth = 0

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEPTH_MAX:
            raise ConfigInvalid(f"domain XML is nested deeper than {DEPTH_MAX} elements")
        builder.start(_clark(tag), {_clark(name): value for name, value in attributes.items()})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_clark(tag))

    def refuse(*_: object) -> None:
        raise ConfigInvalid("domain XML declares a document type", hint="libvirt never writes one")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(xml, True)
        return builder.close()
    except (expat.ExpatError, AssertionError, UnicodeError) as error:
        raise ConfigInvalid(f"domain XML cannot be read: {error}") from None


def _clark(tag: str) -> str:
    return f"{{{tag}" if "}" in tag else tag


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _uuid(name: str, text: str) -> str:
    try:
        return str(uuid.UUID(text.strip()))
    except ValueError:
        raise ConfigInvalid(f"domain {name}: expected a uuid in <uuid>, not {text.strip()[:80]!r}") from None


def _interface(name: str, item: ElementTree.Element) -> Interface:
    mac = _attribute(item, "mac", "address").lower()
    if not mac:
        raise ConfigInvalid(f"domain {name}: an interface without <mac address>", hint="libvirt gives it one")
    where = f"domain {name}, interface {mac}"
    return Interface(
        mac=mac,
        kind=item.get("type", ""),
        device=_attribute(item, "target", "dev"),
        managed=_attribute(item, "target", "managed") != "no",
        queues=_number(where, "driver queues", _attribute(item, "driver", "queues") or "1"),
        mtu=_number(where, "mtu size", _attribute(item, "mtu", "size") or "0"),
    )


def _attribute(item: ElementTree.Element, child: str, name: str) -> str:
    found = item.find(child)
    return "" if found is None else found.get(name, "")


def _number(where: str, what: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise ConfigInvalid(f"{where}: {what}: expected a number, not {text[:80]!r}")
    return int(text)


def _refuse_twins(name: str, interfaces: Sequence[Interface]) -> None:
    twice = [mac for mac, count in Counter(interface.mac for interface in interfaces).items() if count > 1]
    if twice:
        raise ConfigInvalid(f"domain {name}: two interfaces have MAC {min(twice)}", hint="a port is known by its MAC")


def _obstacles(interface: Interface, item: ElementTree.Element) -> list[str]:
    """Why the interface cannot be owned, each with what to do instead; [] when it can."""
    if interface.kind not in _SORTS:
        why, instead = _KINDS.get(interface.kind, ("this kind is not known", _USE))
        return [f"type={interface.kind!r} cannot be owned: {why}; {instead}"]
    found = [f"<{tag}>: {why}; {instead}" for tag, (why, instead) in _PARTS.items() if item.find(tag) is not None]
    if _attribute(item, "port", "isolated") == "yes":
        found.append("<port isolated>: frames do not pass the bridge; give the port a policy")
    if interface.kind == "ethernet" and not interface.managed and not interface.fixed:
        found.append("managed='no' needs <target dev> with a name of its own; name a device that libvirt is to find")
    if len(interface.device) > 15 or "/" in interface.device:
        found.append(f"<target dev={interface.device[:40]!r}>: expected an interface name of at most 15 characters")
    return found
