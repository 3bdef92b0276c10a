# SPDX-License-Identifier: GPL-2.0-only
"""Limits of older kernels that this one does not enforce: computed from the instructions as libbpf loads them.

Linux 6.1 rounds each frame of a chain of calls up to 32 bytes and refuses a chain above 512 bytes or 8 frames
(kernel/bpf/verifier.c, check_max_stack_depth).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from . import coverage
from .harness import Switch

FRAMES_MAX, STACK_MAX, ROUNDING = 8, 512, 32
_CALL, _LOAD_ADDRESS, _ADD_IMMEDIATE, _MOVE = 0x85, 0x18, 0x07, 0xBF
_FRAME_POINTER = 10


@dataclass
class Function:
    start: int
    stack: int = 0
    calls: set[int] = field(default_factory=set)

    @property
    def rounded(self) -> int:
        return max(self.stack, 1) + -max(self.stack, 1) % ROUNDING


def functions(code: bytes) -> dict[int, Function]:
    """Start -> function, from the instructions of a program with all its subprograms behind it."""
    insns = [struct.unpack_from("=BBhi", code, offset) for offset in range(0, len(code), 8)]
    targets = {0: Function(0)}
    for index, (opcode, registers, _, immediate) in enumerate(insns):
        if _is_call(opcode, registers):
            targets.setdefault(index + 1 + immediate, Function(index + 1 + immediate))
    current = targets[0]
    for index, (opcode, registers, offset, immediate) in enumerate(insns):
        current = targets.get(index, current)
        if _is_call(opcode, registers):
            current.calls.add(index + 1 + immediate)
        current.stack = max(current.stack, -_stack_offset(insns, index, opcode, registers, offset))
    return targets


def _is_call(opcode: int, registers: int) -> bool:
    source = registers >> 4
    return (opcode == _CALL and source == 1) or (opcode == _LOAD_ADDRESS and source == 4)  # or a callback


def _stack_offset(insns: list[tuple[int, int, int, int]], index: int, opcode: int, registers: int, offset: int) -> int:
    """Lowest byte of the frame that the instruction touches, 0 none."""
    target, source, kind = registers & 15, registers >> 4, opcode & 7
    if (kind == 1 and source == _FRAME_POINTER) or (kind in (2, 3) and target == _FRAME_POINTER):
        return min(offset, 0)
    if opcode == _ADD_IMMEDIATE and index:
        before = insns[index - 1]
        if before[0] == _MOVE and before[1] == target | _FRAME_POINTER << 4:
            return min(insns[index][3], 0)
    return 0


def deepest(found: dict[int, Function], start: int = 0) -> tuple[int, int]:
    """(bytes, frames) of the worst chain of calls from `start`; the two may be of different chains."""
    below = [deepest(found, callee) for callee in found[start].calls]
    stack = found[start].rounded + max((depth for depth, _ in below), default=0)
    return stack, 1 + max((frames for _, frames in below), default=0)


@pytest.mark.skipif(coverage.directory() is not None, reason="objects that count take more stack")
def test_every_chain_of_calls_fits_older_kernels(loaded_switch: Switch) -> None:
    worst = {name: deepest(functions(code)) for name, code in loaded_switch.instructions.items()}
    assert {name: stack for name, (stack, _) in worst.items() if stack > STACK_MAX} == {}
    assert {name: frames for name, (_, frames) in worst.items() if frames > FRAMES_MAX} == {}


def test_the_count_sees_frames_and_stack() -> None:
    """A function with 40 bytes that calls one with 8."""
    code = struct.pack("=BBhi", 0x7B, 0x0A | 1 << 4, -40, 0)  # *(u64 *)(r10 - 40) = r1
    code += struct.pack("=BBhi", _CALL, 1 << 4, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    code += struct.pack("=BBhi", _MOVE, 2 | 10 << 4, 0, 0) + struct.pack("=BBhi", _ADD_IMMEDIATE, 2, 0, -8)
    assert deepest(functions(code)) == (64 + 32, 2)
