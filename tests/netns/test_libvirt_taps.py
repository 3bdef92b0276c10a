# SPDX-License-Identifier: GPL-2.0-only
"""Taps for interfaces that libvirt does not manage, in a namespace of the test's own: made, opened, gone."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from datapath.errors import KernelError
from migrator.agent.libvirt.domain import Domain, parse
from migrator.agent.libvirt.taps import Taps, make_tap

from .private import private_namespace

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
TUNSETIFF, TUNGETVNETHDRSZ = 0x400454CA, 0x800454D7
TAP_NO_PI_VNET, MULTI_QUEUE = 0x5002, 0x0100


@pytest.fixture(autouse=True)
def namespace() -> Iterator[int]:
    with private_namespace() as entered:
        yield entered


def domain(*devices: str, queues: int = 1, mtu: int = 0, managed: str = "no") -> Domain:
    ports, interfaces = "", ""
    for number, device in enumerate(devices):
        mac = f"52:54:00:00:00:{number:02x}"
        ports += f'<port mac="{mac}" network="blue"/>'
        inside = f"<driver queues='{queues}'/>" + (f"<mtu size='{mtu}'/>" if mtu else "")
        target = f"<target dev='{device}' managed='{managed}'/>"
        interfaces += f"<interface type='ethernet'><mac address='{mac}'/>{target}{inside}</interface>"
    metadata = f'<metadata><ports xmlns="urn:vm-netstate-migrator:ports:1">{ports}</ports></metadata>'
    return parse(f"<domain><name>shop</name><uuid>{VM}</uuid>{metadata}<devices>{interfaces}</devices></domain>")


def links() -> dict[str, tuple[bool, int]]:
    """Name -> (up, MTU) of all but the loopback."""
    with IPRoute() as route:
        found = {link.get_attr("IFLA_IFNAME"): link for link in route.get_links()}
    return {n: (bool(link["flags"] & 1), link.get_attr("IFLA_MTU")) for n, link in found.items() if n != "lo"}


def open_as_qemu(name: str, flags: int = TAP_NO_PI_VNET) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("=16sH22x", name.encode(), flags))
    except OSError:
        os.close(fd)
        raise
    return fd


def test_a_tap_is_made_once_up_and_can_be_opened(tmp_path: Path) -> None:
    taps = Taps(tmp_path / "taps")
    assert taps.make(domain("web0", "web1", mtu=1400)) == ["web0", "web1"]
    assert links() == {"web0": (True, 1400), "web1": (True, 1400)}
    assert taps.make(domain("web0", "web1", mtu=1400)) == []
    os.close(open_as_qemu("web0"))
    assert Taps(tmp_path / "taps").remove(VM) == ["web0", "web1"]
    assert links() == {} and taps.remove(VM) == [] and not list((tmp_path / "taps").iterdir())


def test_several_queues(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.make(domain("web0", queues=2))
    for fd in [open_as_qemu("web0", TAP_NO_PI_VNET | MULTI_QUEUE) for _ in range(2)]:
        os.close(fd)
    assert taps.make(domain("web0", queues=1)) == ["web0"], "the sort of queues changed: made anew"
    os.close(open_as_qemu("web0"))


def test_a_tap_that_is_still_held_goes_too(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.make(domain("web0"))
    held = open_as_qemu("web0")
    try:
        assert taps.remove(VM) == ["web0"] and links() == {}
    finally:
        os.close(held)


def test_a_tap_that_somebody_else_made_is_left_alone(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    make_tap("web0", multi_queue=False)
    assert taps.make(domain("web0")) == [] and taps.remove(VM) == []
    assert list(links()) == ["web0"]


def test_a_later_device_of_the_same_name_is_not_ours(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.make(domain("web0"))
    with IPRoute() as route:
        route.link("del", ifname="web0")
    make_tap("web0", multi_queue=False)
    assert taps.remove(VM) == [] and list(links()) == ["web0"]


def test_what_libvirt_makes_is_not_made_here(tmp_path: Path) -> None:
    assert Taps(tmp_path).make(domain("web0", managed="yes")) == [] and links() == {}


def test_one_that_fails_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"make tap \."):
        Taps(tmp_path).make(domain("web0", "."))
    assert links() == {}
    (tmp_path / f"{VM}.json").write_text("not json")
    assert Taps(tmp_path).remove(VM) == []
