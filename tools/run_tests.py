#!/usr/bin/env python3
"""Run the tests in parts, one after the other, and sum them up: side by side what can be, alone what measures time.

    tools/run_tests.py tests/unit tests/netns --meanwhile tests/soak --after tests/libvirt/test_loop.py -- -k name

1. The folders, their files spread over as many processes as there are CPUs (at most four); what stands after
   `--meanwhile` runs beside them in a process of its own, before which they step back: it takes long and little CPU;
2. their tests with the mark `alone`, when nothing else runs;
3. what stands after `--after`, in one process too: an emulated guest needs the CPUs for itself.

When a few tests of a part fail they are run once more, but for `--meanwhile`. What passes then is named as unstable:
that is a defect of its own, but does not fail the run.

What stands after `--` goes to each pytest. The last lines name what failed and tell the sum. Exit status 0: something
passed and nothing failed. A part that fails does not keep the next from running, an interrupt does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS_MAX = 4
BEHIND = 10  # niceness of what runs beside something else
AGAIN_MAX = 5
"""More that fail are no accident of the machine's."""
ENDED_WELL = (0, 5)  # pytest's ExitCode.OK, and NO_TESTS_COLLECTED: `-k` may choose none of a part


@dataclass
class Part:
    """One run of pytest."""

    title: str
    arguments: list[str]
    counts: Counter[str] = field(default_factory=Counter)  # passed, failed, skipped
    wrong: list[str] = field(default_factory=list)
    unstable: list[str] = field(default_factory=list)
    seconds: float = 0.0
    nice: int = 0

    def run(self, report: Path, given: list[str]) -> None:
        self._run(report, given)
        if 0 < len(self.wrong) <= AGAIN_MAX:
            again = [*self.arguments, "--last-failed", "--last-failed-no-failures=none"]
            second = Part(f"{self.title} again", again, nice=self.nice)
            second._run(report.with_suffix(".again.xml"), given)
            self.seconds += second.seconds
            if second.counts["passed"] >= len(self.wrong) and not second.wrong:
                self.counts += Counter(passed=len(self.wrong), failed=-len(self.wrong))
                self.unstable, self.wrong = self.wrong, []

    def _run(self, report: Path, given: list[str]) -> None:
        print(f"\n==== {self.title}: {' '.join(['pytest', *self.arguments, *given])}", flush=True)
        began = time.monotonic()
        status = subprocess.run(self._command(report, given), cwd=ROOT, check=False).returncode
        self._ended(report, status, began)

    @contextlib.contextmanager
    def meanwhile(self, report: Path, given: list[str]) -> Iterator[None]:
        """Run it beside the body, and wait for it then: what it printed comes behind what the body did."""
        cache = f"cache_dir=.pytest_cache/{report.stem}"  # of what failed last: another run's beside it is not its own
        began, printed = time.monotonic(), report.with_suffix(".txt")
        with printed.open("wb") as output:
            command = self._command(report, ["-o", cache, *given])
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield
            status = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)  # pytest takes away what it has made
            process.wait()
            raise
        print(f"\n==== {self.title}: {' '.join(['pytest', *self.arguments, *given])}")
        print(printed.read_text(errors="replace"), flush=True)
        self._ended(report, status, began)

    def _command(self, report: Path, given: list[str]) -> list[str]:
        nice = ["nice", "-n", str(self.nice)] if self.nice else []
        return [*nice, sys.executable, "-m", "pytest", *self.arguments, f"--junitxml={report}", *given]

    def _ended(self, report: Path, status: int, began: float) -> None:
        self.seconds = time.monotonic() - began
        if status == -2 or status == 2:
            raise KeyboardInterrupt
        self._read(report)
        if status not in ENDED_WELL and not self.wrong:
            self.wrong.append(f"{self.title}: pytest ended with status {status}")

    def _read(self, report: Path) -> None:
        if not report.exists():
            return
        for case in ElementTree.parse(report).iter("testcase"):
            ends = {child.tag for child in case} & {"failure", "error", "skipped"}
            self.counts["failed" if ends - {"skipped"} else "skipped" if ends else "passed"] += 1
            if ends - {"skipped"}:
                self.wrong.append(f"{self.title}: {case.get('file')}::{case.get('name')}")

    def line(self) -> str:
        return f"{self.title:>12}: {_said(self.counts)} in {self.seconds:.0f} s"


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped"))


def parts(arguments: argparse.Namespace) -> list[Part]:
    beside = ["-n", str(arguments.workers), "--dist", "loadfile"] if arguments.workers > 1 else []
    made = [
        Part("side by side", [*arguments.beside, "--alone=no", *beside], nice=BEHIND if arguments.meanwhile else 0),
        Part("alone", [*arguments.beside, "--alone=only"]),
    ]
    return [*made, Part("after", list(arguments.after))] if arguments.after else made


def parsed() -> argparse.Namespace:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("beside", nargs="+", help="folders or files")
    parser.add_argument("--meanwhile", nargs="+", default=[], help="folders or files to run beside those")
    parser.add_argument("--after", nargs="+", default=[], help="folders or files that run alone, at the end")
    parser.add_argument("--workers", type=int, default=min(WORKERS_MAX, len(os.sched_getaffinity(0))))
    return parser.parse_args(words[:end], argparse.Namespace(given=words[end + 1 :]))


def main() -> int:
    arguments, began = parsed(), time.monotonic()
    first, *others = todo = parts(arguments)
    with tempfile.TemporaryDirectory(prefix="run-tests-") as directory:
        with contextlib.ExitStack() as both:
            if arguments.meanwhile:
                beside = Part("meanwhile", list(arguments.meanwhile))
                todo.insert(1, beside)
                both.enter_context(beside.meanwhile(Path(directory, "meanwhile.xml"), arguments.given))
            first.run(Path(directory, "0.xml"), arguments.given)
        for number, part in enumerate(others, 1):
            part.run(Path(directory, f"{number}.xml"), arguments.given)
    total: Counter[str] = sum((part.counts for part in todo), Counter())
    wrong = [line for part in todo for line in part.wrong]
    unstable = [line for part in todo for line in part.unstable]
    if not total["passed"]:
        wrong.append("nothing passed: that proves nothing")
    print("\n==== summary", *(part.line() for part in todo), *(f"UNSTABLE {line}" for line in unstable), sep="\n")
    print(*(f"FAILED {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    print(f"{_said(total)} in {time.monotonic() - began:.0f} s: {'FAILED' if wrong else 'all is well'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
