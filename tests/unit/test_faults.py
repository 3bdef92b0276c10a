"""The points where tests stop a daemon: complete by construction, harmless when nobody asks, and they do stop it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from migrator import faults
from migrator._pb import migrator_pb2 as pb
from migrator.lab.processes import wait_until
from migrator.lifecycle import coordinator_words, destination_words, source_words

COMMITTED = pb.FromAgent(progress=pb.Progress(event="committed"))
PASS = """
from migrator import faults
from migrator._pb import migrator_pb2 as pb
faults.passing("agent.send", pb.FromAgent(hello=pb.Hello()))
faults.passing("agent.send", pb.FromAgent(progress=pb.Progress(event="committed")))
"""


def test_every_phase_and_message_is_a_point() -> None:
    """Counted apart from the list: a phase or a message that is new in the code has to be in it as well."""
    points = faults.points()
    phases = (source_words.Phase, destination_words.Phase, coordinator_words.Phase)
    streams = (pb.FromSource, pb.FromDestination, pb.ToAgent, pb.FromAgent)
    messages = sum(len(stream.DESCRIPTOR.oneofs_by_name["message"].fields) for stream in streams) + 2  # ask, answer
    messages += len(faults.EVENTS) - 1
    assert len(points) == len(set(points)) == sum(map(len, phases)) + 2 * messages
    assert {"source.settling", "coordinator.in-doubt", "destination.got.final"} <= set(points)
    assert {"agent.got.prepare", "coordinator.got.progress.committed"} <= set(points)


def test_nobody_asks() -> None:
    assert faults._wanted is None
    faults.reach("source", "final")
    faults.passing("agent.send", COMMITTED)


def test_points_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tmp_path / "fault"
    monkeypatch.setattr(faults, "_wanted", wanted)
    faults.reach("source", "final")  # nobody asks yet
    wanted.write_text(faults.RECORD)
    faults.reach("source", "settling")
    faults.passing("agent.send", COMMITTED)
    assert (tmp_path / "fault.points").read_text().split() == ["source.settling", "agent.send.progress.committed"]


def test_a_process_stops_at_the_point_and_at_no_other(tmp_path: Path) -> None:
    wanted = tmp_path / "fault"
    wanted.write_text("agent.send.progress.committed")
    process = subprocess.Popen([sys.executable, "-c", PASS], env={**os.environ, faults.FILE: str(wanted)})
    try:
        wait_until("it came to the point", lambda: not wanted.exists(), 20.0)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
