"""Compile BPF programs as `make bpf` does, for wheels (setup.py) and tests."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "bpf"
COMPILERS = ("clang-19", "clang")
FLAGS = ("-O2", "-g", "-mcpu=v3", "-target", "bpf", "-Wall", "-Werror")


def compile_object(source: Path, target: Path, *flags: str) -> Path:
    """Compile one BPF unit. `flags` come before the header paths. Raises CalledProcessError, FileNotFoundError."""
    compiler = next((name for name in COMPILERS if shutil.which(name)), COMPILERS[0])
    headers = (f"-I{SOURCES}", f"-I/usr/include/{platform.machine()}-linux-gnu")
    subprocess.run([compiler, *FLAGS, *flags, *headers, "-c", str(source), "-o", str(target)], check=True)
    return target
