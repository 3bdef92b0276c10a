"""Points of a migration where tests can make a daemon stand still, and kill it or another one there.

Off unless MIGRATOR_FAULT names a file. The file names one point; the process that comes to it removes the file and
stops as by SIGSTOP, all of its threads: whoever watches it may kill it then, or let it go on with SIGCONT. With RECORD
in it instead, each point that any process comes to is appended to the file FILE.points, and nobody stops.

    ROLE.PHASE           source, destination or coordinator: the new phase is stored and nothing of it done yet
    ROLE.send.MESSAGE    the message is about to be written to its stream; ROLE.got.MESSAGE: it was read, not applied
    hook.OPERATION       of libvirt's hook

`points()` makes the list out of the machines' phases and the messages of the RPC contract, so that a new phase or
message is in it by itself. Between agents MESSAGE is one of FromSource or FromDestination, `ask` or `answer`; with the
coordinator it is one of ToAgent or FromAgent (progress: by its event), at the agent with the role `agent`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrator._pb import migrator_pb2 as pb
from migrator.lifecycle import coordinator_words, destination_words, source_words
from migrator.lifecycle.coordinator import WORDS

FILE = "MIGRATOR_FAULT"
RECORD = "?"
PHASES = {
    "source": source_words.Phase,
    "destination": destination_words.Phase,
    "coordinator": coordinator_words.Phase,
}
EVENTS = WORDS | {"running"}
"""Of Progress; `running` is no news to the coordinator's machine."""
_wanted = Path(os.environ[FILE]) if FILE in os.environ else None


def reach(role: str, step: str) -> None:
    """Stand still if this point is the one that is asked for."""
    if _wanted is not None:
        _reach(_wanted, f"{role}.{step}")


def passing(place: str, message: Any) -> None:
    """The same for a message (with a oneof `message`); `place` is ROLE.send or ROLE.got."""
    if _wanted is not None:
        _reach(_wanted, f"{place}.{_name(message)}")


def _reach(wanted: Path, point: str) -> None:
    try:
        asked = wanted.read_text()
    except FileNotFoundError:
        return
    if asked == RECORD:
        with wanted.with_suffix(".points").open("a") as record:
            record.write(point + "\n")
    if asked == point:
        wanted.unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGSTOP)


def _name(message: Any) -> str:
    which = str(message.WhichOneof("message"))
    return f"{which}.{message.progress.event}" if which == "progress" else which


def points() -> list[str]:
    """Every point of both ends, of the coordinator, and of what passes between the three."""
    phases = [f"{role}.{phase}" for role, words in PHASES.items() for phase in words]
    return phases + [point for sender, name, receiver in _messages() for point in _both(sender, name, receiver)]


def _both(sender: str, name: str, receiver: str) -> tuple[str, str]:
    return f"{sender}.send.{name}", f"{receiver}.got.{name}"


def _messages() -> Iterator[tuple[str, str, str]]:
    """Sender, message, receiver."""
    yield "source", "ask", "destination"
    yield "destination", "answer", "source"
    streams = (
        ("source", pb.FromSource, "destination"),
        ("destination", pb.FromDestination, "source"),
        ("coordinator", pb.ToAgent, "agent"),
        ("agent", pb.FromAgent, "coordinator"),
    )
    for sender, message, receiver in streams:
        for field in message.DESCRIPTOR.oneofs_by_name["message"].fields:
            names = [f"progress.{event}" for event in sorted(EVENTS)] if field.name == "progress" else [field.name]
            yield from ((sender, name, receiver) for name in names)
