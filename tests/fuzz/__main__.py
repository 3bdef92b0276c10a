"""Fuzz for a while: python -m tests.fuzz [--seconds N] [TARGET ...]; without a target, all.

Each target runs in a process of its own, which libFuzzer ends. What it finds is made smaller and written to
tests/fuzz/findings, where `make test` replays it; what reached something new stays in .cache/fuzz.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import native, packets
from .target import CORPUS, Target, keep, outcome, stored
from .targets import TARGETS

CACHE = Path(__file__).parents[2] / ".cache" / "fuzz"
MEMORY_MB = 2048
KEPT, KEPT_BYTES = 20, 600
INPUT_S = 20  # for one input, on a busy machine


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description="Fuzz the readers of hostile input.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join((*TARGETS, native.NAME, packets.NAME)))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time; it is printed")
    parser.add_argument(
        "--keep-corpus", action="store_true", help="some of what reached something new into tests/fuzz/corpus"
    )
    given = parser.parse_args()
    names = given.targets or [*TARGETS, native.NAME, packets.NAME]
    found = 0
    for name in names:
        if name == native.NAME:
            found += native.fuzz(CACHE / name, given.seconds, given.seed)
        elif name == packets.NAME:
            found += packets.fuzz(given.seconds, given.seed)
        elif name in TARGETS:
            found += fuzz(TARGETS[name], given.seconds, given.seed, keep_corpus=given.keep_corpus)
        else:
            parser.error(f"no target {name!r}: one of {', '.join((*TARGETS, native.NAME, packets.NAME))}")
    print(f"{len(names)} targets, {found} findings")
    return 1 if found else 0


def fuzz(target: Target, seconds: int, seed: int, *, keep_corpus: bool) -> int:
    """Findings of one target."""
    corpus, crashes = CACHE / target.name, CACHE / f"{target.name}.found"
    shutil.rmtree(crashes, ignore_errors=True)
    for directory in (corpus, crashes):
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        seeds, words = Path(directory, "seeds"), Path(directory, "words")
        seeds.mkdir()
        for number, data in enumerate((*target.seeds(), *stored(target.name).values())):
            (seeds / str(number)).write_bytes(data)
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        run = [sys.executable, "-m", "tests.fuzz.drive", target.name]
        limits = [f"-max_total_time={seconds}", f"-timeout={INPUT_S}", f"-rss_limit_mb={MEMORY_MB}"]
        other = [f"-max_len={target.bytes_max}", f"-artifact_prefix={crashes}/", f"-seed={seed}"]
        other += [f"-dict={words}"] if target.words else []
        done = subprocess.run(
            [*run, *limits, *other, "-print_final_stats=1", "-verbosity=1", str(corpus), str(seeds)],
            capture_output=True,
            text=True,
            check=False,
        )
    if keep_corpus:
        _keep_some(target, corpus)
    found = [path.read_bytes() for path in sorted(crashes.iterdir())]
    print(f"{target.name}: {_statistics(done.stderr)}, {len(found)} findings", flush=True)
    if done.returncode and not found:
        raise SystemExit(f"{target.name}: the fuzzer itself failed:\n{done.stderr[-3000:]}")
    for data in found:
        print(f"  {' '.join(outcome(target, data) or ('too slow, or too much memory',))}: {keep(target, data)}")
    return len(found)


def _keep_some(target: Target, corpus: Path) -> None:
    """Small inputs, of all sizes, of those that reached something new."""
    small = sorted(
        (path for path in corpus.iterdir() if path.stat().st_size <= KEPT_BYTES), key=lambda one: one.stat().st_size
    )
    kept = CORPUS / target.name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for path in small[:: max(len(small) // KEPT, 1)][:KEPT]:
        shutil.copy(path, kept / path.name[:12])


def _escaped(word: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in word)


def _statistics(text: str) -> str:
    """Runs and covered edges of libFuzzer's report."""
    runs = [line.split()[-1] for line in text.splitlines() if "number_of_executed_units" in line]
    edges = [line.split("cov: ")[1].split()[0] for line in text.splitlines() if "cov: " in line]
    return f"{runs[-1] if runs else '?'} runs, {edges[-1] if edges else '?'} edges"


if __name__ == "__main__":
    sys.exit(main())
