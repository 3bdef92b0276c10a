"""The contract of datapath/provider.py, run against every driver."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points

import pytest

from datapath.errors import NotReady
from datapath.provider import Driver
from tests.contract.hosts import HOSTS, Host, inside


@pytest.fixture(scope="package")
def switches() -> Iterator[Callable[[str], Host]]:
    """The host of a driver, made once: loading programs takes seconds."""
    made: dict[str, Host] = {}
    with contextlib.ExitStack() as stack:

        def host(name: str) -> Host:
            if name not in made:
                made[name] = stack.enter_context(HOSTS[name]())
            return made[name]

        yield host


@pytest.fixture(params=[pytest.param(name, marks=[] if name == "dummy" else [pytest.mark.root]) for name in HOSTS])
def host(request: pytest.FixtureRequest, switches: Callable[[str], Host]) -> Iterator[Host]:
    """A host with a started driver of each sort and no port; what the test makes on it is purged."""
    name = request.param
    if name != "dummy" and os.geteuid() != 0:
        pytest.skip("needs root for network namespaces and bpf(2)")
    (point,) = entry_points(group="migrator.drivers", name=name)
    if importlib.util.find_spec(point.module) is None:
        pytest.skip(f"driver {name} is not installed")
    made = switches(name)
    with inside(made):
        made.events.clear()
        try:
            yield made
        finally:
            _emptied(made)


def _emptied(host: Host) -> None:
    """A test may have stopped or destroyed the driver, or failed between. Nothing of its ports may be left."""
    try:
        host.driver.networks()
    except NotReady:
        host.take_over()
    host.empty()
    left = {sort: names for sort, names in host.driver.remains().items() if names}
    assert left == {}, f"left after all ports were purged: {left}"


@pytest.fixture
def driver(host: Host) -> Driver:
    return host.driver


@pytest.fixture
def ebpf(switches: Callable[[str], Host]) -> Iterator[Host]:
    """A host with a started ebpf driver and no port, which the test's thread is in."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces and bpf(2)")
    made = switches("ebpf")
    with inside(made):
        try:
            yield made
        finally:
            made.empty()
    assert {sort: names for sort, names in made.driver.remains().items() if names} == {}
