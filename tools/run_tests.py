#!/usr/bin/env python3
"""Run the tests in parts, one after the other, and sum them up: side by side what can be, alone what measures time.

    tools/run_tests.py tests/unit --meanwhile tests/soak --after tests/libvirt --after tests/netns -- -k name

1. The folders, their files spread over as many processes as there are CPUs (at most four); what stands after
   `--meanwhile` runs beside them in a process of its own, before which they step back: it takes long and little CPU;
2. each `--after` in a process of its own, all at once: what waits for deadlines and guests most of its time;
3. the tests with the mark `alone` of them all, when nothing else runs.

When a few tests of a part fail they are run once more, in the end. What passes then is named as unstable: that is a
defect of its own, but does not fail the run.

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
SLOWEST = 20  # to be named
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
        self._said(given)
        began = time.monotonic()
        status = subprocess.run(self._command(report, given), cwd=ROOT, check=False).returncode
        self._ended(report, status, began)

    @contextlib.contextmanager
    def meanwhile(self, report: Path, given: list[str]) -> Iterator[None]:
        """Run it beside the body, and wait for it then: what it printed comes behind what the body did."""
        began, printed = time.monotonic(), report.with_suffix(".txt")
        with printed.open("wb") as output:
            command = self._command(report, given)
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield
            status = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)  # pytest takes away what it has made
            process.wait()
            raise
        self._said(given)
        print(printed.read_text(errors="replace"), flush=True)
        self._ended(report, status, began)

    def again(self, report: Path, given: list[str]) -> None:
        """Run once more what failed, when it is little."""
        if not 0 < len(self.wrong) <= AGAIN_MAX:
            return
        second = Part(self.title, [*self.arguments, "--last-failed", "--last-failed-no-failures=none"], nice=self.nice)
        second.run(report, given)
        self.seconds += second.seconds
        if second.counts["passed"] >= len(self.wrong) and not second.wrong:
            self.counts += Counter(passed=len(self.wrong), failed=-len(self.wrong))
            self.unstable, self.wrong = self.wrong, []

    def _command(self, report: Path, given: list[str]) -> list[str]:
        nice = ["nice", "-n", str(self.nice)] if self.nice else []
        cache = f"cache_dir=.pytest_cache/{self.title.replace(' ', '_')}"  # of what failed last: others run beside it
        options = [f"--junitxml={report}", f"--durations={SLOWEST}", "-o", cache]
        return [*nice, sys.executable, "-m", "pytest", *self.arguments, *options, *given]

    def _said(self, given: list[str]) -> None:
        print(f"\n==== {self.title}: {' '.join(['pytest', *self.arguments, *given])}", flush=True)

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
        return f"{self.title:>12}: {_sum(self.counts)} in {self.seconds:.0f} s"


def _sum(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped"))


def stages(arguments: argparse.Namespace) -> list[list[Part]]:
    """What runs one after the other; the parts of one run beside each other."""
    spread = ["-n", str(arguments.workers), "--dist", "loadfile"] if arguments.workers > 1 else []
    behind = BEHIND if arguments.meanwhile else 0
    first = [Part("side by side", [*arguments.beside, "--alone=no", *spread], nice=behind)]
    if arguments.meanwhile:
        first.append(Part("meanwhile", [*arguments.meanwhile, "--alone=no"]))
    then = [Part(" ".join(Path(name).stem for name in names), [*names, "--alone=no"]) for names in arguments.after]
    everything = [*arguments.beside, *arguments.meanwhile, *(name for names in arguments.after for name in names)]
    return [stage for stage in (first, then, [Part("alone", [*everything, "--alone=only"])]) if stage]


def run(stage: list[Part], directory: Path, given: list[str]) -> None:
    first, *others = stage
    with contextlib.ExitStack() as beside:
        for part in others:
            beside.enter_context(part.meanwhile(directory / f"{part.title}.xml", given))
        first.run(directory / f"{first.title}.xml", given)


def parsed() -> argparse.Namespace:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("beside", nargs="+", help="folders or files")
    parser.add_argument("--meanwhile", nargs="+", default=[], help="folders or files to run beside those")
    parser.add_argument(
        "--after", nargs="+", action="append", default=[], help="folders or files for a process behind them"
    )
    parser.add_argument("--workers", type=int, default=min(WORKERS_MAX, len(os.sched_getaffinity(0))))
    return parser.parse_args(words[:end], argparse.Namespace(given=words[end + 1 :]))


def main() -> int:
    arguments, began = parsed(), time.monotonic()
    todo = stages(arguments)
    parts = [part for stage in todo for part in stage]
    with tempfile.TemporaryDirectory(prefix="run-tests-") as directory:
        for stage in todo:
            run(stage, Path(directory), arguments.given)
        for part in parts:
            part.again(Path(directory, f"{part.title} again.xml"), arguments.given)
    total: Counter[str] = sum((part.counts for part in parts), Counter())
    wrong = [line for part in parts for line in part.wrong]
    unstable = [line for part in parts for line in part.unstable]
    if not total["passed"]:
        wrong.append("nothing passed: that proves nothing")
    print("\n==== summary", *(part.line() for part in parts), *(f"UNSTABLE {line}" for line in unstable), sep="\n")
    print(*(f"FAILED {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    print(f"{_sum(total)} in {time.monotonic() - began:.0f} s: {'FAILED' if wrong else 'all is well'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
