# SPDX-License-Identifier: GPL-2.0-only
"""Programs on devices: tcx links and clsact filters do the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from datapath.build import compile_object
from datapath.drivers.ebpf import bpffs, loader, syscall
from datapath.drivers.ebpf.attach import Attachments, ClsactAttachments, Direction, TcxAttachments, has_tcx
from datapath.drivers.ebpf.loader import Switch
from datapath.errors import KernelError

from .private import private_namespace, raw_socket, veth, wait_until

SOURCE = Path(__file__).parents[1] / "bpf" / "small.bpf.c"
FRAME = bytes.fromhex("ffffffffffff02000000000188b5") + bytes(50)
FRAMES = 20_000


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two versions of one object."""
    made = tmp_path_factory.mktemp("small")
    return {version: compile_object(SOURCE, made / f"{version}.o", f"-DVERSION={version}") for version in (1, 2)}


@pytest.fixture
def switch(objects: dict[int, Path], tmp_path: Path) -> Iterator[Switch]:
    path = tmp_path / "bpf"
    with private_namespace():
        pins = bpffs.pins(f"test-{os.getpid()}", path)
        try:
            made = loader.load(pins, path=objects[1])
            yield made
            made.close()
        finally:
            pins.clear()
            bpffs.unmount(path)


@pytest.fixture(params=["tcx", "clsact"])
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "tcx" and not has_tcx():
        pytest.skip("kernel without tcx (6.6)")
    return str(request.param)


def attach_by(way: str, switch: Switch) -> Attachments:
    return TcxAttachments(switch.pins.links) if way == "tcx" else ClsactAttachments("test")


def seen(switch: Switch) -> dict[int, int]:
    """Frames by version of the program that met them."""
    with switch.table("counters") as counters:
        drops = counters.get(0)["drops"].sum(axis=0)
    return {1: int(drops[1]), 2: int(drops[2])}


def send(ifindex: int, count: int) -> None:
    with raw_socket(ifindex) as sender:
        for _ in range(count):
            sender.send(FRAME)


def test_attached_programs_see_frames_until_detached(switch: Switch, way: str) -> None:
    near, far = veth("a0", "a1")
    attachments = attach_by(way, switch)
    attachments.attach(near, Direction.INGRESS, switch.program("from_port"))
    attachments.attach(near, Direction.EGRESS, switch.program("to_port"))
    on = [(one.ifindex, one.direction, one.program) for one in attachments.attached()]
    ids = {name: syscall.prog_info(fd).id for name, fd in switch.programs.items()}
    assert on == [(near, Direction.EGRESS, ids["to_port"]), (near, Direction.INGRESS, ids["from_port"])]
    send(far, 100)
    wait_until(lambda: seen(switch)[1] == 100, "frames met the program")
    attachments.detach(near, Direction.INGRESS)
    attachments.detach(near, Direction.INGRESS)
    send(far, 100)
    attachments.detach(near, Direction.EGRESS)
    assert attachments.attached() == []
    assert seen(switch)[1] == 100
    attachments.close()


def test_replacing_under_traffic_misses_no_frame(switch: Switch, objects: dict[int, Path], way: str) -> None:
    near, far = veth("a0", "a1")
    attachments = attach_by(way, switch)
    newer = loader.load(switch.pins, path=objects[2])
    versions = [switch.program("from_port"), newer.program("from_port")]
    attachments.attach(near, Direction.INGRESS, versions[0])
    sender = threading.Thread(target=send, args=(far, FRAMES))
    sender.start()
    replaced = 0
    while sender.is_alive():
        replaced += 1
        attachments.attach(near, Direction.INGRESS, versions[replaced % 2])
    sender.join()
    wait_until(lambda: sum(seen(switch).values()) >= FRAMES, f"all frames met a program: {seen(switch)}")
    assert sum(seen(switch).values()) == FRAMES
    assert replaced > 5
    assert min(seen(switch).values()) > 0
    assert len(attachments.attached()) == 1
    attachments.close()
    newer.close()


def test_attachments_outlive_who_made_them(switch: Switch, way: str) -> None:
    near, far = veth("a0", "a1")
    first = attach_by(way, switch)
    first.attach(near, Direction.INGRESS, switch.program("from_port"))
    first.close()
    send(far, 10)
    wait_until(lambda: seen(switch)[1] == 10, "frames met the program")
    second = attach_by(way, switch)
    assert [one.ifindex for one in second.attached()] == [near]
    second.detach(near, Direction.INGRESS)
    assert second.attached() == []
    second.close()


def test_a_device_made_anew_is_attached_anew(switch: Switch, way: str) -> None:
    near, _ = veth("a0", "a1")
    attachments = attach_by(way, switch)
    attachments.attach(near, Direction.INGRESS, switch.program("from_port"))
    with IPRoute() as route:
        route.link("del", index=near)
        assert attachments.attached() == []
        route.link("add", ifname="a0", kind="veth", peer={"ifname": "a1"}, index=near)
        assert attachments.attached() == []
        attachments.attach(near, Direction.INGRESS, switch.program("from_port"))
        assert [one.ifindex for one in attachments.attached()] == [near]
        route.link("del", index=near)
    attachments.detach(near, Direction.INGRESS)
    with pytest.raises(KernelError):
        attachments.attach(near, Direction.INGRESS, switch.program("from_port"))
    attachments.close()
