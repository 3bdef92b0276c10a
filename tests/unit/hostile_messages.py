"""Hypothesis strategies for messages of valid shape and hostile content, made from their descriptors.

A message that is added to the contract needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from tests.unit.pair import MACS, VM

DEPTH_MAX = 4
GIANT = 1000  # elements of a repeated field, now and then
TEXTS = (
    *("", "a", "b", "zz", "blue", "web", VM, VM.upper(), *MACS, "52-54-00-00-00-01", "ff:ff:ff:ff:ff:ff", "10.0.0.1"),
    *("uplink", "overlay", "local", "from", "to", "allow", "drop", "reject", "tcp", "any", "58", "300", "icmp", "8/0"),
    *("network", "address-set", "policy", "port", "place", "migration", "host", f"{VM}/{MACS[0]}", "conntrack", "acl"),
    *("@web", "@", "0.0.0.0/0", "::/0", "fe80::1%eth0", "10.0.0.1/33", "80-79", "0-65535", "99999", "tap{vm8}", "{x}"),
    *("running", "paused", "gone", "active", "staged", "committed", "opened", "settled", "failed", "all", "libvirt"),
    *(
        "\0",
        "a\0b",
        "\n",
        "../../etc/passwd",
        "/",
        "'; DROP TABLE objects;--",
        "%s%n",
        "\u202e",
        "é",
        "\uff11\uff12",
        "\ud7ff",
    ),
    *("x" * 64, "x" * 5000, "9" * 5000, "-1", "1e308", "nan", "tcp_established", "udp", "bogus"),
)
UNSIGNED = {
    32: (0, 1, 7, 4094, 4095, 65535, 65536, (1 << 31), (1 << 32) - 1),
    64: (0, 1, 3, 1 << 31, 1 << 63, (1 << 64) - 1),
}
SIGNED = (0, 1, -1, (1 << 31) - 1, -(1 << 31))
FLOATS = (0.0, -1.0, 0.001, 2.0, 1e308, float("inf"), float("-inf"), float("nan"))
_F = FieldDescriptor
_INTEGERS = {
    **dict.fromkeys((_F.TYPE_UINT32, _F.TYPE_FIXED32), st.sampled_from(UNSIGNED[32])),
    **dict.fromkeys((_F.TYPE_UINT64, _F.TYPE_FIXED64), st.sampled_from(UNSIGNED[64]) | st.integers(0, (1 << 64) - 1)),
    **dict.fromkeys(
        (_F.TYPE_INT32, _F.TYPE_SINT32, _F.TYPE_INT64, _F.TYPE_SINT64, _F.TYPE_SFIXED64), st.sampled_from(SIGNED)
    ),
}
STRINGS = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BYTES = st.sampled_from((b"", b"\0", b"\xff" * 16, b"\x91\x80", b"\xdd\xff\xff\xff\xff")) | st.binary(max_size=40)


def repeated(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)


def entry_of(field: FieldDescriptor) -> Descriptor | None:
    """Descriptor of a map's entries, None for a field that is no map."""
    message = field.message_type
    return message if message is not None and message.GetOptions().map_entry else None


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0, leave_out: tuple[str, ...] = ()) -> Message:
    """Any message of the descriptor. Fields are set or not; of a oneof one or none is."""
    made = GetMessageClass(descriptor)()
    for field in _chosen(draw, descriptor, leave_out):
        _set(draw, made, field, depth)
    return made


def _chosen(draw: st.DrawFn, descriptor: Descriptor, leave_out: tuple[str, ...]) -> Iterable[FieldDescriptor]:
    fields = [field for field in descriptor.fields if field.name not in leave_out]
    alone = [field for field in fields if field.containing_oneof is None]
    unions = [[field for field in fields if field.containing_oneof is union] for union in descriptor.oneofs]
    chosen = [field for field in alone if draw(st.integers(0, 3))]
    return [*chosen, *(draw(st.sampled_from(union)) for union in unions if union and draw(st.integers(0, 5)))]


def _set(draw: st.DrawFn, made: Any, field: FieldDescriptor, depth: int) -> None:
    entry = entry_of(field)
    if depth >= DEPTH_MAX and field.message_type is not None:
        return
    if entry is not None:
        _set_map(draw, getattr(made, field.name), entry, depth)
    elif repeated(field):
        items = draw(st.lists(value(field, depth), max_size=3))
        if items and depth < 2 and not draw(st.integers(0, 30)):
            items = items * (GIANT // len(items))
        getattr(made, field.name).extend(items)
    elif field.message_type is not None:
        getattr(made, field.name).CopyFrom(draw(value(field, depth)))
        getattr(made, field.name).SetInParent()
    else:
        setattr(made, field.name, draw(value(field, depth)))


def _set_map(draw: st.DrawFn, items: Any, entry: Descriptor, depth: int) -> None:
    key, content = entry.fields_by_name["key"], entry.fields_by_name["value"]
    for name in draw(st.lists(value(key, depth), max_size=3)):
        if content.message_type is not None:
            items[name].CopyFrom(draw(value(content, depth)))
        else:
            items[name] = draw(value(content, depth))


def value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    """Values of one field, or of one element of it."""
    if field.message_type is not None:
        return messages(field.message_type, depth + 1)
    if field.type in _INTEGERS:
        return _INTEGERS[field.type]
    if field.type in (_F.TYPE_DOUBLE, _F.TYPE_FLOAT):
        return st.sampled_from(FLOATS)
    if field.type == _F.TYPE_BOOL:
        return st.booleans()
    return BYTES if field.type == _F.TYPE_BYTES else STRINGS


@st.composite
def changed(draw: st.DrawFn, message: Message) -> Message:
    """A copy of `message` in which a few fields, at any depth, have another value."""
    made = type(message)()
    made.CopyFrom(message)
    for _ in range(draw(st.integers(0, 3))):
        inner, depth = _within(draw, made)
        if inner.DESCRIPTOR.fields:
            field = draw(st.sampled_from(list(inner.DESCRIPTOR.fields)))
            if draw(st.booleans()):
                inner.ClearField(field.name)
            _set(draw, inner, field, depth)
    return made


def _within(draw: st.DrawFn, message: Any) -> tuple[Any, int]:
    """The message itself, or one that is somewhere in it; and how deep."""
    depth = 0
    while draw(st.integers(0, 4)):
        inner = [item for field, content in message.ListFields() for item in _messages_of(field, content)]
        if not inner:
            break
        message, depth = draw(st.sampled_from(inner)), depth + 1
    return message, depth


def _messages_of(field: FieldDescriptor, content: Any) -> Iterable[Any]:
    if field.message_type is None or entry_of(field) is not None:
        return ()
    return content if repeated(field) else (content,)
