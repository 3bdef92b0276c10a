"""Every seed, and every input that ever was a finding, once: in `make test`, without a fuzzer."""

from __future__ import annotations

import pytest

from .target import inputs
from .targets import TARGETS

CASES = [(name, case, data) for name, target in TARGETS.items() for case, data in inputs(target).items()]


@pytest.mark.parametrize(
    ("name", "data"), [(name, data) for name, _, data in CASES], ids=[f"{n}-{c}" for n, c, _ in CASES]
)
def test_replay(name: str, data: bytes) -> None:
    TARGETS[name].run(data)
