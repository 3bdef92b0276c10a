# SPDX-License-Identifier: GPL-2.0-only
"""BPF objects that count which branches of their source ran, by LLVM's own source-based coverage.

clang's front end marks each branch with the intrinsic llvm.instrprof.increment, and describes in the same breath where
in the source it is. LLVM would lower the intrinsics to a runtime that no kernel has. Here each becomes an atomic add to
an element of one array in `.data.coverage`, which libbpf makes a map of; the description goes into an object of its own
that llvm-cov reads. tools/bpf_coverage.py runs the tests with it and prints what was not reached.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .model import BPF_SOURCES, CLANG
from .sysbpf import Map

VARIABLE = "MIGRATOR_BPF_COVERAGE"  # directory for descriptions and counts; not set: nothing is measured
SECTION = ".data.coverage"

# Counting takes registers. With the jumps of cpu v4 the deepest chain of calls still fits the 512 bytes of stack.
_FLAGS = ("-mcpu=v4", "-fprofile-instr-generate", "-fcoverage-mapping")
_INCREMENT = re.compile(
    r'^  call void @llvm\.instrprof\.increment(?:\.step)?\(ptr @"?__profn_([^,"]+)"?,'
    r" i64 (-?\d+), i32 (\d+), i32 (\d+)(?:, i64 ([^)]+))?\)",
    re.M,
)
_NAME = re.compile(r'^@"?__profn_([^ "]+)"? = .* c"([^"]*)"', re.M)
_RUNTIME = re.compile(
    r'^(?:declare void @llvm\.instrprof|@"?__(?:profn|covrec|llvm)_|\$"?__(?:covrec|llvm)_|@llvm\.used).*\n', re.M
)
_runs = itertools.count()


@dataclass
class Functions:
    """Where in the array each function counts: name -> (first element, hash of its branches, number of counters)."""

    names: dict[str, str]
    placed: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    length: int = 0

    def element(self, symbol: str, digest: int, counters: int, index: int) -> int:
        name = self.names[symbol]
        if name not in self.placed:
            self.placed[name] = (self.length, digest % (1 << 64), counters)
            self.length += counters
        return self.placed[name][0] + index


_compiled: dict[Path, Functions] = {}


def directory() -> Path | None:
    """Where coverage is collected, None when it is not."""
    return Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def compile_object(source: Path, target: Path, *defines: str) -> Path:
    """As harness.compile_object, with counters; the description of the source goes to the directory."""
    where = directory()
    assert where is not None
    command = [*CLANG, *_FLAGS, f"-I{BPF_SOURCES}", *defines]
    raw, lowered = target.with_suffix(".raw.ll"), target.with_suffix(".ll")
    front = ["-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm"]
    subprocess.run([*command, *front, source, "-o", raw], check=True)
    text, functions = lower(raw.read_text())
    lowered.write_text(text)
    back = ["-O2", "-g", "-mcpu=v4", "-target", "bpf", "-x", "ir"]
    subprocess.run([CLANG[0], *back, "-c", lowered, "-o", target], check=True)
    subprocess.run([*command, "-c", source, "-o", where / f"{source.stem}.described.o"], check=True)
    _compiled[target] = functions
    return target


def lower(text: str) -> tuple[str, Functions]:
    """LLVM IR with the increments as instructions, and without what only a runtime needs.

    By assembler: the optimizer would keep addresses and ones in registers over a whole function, and spill the rest.
    """
    functions = Functions(dict(_NAME.findall(text)))
    numbers = itertools.count()

    def add(found: re.Match[str]) -> str:
        symbol, digest, counters, index, step = found.groups()
        address = f"coverage+{8 * functions.element(symbol, int(digest), int(counters), int(index))} ll"
        one = "" if step else "$1 = 1\\0A"
        assembler = f"$0 = {address}\\0A{one}lock *(u64 *)($0 + 0) += $1"
        result = f"%coverage.{next(numbers)}"
        if step:
            return f'  {result} = call i64 asm sideeffect "{assembler}", "=&r,r"(i64 {step})'
        return f'  {result} = call {{ i64, i64 }} asm sideeffect "{assembler}", "=&r,=&r"()'

    text = _RUNTIME.sub("", _INCREMENT.sub(add, text))
    array = f'@coverage = dso_local global [{functions.length} x i64] zeroinitializer, section "{SECTION}", align 8'
    head, rest = text.split("\n@", 1)
    return f"{head}\n{array}\n@{rest}", functions


def collect(target: Path, maps: Mapping[str, Map]) -> None:
    """Write what a loaded object has counted, as the text that llvm-profdata merges."""
    where = directory()
    if where is None or target not in _compiled:
        return
    value = maps[SECTION].lookup(struct.pack("=I", 0))
    assert value is not None
    counts = struct.unpack(f"={len(value) // 8}Q", value)
    lines: list[str] = []
    for name, (first, digest, counters) in _compiled[target].placed.items():
        lines += [name, str(digest), str(counters), *map(str, counts[first : first + counters]), ""]
    (where / f"{os.getpid()}-{next(_runs)}.proftext").write_text("\n".join(lines) + "\n")
