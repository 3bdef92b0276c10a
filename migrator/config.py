"""What an operator declares: networks, address sets, policies and ports, as checked models.

A document is a mapping with any of the keys `networks`, `address_sets`, `policies`, `ports`, each a list of objects.
Models check one object by itself; `migrator.coordinator.catalog` checks objects against each other. The RPC messages of
the same names carry them; `to_message` and `from_message` translate.
"""

from __future__ import annotations

import ipaddress
import json
import re
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from datapath.registry import KINDS
from datapath.state import labels
from datapath.state.conntrack import TIMEOUTS
from datapath.state.document import Document
from datapath.state.kind import Record
from migrator._pb import migrator_pb2 as pb
from migrator.errors import ConfigInvalid

VLAN_MAX = 4094  # IEEE 802.1Q: 4095 is reserved
VNI_MAX = (1 << 24) - 1  # RFC 7348
MTU_MIN = 68  # RFC 791
MTU_MAX = 65521  # a tap's largest
MTU_DEFAULT = 1500  # of a network that names none
SHOWN_MAX = 200  # characters of a wrong value in an error,
LABEL_MAX = 64  # and of the name of what it is in
DEVICE_LENGTH_MAX = 15  # IFNAMSIZ without its terminator

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)
_ICMP = re.compile(r"(\d{1,3})(?:/(\d{1,3}))?", re.ASCII)
_PLACEHOLDER = re.compile(r"\{([^}]*)\}")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("expected 1 to 63 letters, digits, '_', '.' or '-', the first a letter or digit")
    return value


def _vm(value: str) -> str:
    try:
        return str(uuid.UUID(value))
    except ValueError:
        raise ValueError("expected a uuid such as 6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01") from None


def _mac(value: str) -> str:
    mac = value.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise ValueError("expected a MAC address such as 52:54:00:12:34:56")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise ValueError("expected the MAC address of one station, not of a group and not zero")
    return mac


def _prefix(value: str) -> str:
    try:
        network = ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"expected a prefix such as 192.0.2.0/24 or 2001:db8::/32: {error}") from None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
        raise ValueError("expected a prefix of IPv4 addresses as 192.0.2.0/24: no frame has the other form")
    return str(network)


def _remote(value: str) -> str:
    return "@" + _name(value[1:]) if value.startswith("@") else _prefix(value)


def _address(value: str) -> str:
    try:
        if "%" in value:  # ipaddress takes a zone, which is a name of this host
            raise ValueError
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("expected an IPv4 or IPv6 address without a prefix length or a zone") from None


def _ports(value: str) -> str:
    match = _PORTS.fullmatch(value)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not 0 <= first <= last <= 65535:
        raise ValueError("expected a port or a range, such as 443 or 8000-8999")
    return value


def _icmp(value: str) -> str:
    match = _ICMP.fullmatch(value)
    if value and (not match or int(match[1]) > 255 or int(match[2] or 0) > 255):
        raise ValueError("expected TYPE or TYPE/CODE, such as 8 or 8/0")
    return value


def _protocol(value: str) -> str:
    value = value.lower()
    if value in ("any", "tcp", "udp", "icmp", "icmpv6"):
        return value
    if not value.isascii() or not value.isdigit() or int(value) > 255:
        raise ValueError("expected any, tcp, udp, icmp, icmpv6 or a number up to 255")
    return {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}.get(int(value), str(int(value)))


def _device(value: str) -> str:
    unknown = [name for name in _PLACEHOLDER.findall(value) if name not in ("vm8", "mac6")]
    if unknown:
        raise ValueError(f"{{{unknown[0]}}} is not known in a device pattern: expected {{vm8}} or {{mac6}}")
    length = len(value.replace("{vm8}", "x" * 8).replace("{mac6}", "x" * 6))
    strange = "/" in value or any(c.isspace() for c in value) or "{" in _PLACEHOLDER.sub("", value)
    if strange or length > DEVICE_LENGTH_MAX:
        raise ValueError(f"expected an interface name of at most {DEVICE_LENGTH_MAX} characters")
    return value


def _mtu(value: int) -> int:
    if value and not MTU_MIN <= value <= MTU_MAX:
        raise ValueError(f"expected {MTU_MIN} to {MTU_MAX} bytes, or 0 for the default")
    return value


def _timeout_name(value: str) -> str:
    if value not in TIMEOUTS:
        raise ValueError(f"expected one of {', '.join(TIMEOUTS)}")
    return value


def _listed(value: Any) -> Any:
    """A single value where a list is expected stands for a list of one; numbers for their text."""
    items = value if isinstance(value, list | tuple) else [value]
    return [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in items]


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, AfterValidator(_name)]
OptionalName = Annotated[str, AfterValidator(lambda value: value and _name(value))]
Vm = Annotated[str, AfterValidator(_vm)]
Mac = Annotated[str, AfterValidator(_mac)]
Mark = Annotated[str, BeforeValidator(_text), AfterValidator(labels.mark)]
Label = Annotated[str, BeforeValidator(_text), AfterValidator(labels.label)]
Mtu = Annotated[int, AfterValidator(_mtu)]
Device = Annotated[str, AfterValidator(_device)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=False)


class Network(_Model):
    """A separate L2 domain. `vlan` is for kind uplink, `vni` for kind overlay. `mtu` in bytes of the IP packet."""

    name: Name
    kind: Literal["uplink", "overlay", "local"]
    vlan: int = Field(0, ge=0, le=VLAN_MAX)
    vni: int = Field(0, ge=0, le=VNI_MAX)
    mtu: Mtu = 0
    uplink: str = Field("", max_length=DEVICE_LENGTH_MAX)
    ageing_s: int = Field(0, ge=0, le=1_000_000)

    @model_validator(mode="after")
    def _kind_fits(self) -> Network:
        if self.kind == "overlay" and not self.vni:
            raise ValueError("an overlay network needs a vni from 1 to 16777215")
        if self.kind != "overlay" and self.vni:
            raise ValueError(f"vni is for overlay networks, this one is {self.kind}")
        if self.kind != "uplink" and (self.vlan or self.uplink):
            raise ValueError(f"vlan and uplink are for uplink networks, this one is {self.kind}")
        return self


class AddressSet(_Model):
    """Prefixes that rules name together as `@name`."""

    name: Name
    prefixes: list[Annotated[str, AfterValidator(_prefix)]] = []


Timeouts = dict[Annotated[str, AfterValidator(_timeout_name)], Annotated[int, Field(ge=1, le=0xFFFFFFFF)]]
"""Name of a timeout (datapath/state/conntrack.py) -> milliseconds."""


class Rule(_Model):
    """One stateful rule: the lowest `priority` that matches wins. `remote`, `ports` empty: any. `id` 0: given later."""

    id: int = Field(0, ge=0, le=0xFFFFFFFF)
    direction: Literal["from", "to"]
    priority: int = Field(100, ge=0, le=65535)
    protocol: Annotated[str, BeforeValidator(_text), AfterValidator(_protocol)] = "any"
    remote: Annotated[list[Annotated[str, AfterValidator(_remote)]], BeforeValidator(_listed)] = []
    ports: Annotated[list[Annotated[str, AfterValidator(_ports)]], BeforeValidator(_listed)] = []
    icmp: Annotated[str, BeforeValidator(_text), AfterValidator(_icmp)] = ""
    action: Literal["allow", "drop", "reject"]
    log: bool = False
    mark: Mark = ""
    label: Label = ""
    set_mark: Mark = ""
    set_label: Label = ""

    @model_validator(mode="after")
    def _protocol_fits(self) -> Rule:
        if self.ports and self.protocol not in ("tcp", "udp"):
            raise ValueError(f"ports are for protocol tcp or udp, this rule's is {self.protocol}")
        if self.icmp and self.protocol not in ("icmp", "icmpv6"):
            raise ValueError(f"icmp is for protocol icmp or icmpv6, this rule's is {self.protocol}")
        if (self.set_mark or self.set_label) and self.action != "allow":
            raise ValueError(f"set_mark and set_label are for action allow, this rule's is {self.action}")
        return self


class Policy(_Model):
    """Rules of a policy. What none matches is dropped, unless it belongs to a connection that one let in.

    `timeouts_ms`: when connections at its ports are forgotten, for a port that does not say so itself.
    """

    name: Name
    rules: list[Rule] = []
    timeouts_ms: Timeouts = {}

    @model_validator(mode="after")
    def _ids_differ(self) -> Policy:
        twice = [number for number, count in Counter(rule.id for rule in self.rules).items() if number and count > 1]
        if twice:
            raise ValueError(f"rule id {min(twice)} is given twice")
        return self


class PortFields(_Model):
    """One NIC of a VM, but for the kinds of state that are declared at it.

    `device` may hold {vm8} and {mac6}; `devices` is for hosts where the pattern does not fit. `declared_by` names the
    hypervisor whose domain says all of this: then that is the place to change it.
    """

    vm: Vm
    mac: Mac
    network: Name
    host: OptionalName = ""
    device: Device = ""
    addresses: list[Annotated[str, AfterValidator(_address)]] = []
    policy: OptionalName = ""
    trunk: dict[Annotated[int, Field(ge=1, le=VLAN_MAX)], Name] = {}
    mtu: Mtu = 0
    connections_max: int = Field(0, ge=0, le=1 << 24)
    learned_max: int = Field(0, ge=0, le=1 << 16)
    timeouts_ms: Timeouts = {}
    antispoof: bool = True
    learning: bool = False
    name: OptionalName = ""
    devices: dict[Name, Device] = {}
    declared_by: Literal["", "libvirt"] = ""

    @property
    def key(self) -> str:
        return f"{self.vm}/{self.mac}"

    def device_at(self, host: str) -> str:
        """Device of the port on a host, "" when none is declared."""
        pattern = self.devices.get(host, self.device)
        return pattern.replace("{vm8}", self.vm[:8]).replace("{mac6}", self.mac.replace(":", "")[-6:])


DOCUMENTS: Mapping[str, type[Document]] = {kind.name: kind.document for kind in KINDS.values() if kind.document}
"""Kinds of state that are declared at a port, each under its name there."""

if TYPE_CHECKING:
    Port = PortFields
else:
    Port = create_model("Port", __base__=PortFields, **{name: (one | None, None) for name, one in DOCUMENTS.items()})


class Config(_Model):
    """All objects of a document, or of the cluster."""

    networks: list[Network] = []
    address_sets: list[AddressSet] = []
    policies: list[Policy] = []
    ports: list[Port] = []


MESSAGES: Mapping[type[_Model], type[Message]] = {
    Network: pb.Network,
    AddressSet: pb.AddressSet,
    Policy: pb.Policy,
    Port: pb.Port,
    Config: pb.Config,
}


def to_message(model: BaseModel) -> Any:
    """The RPC message that carries `model`."""
    return ParseDict(_for_message(model), MESSAGES[type(model)]())  # type: ignore[index]


def _for_message(model: BaseModel) -> dict[str, Any]:
    if isinstance(model, Config):
        return {name: [_for_message(item) for item in getattr(model, name)] for name in type(model).model_fields}
    body = model.model_dump(exclude=set(DOCUMENTS))
    if isinstance(model, PortFields):
        body["no_antispoof"] = not body.pop("antispoof")
        declared = {name: document for name in DOCUMENTS if (document := getattr(model, name))}
        body["kinds"] = {name: written(document) for name, document in declared.items()}
    return body


def written(document: BaseModel) -> str:
    """A kind's document as a port's `kinds` hold it: one text for each content, for it is compared."""
    return json.dumps(document.model_dump(mode="json", exclude_unset=True), sort_keys=True, separators=(",", ":"))


def from_message(message: Message, model: type[_Model]) -> Any:
    """A checked model of what `message` carries.

    Raises ConfigInvalid with the field's path.
    """
    body = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for port in body.get("ports", [body]):
        if "no_antispoof" in port:
            port["antispoof"] = not port.pop("no_antispoof")
            port |= {name: _read(name, text) for name, text in port.pop("kinds").items()}
    body.pop("revision", None)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigInvalid(f"{where(body, first['loc'])}: {reason(first)}") from None


def _read(kind: str, text: str) -> Any:
    if kind not in DOCUMENTS:
        raise ConfigInvalid(
            f"kind {kind[:LABEL_MAX]!r} is not declared at a port", hint=f"known: {', '.join(DOCUMENTS)}"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigInvalid(f"kind {kind}: its document is no JSON") from None


def kind_records(kind: str, text: str) -> list[Record]:
    """Records that a document of a port's `kinds` comes to. Raises ConfigInvalid."""
    body = _read(kind, text)
    try:
        return DOCUMENTS[kind].model_validate(body).records()
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigInvalid(f"{kind}: {where(body, first['loc'])}: {reason(first)}") from None


def reason(error: Mapping[str, Any]) -> str:
    """One line of a pydantic error, with what was given."""
    text = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    return f"{text}, not {_shown(given)}" if isinstance(given, str | int | float) else text


def _shown(value: str | float) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}…"


def where(body: Any, path: tuple[int | str, ...]) -> str:
    """Name of a field for people: `ports[0] (52:54:…) .addresses[1]` says which object it is by its name or MAC."""
    words: list[str] = []
    for step in path:
        name = step if isinstance(step, int) else step[:LABEL_MAX]
        words.append(f"[{name}]" if isinstance(name, int) else f".{name}" if words else name)
        body = _child(body, step)
        label = body.get("name") or body.get("mac") if isinstance(body, dict) else None
        if isinstance(step, int) and isinstance(label, str) and label:
            words.append(f" ({label[:LABEL_MAX]}) ")
    return "".join(words).replace(" .", " ").strip() or "document"


def _child(body: Any, step: int | str) -> Any:
    try:
        return body[step]
    except (KeyError, IndexError, TypeError):
        return None
