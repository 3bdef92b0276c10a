"""Our element in a domain's `<metadata>`: which of its interfaces are ports, and what each of them is.

    <ports xmlns="urn:vm-netstate-migrator:ports:1">
      <port mac="52:54:00:00:00:10" network="blue" policy="web" connections-max="65536" mtu="1500" antispoof="yes">
        <address>10.0.0.5</address>
        <trunk vlan="10" network="red"/>
        <timeout name="tcp_established" ms="3600000"/>
      </port>
    </ports>

Elements within may be in no namespace: `virsh metadata --set` gives the outermost one ours, and no other.

Names that are not known are refused: a misspelt attribute must not leave a port without its policy. Values are checked
by the same model as an operator's (`migrator.config.Port`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from pydantic import TypeAdapter, ValidationError

from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.errors import ConfigInvalid

NAMESPACE = "urn:vm-netstate-migrator:ports:1"
ELEMENT = f"{{{NAMESPACE}}}ports"
DECLARED_BY = "libvirt"

_FIELDS: Mapping[str, str] = {
    "mac": "mac",
    "network": "network",
    "policy": "policy",
    "connections-max": "connections_max",
    "learned-max": "learned_max",
    "mtu": "mtu",
    "antispoof": "antispoof",
}
_NUMBERS = ("connections_max", "learned_max", "mtu")
_LEAD = ("lead", "downtime-ms", "max-passes")
_STRICT = "strict"
_NAME: TypeAdapter[str] = TypeAdapter(config.Name)
_CHILDREN: Mapping[str, tuple[str, ...]] = {"address": (), "trunk": ("vlan", "network"), "timeout": ("name", "ms")}


@dataclass(frozen=True)
class Lead:
    """How the moment of the pause is chosen for this VM; None: as the agent's configuration says."""

    lead: bool | None = None
    downtime_ms: int | None = None
    max_passes: int | None = None


AS_CONFIGURED = Lead()


@dataclass(frozen=True)
class Metadata:
    """The element as it is: for each MAC the fields of config.Port that it names."""

    ports: Mapping[str, Mapping[str, Any]]
    lead: Lead = AS_CONFIGURED
    strict: bool | None = None  # moved with all of its state or not at all; None: as the agent's configuration says


def read_metadata(where: str, element: Element) -> Metadata:
    """Read `<ports>`. `where` names the domain in errors. Raises ConfigInvalid."""
    _known(where, element, (*_LEAD, _STRICT), ("port",))
    ports: dict[str, Mapping[str, Any]] = {}
    for item in element:
        fields = _port(where, item)
        mac = str(fields["mac"])
        if mac in ports:
            raise ConfigInvalid(f"{where}: port {mac} is named twice in the metadata")
        ports[mac] = fields
    strict = element.get(_STRICT)
    return Metadata(ports, _lead(where, element), None if strict is None else _yes(f"{where}: <ports> strict", strict))


def port_of(where: str, vm: str, name: str, fields: Mapping[str, Any], *, device: str, mtu: int) -> pb.Port:
    """The port that the metadata's `fields` stand for. `mtu` is the interface's own, 0 none. Raises ConfigInvalid."""
    body = {"vm": vm, "device": device, "name": _label(name), "declared_by": DECLARED_BY, **fields}
    if mtu:
        body.setdefault("mtu", mtu)
    try:
        model = config.Port.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigInvalid(f"{where}: {config.where(body, first['loc'])}: {config.reason(first)}") from None
    port: pb.Port = config.to_message(model)
    return port


def _label(name: str) -> str:
    """The domain's name where it can be a VM's name for people, else "": libvirt allows nearly anything."""
    try:
        return _NAME.validate_python(name)
    except ValidationError:
        return ""


def _port(where: str, item: Element) -> dict[str, Any]:
    mac = item.get("mac", "").lower().replace("-", ":")
    where = f"{where}, port {mac or '(no mac)'}"
    _known(where, item, tuple(_FIELDS), tuple(_CHILDREN))
    for name in ("mac", "network"):
        if not item.get(name):
            raise ConfigInvalid(f"{where}: attribute {name} is missing in the metadata")
    fields: dict[str, Any] = {_FIELDS[name]: value for name, value in item.attrib.items()}
    fields["mac"] = mac
    for name in _NUMBERS:
        if name in fields:
            fields[name] = _number(f"{where}: {name.replace('_', '-')}", fields[name])
    if "antispoof" in fields:
        fields["antispoof"] = _yes(f"{where}: antispoof", fields["antispoof"])
    _children(where, item, fields)
    return fields


def _children(where: str, item: Element, fields: dict[str, Any]) -> None:
    addresses, trunk, timeouts = [], {}, {}
    for child in item:
        tag = child.tag.rpartition("}")[2]
        _known(f"{where}: <{tag}>", child, _CHILDREN[tag], ())
        missing = [name for name in _CHILDREN[tag] if not child.get(name)]
        if missing:
            raise ConfigInvalid(f"{where}: <{tag}>: attribute {missing[0]} is missing")
        if tag == "address":
            addresses.append((child.text or "").strip())
        elif tag == "trunk":
            trunk[_number(f"{where}: <trunk> vlan", child.get("vlan", ""))] = child.get("network", "")
        else:
            timeouts[child.get("name", "")] = _number(f"{where}: <timeout> ms", child.get("ms", ""))
    for name, value in (("addresses", addresses), ("trunk", trunk), ("timeouts_ms", timeouts)):
        if value:
            fields[name] = value


def _lead(where: str, element: Element) -> Lead:
    lead = element.get("lead")
    numbers = [
        None if (text := element.get(name)) is None else _number(f"{where}: <ports> {name}", text)
        for name in ("downtime-ms", "max-passes")
    ]
    return Lead(None if lead is None else _yes(f"{where}: <ports> lead", lead), *numbers)


def _known(where: str, element: Element, attributes: tuple[str, ...], children: tuple[str, ...]) -> None:
    for name in element.attrib:
        if name not in attributes:
            known = ", ".join(attributes) or "none"
            raise ConfigInvalid(f"{where}: attribute {name!r} is not known in the metadata", hint=f"known: {known}")
    for child in element:
        namespace, _, tag = str(child.tag).rpartition("}")
        if namespace not in (f"{{{NAMESPACE}", "") or tag not in children:
            known = ", ".join(f"<{name}>" for name in children) or "none"
            raise ConfigInvalid(f"{where}: <{tag}> is not known in the metadata", hint=f"known: {known}")


def _number(where: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise ConfigInvalid(f"{where}: expected a number, not {text[:80]!r}")
    return int(text)


def _yes(where: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise ConfigInvalid(f"{where}: expected yes or no, not {text[:80]!r}")
    return text == "yes"
