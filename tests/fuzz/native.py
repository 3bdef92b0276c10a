"""The C that reads: libvirt's lock driver (hooks/lock/ask.c), under libFuzzer and under gcc's sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .target import FINDINGS, HERE, stored

NAME = "lock-driver"
SOURCE = HERE / "ask_fuzz.c"
BYTES_MAX = 4096
_SANITIZERS = "-fsanitize=address,undefined"
_FLAGS = (
    "-g",
    "-O1",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Werror",
    "-Wno-unused-function",
    "-fno-sanitize-recover=all",
)
_HINT = "the fuzzer's runtime for clang-19 is missing: apt-get install libclang-rt-19-dev"


def seeds() -> Iterator[bytes]:
    """The first byte: 0 an answer of the agent, 1 the configuration."""
    for line in (
        '{"ok": true}',
        '{"ok": false, "reason": "no \\"room\\"\\n"}',
        '{"ok": false}',
        "[]",
        '{"ok": false, "reason": "\\',
    ):
        yield b"\0" + line.encode() + b"\n"
    yield b"\0" + b'{"ok": false, "reason": "' + b"x\\" * 700 + b'"}\n'
    yield b'\1# remark\n socket = "/run/migrator/hook.sock" # one\nwait_s = 3\n'
    yield b"\1socket=/" + b"y" * 120 + b"\nsocket = relative\nsocket\nsocket ="


def replay_program(directory: Path) -> Path:
    """A program that takes inputs as files, with gcc's sanitizers."""
    program = directory / "ask_replay"
    subprocess.run(["gcc", *_FLAGS, _SANITIZERS, "-DREPLAY", SOURCE, "-o", program], check=True)
    return program


def written(directory: Path) -> list[Path]:
    """All seeds and findings as files."""
    paths = []
    for number, data in enumerate((*seeds(), *stored(NAME).values())):
        paths.append(directory / f"input{number}")
        paths[-1].write_bytes(data)
    return paths


def fuzz(corpus: Path, seconds: int, seed: int) -> int:
    """Findings of so many seconds; each is in tests/fuzz/findings then."""
    found = corpus.with_name(f"{NAME}.found")
    shutil.rmtree(found, ignore_errors=True)
    for directory in (corpus, found):
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        program, inputs = Path(name, "ask_fuzz"), Path(name, "inputs")
        inputs.mkdir()
        written(inputs)
        flags = (*_FLAGS, f"{_SANITIZERS},fuzzer")
        built = subprocess.run(["clang-19", *flags, SOURCE, "-o", program], capture_output=True, text=True, check=False)
        if built.returncode:
            raise SystemExit(f"{NAME}: {_HINT if 'libclang_rt' in built.stderr else built.stderr}")
        limits = [f"-max_total_time={seconds}", f"-max_len={BYTES_MAX}", f"-seed={seed}", "-print_final_stats=1"]
        run = [program, *limits, f"-artifact_prefix={found}/", corpus, inputs]
        done = subprocess.run(run, capture_output=True, text=True, errors="replace", check=False)
    runs = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    crashes = sorted(found.iterdir())
    print(f"{NAME}: {runs[-1] if runs else '?'} runs, {len(crashes)} findings", flush=True)
    for crash in crashes:
        (FINDINGS / NAME).mkdir(parents=True, exist_ok=True)
        print(f"  {done.stderr[-600:]}\n  {shutil.copy(crash, FINDINGS / NAME / crash.name[:18])}")
    if done.returncode and not crashes:
        raise SystemExit(f"{NAME}: the fuzzer itself failed:\n{done.stderr[-3000:]}")
    return len(crashes)
