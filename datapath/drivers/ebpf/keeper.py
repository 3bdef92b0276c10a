"""A process that keeps descriptors of hold taps, so that frames wait on while the agent is gone.

A tap forgets its frames when its last descriptor is closed. The agent gives each hold tap to the keeper, and takes it
from there when it starts again. The keeper does nothing else, imports nothing of ours, and ends when it has kept
nothing for a while or the agent does not come back. A tap's descriptor keeps its network namespace too: who takes down
a host for good calls `end`. Under systemd the unit needs KillMode=process, or the keeper dies with the agent.

    agent -> keeper   KEEP name + descriptor | TAKE name | DROP name | LIST | END
    keeper -> agent   OK [+ descriptor] | NO | names
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from datapath.errors import KernelError

_START_S = 5.0
_ANSWER_S = 5.0
_SCRIPT = Path(__file__).with_name("keeper_process.py")


class Keeper:
    """The agent's side: starts the process if there is none. Calls may come from any thread."""

    def __init__(self, path: Path, patience_s: float = 120.0) -> None:
        """`path`: unix socket in a directory that only root can write. `patience_s`: how long the agent may be away."""
        self._path = path
        self._patience_s = patience_s

    def keep(self, name: str, fd: int) -> None:
        """Hand over a copy of a descriptor. Raises KernelError."""
        self._ask(f"KEEP {name}", fd)

    def take(self, name: str) -> int | None:
        """A copy of a kept descriptor; None if it is not kept."""
        return self._ask(f"TAKE {name}", start=False)[1]

    def drop(self, name: str) -> None:
        """Close the keeper's copy; not kept is no error."""
        self._ask(f"DROP {name}", start=False)

    def kept(self) -> list[str]:
        return self._ask("LIST", start=False)[0].split()

    def end(self) -> None:
        """Close all copies and end the process."""
        self._ask("END", start=False)

    def _ask(self, text: str, fd: int | None = None, *, start: bool = True) -> tuple[str, int | None]:
        connection = self._connect(start)
        if connection is None:
            return "", None
        with connection:
            socket.send_fds(connection, [text.encode()], [] if fd is None else [fd])
            try:
                answer, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
            except OSError as error:
                raise KernelError(f"keeper at {self._path}: {text.split()[0]}", error.errno or 0) from None
        for extra in fds:
            os.set_inheritable(extra, False)
        return answer.decode(), fds[0] if fds else None

    def _connect(self, start: bool) -> socket.socket | None:
        deadline = time.monotonic() + _START_S
        begun = False
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.settimeout(_ANSWER_S)
            try:
                connection.connect(str(self._path))
                return connection
            except OSError as error:
                connection.close()
                if not start:
                    return None
                if not begun:
                    self._start()
                    begun = True
                if time.monotonic() > deadline:
                    raise KernelError(f"start the keeper at {self._path}", error.errno or 0) from None

    def _start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(64)
            arguments = [str(listener.fileno()), str(self._path.absolute()), str(self._patience_s)]
            command = [sys.executable, "-I", "-S", str(_SCRIPT), *arguments]
            process = subprocess.Popen(
                command, pass_fds=[listener.fileno()], start_new_session=True, stdin=subprocess.DEVNULL, cwd="/"
            )
            process.wait(_START_S)  # it goes on in a child of its own
