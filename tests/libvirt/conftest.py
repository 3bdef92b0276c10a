# SPDX-License-Identifier: GPL-2.0-only
"""Tests with libvirt and QEMU: two hosts with a libvirtd each, real guests without KVM.

A guest that is emulated needs a machine that is quicker than it: where a lab or a test says that this one was not
(TooSlow, and nothing else), all that the test's module has made is made anew, and the test runs again.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from migrator.lab.errors import TooSlow
from migrator.lab.machines import Machine, Port, add_outsider
from tools import guest_kernel

from .bench import Bench, Kept
from .lab import GuestMachine, LibvirtLab, Wiring, add_guest
from .lab.image import image

TEST_S = 900
TRIES = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_S))
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root for namespaces"))
            elif not shutil.which("libvirtd"):
                item.add_marker(pytest.mark.skip(reason="needs libvirt-daemon"))


FAILED = pytest.StashKey[bool]()
TOO_SLOW = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    if call.excinfo is not None and call.excinfo.errisinstance(TooSlow):
        item.stash[TOO_SLOW] = str(call.excinfo.value)
    return report


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test again that this machine was too slow for. Three times at most, and it says so."""
    if Path(__file__).parent not in item.path.parents:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for left in reversed(range(TRIES)):
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        why = item.stash.get(TOO_SLOW, "")
        if not why or not left:
            break
        print(f"\n{item.nodeid}: this machine was too slow, {left} more tries: {why}", file=sys.__stdout__, flush=True)
        _forget(item)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _forget(item: pytest.Item) -> None:
    """All that was made for it but what is the session's."""
    item.stash[TOO_SLOW] = ""
    item.stash.setdefault(FAILED, True)
    del item.stash[FAILED]
    try:
        item.session._setupstate.teardown_exact(item.session)  # type: ignore[arg-type]  # but for what is above it
    except Exception:
        traceback.print_exc(file=sys.__stdout__)


@pytest.fixture
def bench(benches: Kept[Bench], request: pytest.FixtureRequest) -> Iterator[Bench]:
    """What the module's `benches` keeps, settled; made anew after a test that failed."""
    yield benches.get()
    if FAILED in request.node.stash:
        benches.drop()


@pytest.fixture(scope="session", autouse=True)
def guest_image() -> None:
    """What guests boot, built before the first deadline runs."""
    try:
        image()
    except guest_kernel.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bridged() -> Iterator[LibvirtLab]:
    """Two libvirt hosts with a Linux bridge each on the fabric, and nothing of the migrator."""
    with LibvirtLab() as lab:
        lab.bridge()
        yield lab


@pytest.fixture(scope="module")
def guest(bridged: LibvirtLab) -> GuestMachine:
    """One guest on the bridge, booted at h1. Each test leaves it running, on whichever host."""
    port = Port("52:54:00:00:00:10", "", ("10.1.0.1", "fd00:1::1"))
    machine = add_guest(bridged, "vm1", "h1", [port], Wiring("bridge", bridge="br0"))
    machine.booted()
    return machine


@pytest.fixture(scope="module")
def outsider(bridged: LibvirtLab) -> Machine:
    """A peer on the fabric."""
    return add_outsider(bridged, "peer", Port("02:00:00:00:00:20", "", ("10.1.2.1", "fd00:1::2:1")))


@pytest.fixture
def clean_guest(guest: GuestMachine) -> Iterator[GuestMachine]:
    """The same guest without sockets or counts of an earlier test."""
    yield guest
    guest.reset()
