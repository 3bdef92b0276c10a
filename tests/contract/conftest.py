"""The contract of datapath/provider.py, run against every driver."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

from datapath.provider import Driver
from tests.contract.hosts import HOSTS, Host


def _params() -> list[object]:
    return [pytest.param(name, marks=[] if name == "dummy" else [pytest.mark.root]) for name in HOSTS]


@pytest.fixture(params=_params())
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host with a started driver of each sort."""
    name = request.param
    if name != "dummy" and os.geteuid() != 0:
        pytest.skip("needs root for network namespaces and bpf(2)")
    (point,) = entry_points(group="migrator.drivers", name=name)
    if importlib.util.find_spec(point.module) is None:
        pytest.skip(f"driver {name} is not installed")
    with HOSTS[name]() as made:
        yield made


@pytest.fixture
def driver(host: Host) -> Driver:
    return host.driver
