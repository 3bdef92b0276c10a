# SPDX-License-Identifier: GPL-2.0-only
"""Many entries in one call through `exchange`, and the word of a port."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .frames import TCP
from .harness import Switch
from .model import MODEL
from .probe import BOTH, FROM, SYN, Probe

Ports = Callable[..., Probe]


@pytest.fixture
def exchange(loaded_probe: Switch) -> Iterator[Any]:
    """The array as the agent sees it, mapped."""
    target = loaded_probe.maps["exchange"]
    memory = mmap.mmap(target.fd, MODEL.EXCHANGE_LENGTH * target.value_size)
    view = (MODEL.exchange * MODEL.EXCHANGE_LENGTH).from_buffer(memory)
    yield view
    del view


def place(element: Any, key: bytes, **entry: Any) -> None:
    element.key = MODEL.ct_key.from_buffer_copy(key)
    element.found = 99
    element.entry = MODEL.ct_entry(**entry)


def call(port: Probe, program: str, count: int) -> tuple[int, int]:
    context = MODEL.ct_batch(slot=port.slot, count=count)
    return port.switch.call(program, context), context.found


def test_read(ports: Ports, exchange: Any) -> None:
    port = ports(BOTH, limit=8192)
    for lport in range(0, MODEL.EXCHANGE_LENGTH, 2):
        port.put(port.key(TCP, lport), MODEL.CT_ESTABLISHED, id=lport << 32 | 5, seen=lport, mark=7, packets=(lport, 1))
    for lport in range(MODEL.EXCHANGE_LENGTH):
        place(exchange[lport], port.key(TCP, lport))
    assert call(port, "ct_read", MODEL.EXCHANGE_LENGTH) == (0, MODEL.EXCHANGE_LENGTH // 2)
    for lport in range(MODEL.EXCHANGE_LENGTH):
        assert exchange[lport].found == (lport % 2 == 0)
        if lport % 2 == 0:
            assert bytes(exchange[lport].entry) == port.table.lookup(port.key(TCP, lport))


def test_read_in_every_state(ports: Ports, exchange: Any) -> None:
    port = ports(BOTH)
    port.put(port.key(TCP), MODEL.CT_ESTABLISHED)
    for state in (MODEL.PORT_STAGED, MODEL.PORT_QUIESCED):
        port.set_flags(0, state)
        place(exchange[0], port.key(TCP))
        assert call(port, "ct_read", 1) == (0, 1)


@pytest.mark.parametrize("program", ["ct_read", "ct_settle", "ct_fill", "ct_end"])
def test_refusals(ports: Ports, program: str) -> None:
    port = ports(BOTH)
    assert call(port, program, MODEL.EXCHANGE_LENGTH + 1)[0] == -errno.EINVAL
    assert call(port, program, 0) == (0, 0)
    port.set_flags(0, MODEL.PORT_QUIESCED)
    assert call(port, program, 0)[0] == (0 if program == "ct_read" else -errno.EBUSY)
    port.slot = 1 << 20
    assert call(port, program, 0)[0] == -errno.ENOENT


def test_settle_assigns(ports: Ports, exchange: Any) -> None:
    port = ports(BOTH)
    port.track()
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, id=0x1234, seen=100, packets=(1, 2), bytes=(3, 4))
    for seen, expected in ((50, 100), (200, 200), (150, 200)):  # the later of both
        place(exchange[0], key, id=0x1234, seen=seen, carried_packets=(10, 20), carried_bytes=(30, 40))
        assert call(port, "ct_settle", 1) == (0, 1)
        entry = port.entry(key)
        assert [*entry.carried_packets, *entry.carried_bytes] == [10, 20, 30, 40]
        assert [*entry.packets, *entry.bytes] == [1, 2, 3, 4]
        assert (entry.seen, exchange[0].found) == (expected, 1)
    assert port.drain() == set()


def test_fill_makes_only_what_is_not_there(ports: Ports, exchange: Any) -> None:
    """Neither what packets have made here meanwhile is replaced, nor what is about to go."""
    port = ports(BOTH, limit=4)
    newer, dying, *missing = (port.key(TCP, lport) for lport in range(1, 6))
    port.put(newer, MODEL.CT_SYN_SENT, id=0x9)
    port.put(dying, MODEL.CT_ESTABLISHED, MODEL.CT_F_DYING, id=0x10)
    before = [bytes(port.entry(key)) for key in (newer, dying)]
    for index, key in enumerate((newer, dying, *missing)):
        place(exchange[index], key, id=0x20 + index, word=(0x20 + index) << 32 | MODEL.CT_ESTABLISHED)
    assert call(port, "ct_fill", 5) == (0, 2)
    found = [exchange[index].found for index in range(5)]
    assert found == [MODEL.FILL_THERE, MODEL.FILL_THERE, MODEL.FILL_MADE, MODEL.FILL_MADE, MODEL.FILL_REFUSED]
    assert [bytes(port.entry(key)) for key in (newer, dying)] == before
    assert [port.entry(key).id for key in missing[:2]] == [0x22, 0x23]


def test_settle_knows_connections_by_their_id(ports: Ports, exchange: Any) -> None:
    port = ports(BOTH)
    other, gone, there = (port.key(TCP, lport) for lport in (1, 2, 3))
    port.put(other, MODEL.CT_ESTABLISHED, id=0x9)
    port.put(there, MODEL.CT_ESTABLISHED, MODEL.CT_F_DYING, id=0x10)  # a tombstone
    for index, (key, number) in enumerate(((other, 0x8), (gone, 0x8), (there, 0x10))):
        place(exchange[index], key, id=number, seen=1 << 62, carried_packets=(5, 5))
    before = bytes(port.entry(other))
    assert call(port, "ct_settle", 3) == (0, 1)
    assert [exchange[index].found for index in range(3)] == [0, 0, 1]
    assert bytes(port.entry(other)) == before
    assert list(port.entry(there).carried_packets) == [5, 5]


def test_settle_says_of_what_is_being_ended_that_it_is_not_there(ports: Ports, exchange: Any) -> None:
    """Its last counts may have been handed over without what is assigned now."""
    port = ports(BOTH)
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, MODEL.CT_F_DEAD, id=0x8)
    place(exchange[0], key, id=0x8, carried_packets=(5, 5))
    assert call(port, "ct_settle", 1) == (0, 0)
    assert exchange[0].found == 0


def test_what_was_carried_ends_with_the_connection(ports: Ports, exchange: Any) -> None:
    port = ports(BOTH)
    key = port.key(TCP)
    port.put(key, MODEL.CT_TIME_WAIT, id=5)
    place(exchange[0], key, id=5, carried_packets=(5, 5))
    assert call(port, "ct_settle", 1) == (0, 1)
    assert port.tcp(FROM, SYN) == MODEL.DROP_NONE
    assert call(port, "ct_settle", 1) == (0, 0)
    assert list(port.entry(key).carried_packets) == [0, 0]


def test_port_word(ports: Ports) -> None:
    port = ports(BOTH)
    word = port.port.word
    swap = MODEL.port_swap(slot=port.slot, expected=word, desired=word + 1)
    assert port.switch.call("port_cas", swap) == 0
    assert (swap.swapped, swap.found, port.port.word) == (1, word, word + 1)
    assert port.switch.call("port_cas", swap) == 0
    assert (swap.swapped, swap.found, port.port.word) == (0, word + 1, word + 1)
    assert port.switch.call("port_cas", MODEL.port_swap(slot=1 << 20)) == -errno.EINVAL


def test_what_waits_is_added_to(ports: Ports) -> None:
    """Frames that programs of another generation of maps put into the hold taps, and those that left by them."""
    port = ports(BOTH)
    for to, before in ((5, 3), (-4, -1)):
        assert port.switch.call("port_count_held", MODEL.port_held(slot=port.slot, to=to, **{"from": before})) == 0
    assert (port.port.held_to, port.port.held_from) == (1, 2)
    assert port.switch.call("port_count_held", MODEL.port_held(slot=1 << 20, to=1)) == -errno.EINVAL
