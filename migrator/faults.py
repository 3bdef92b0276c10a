"""A place to stand still: how tests stop a daemon in the middle of a migration, and kill it or another one there.

Off unless MIGRATOR_FAULT names a file. The file names one point, `ROLE.PHASE` with ROLE source, destination or
coordinator, or `hook.OPERATION` of libvirt's hook. The process that comes to it, the new phase stored and nothing of
it done yet, removes the file and stops as by SIGSTOP, all of its threads: whoever watches it may kill it then, or let
it go on with SIGCONT.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

FILE = "MIGRATOR_FAULT"
_wanted = Path(os.environ[FILE]) if FILE in os.environ else None


def reach(role: str, phase: str) -> None:
    """Stand still if this point is the one that is asked for."""
    if _wanted is None:
        return
    try:
        point = _wanted.read_text()
    except FileNotFoundError:
        return
    if point == f"{role}.{phase}":
        _wanted.unlink()
        os.kill(os.getpid(), signal.SIGSTOP)
