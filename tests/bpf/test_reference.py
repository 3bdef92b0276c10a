# SPDX-License-Identifier: GPL-2.0-only
"""Tens of thousands of frames, sound and broken, through the real programs and through the reference: no difference.

Another beginning each time would make another test of each run: here the seeds are fixed, `make fuzz T=packets` goes on
from random ones and prints them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .beside import Beside, Scenario, scenario, shortest
from .harness import Switch
from .lab import Lab

FRAMES = 1000  # of a scenario
SCENARIOS = 5  # of a test


@pytest.fixture(scope="module")
def beside(loaded_switch: Switch) -> Iterator[Beside]:
    with Lab(loaded_switch) as lab:
        yield Beside(lab)
    loaded_switch.reset()


def told(given: Scenario, said: str, seed: int) -> str:
    frames = [
        f"  {one.direction} gso {one.gso_size} policy {one.policy} remap {one.remap} {one.frame.hex()}"
        for one in given.sent
    ]
    return "\n".join([f"seed {seed}: {said}", repr(given.setting), *frames])


def agree(beside: Beside, batch: int, *, remapped: bool) -> None:
    for seed in range(batch * SCENARIOS, (batch + 1) * SCENARIOS):
        given = scenario(seed, FRAMES, remapped=remapped)
        assert beside.differs(given) is None, told(*shortest(beside, given), seed)


@pytest.mark.parametrize("batch", range(6))
def test_switch_and_reference_agree(beside: Beside, batch: int) -> None:
    agree(beside, batch, remapped=False)


@pytest.mark.parametrize("batch", range(4))
def test_they_agree_on_remapped_addresses(beside: Beside, batch: int) -> None:
    agree(beside, batch, remapped=True)
