"""Frames through the switch and the reference model (tests/bpf/reference.py) for a while, from random seeds.

Every other scenario has remap rules.
"""

from __future__ import annotations

import secrets
import time

from tests.bpf.beside import Beside, scenario, shortest
from tests.bpf.harness import Switch
from tests.bpf.lab import Lab
from tests.bpf.test_reference import FRAMES, told

NAME = "packets"


def fuzz(seconds: int, seed: int) -> int:
    """1 when a difference was found, which ends it: it is printed, cut down to the frames that it takes."""
    first = seed or secrets.randbits(32)
    end, scenarios = time.monotonic() + seconds, 0
    with Switch() as switch, Lab(switch) as lab:
        beside = Beside(lab)
        while time.monotonic() < end:
            given = scenario(first + scenarios, FRAMES, remapped=scenarios % 2 == 1)
            if beside.differs(given):
                print(told(*shortest(beside, given), first + scenarios))
                return 1
            scenarios += 1
    print(f"{NAME}: {scenarios * FRAMES} frames from seed {first} on, no difference", flush=True)
    return 0
