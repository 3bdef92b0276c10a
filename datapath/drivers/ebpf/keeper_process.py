"""The keeper's process: see keeper.py. Run by path, so that it loads nothing but a few modules of the library.

keeper_process.py DESCRIPTOR PATH SECONDS     the listening socket, where it is, and how long an agent may be away
"""

import os
import signal
import socket
import struct
import sys
import time

_LOOK_S = 1.0
_PEER = struct.Struct("=3i")  # struct ucred: pid, uid, gid


def main(descriptor: int, path: str, patience_s: float) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kept: dict[str, int] = {}
    agent, seen = 0, time.monotonic()
    with socket.socket(fileno=descriptor) as listener:
        listener.settimeout(_LOOK_S)
        while time.monotonic() - seen < patience_s:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if kept and alive(agent):
                    seen = time.monotonic()
                continue
            with connection:
                connection.settimeout(1.0)
                agent, seen = peer(connection), time.monotonic()
                try:
                    if not serve(connection, kept):
                        break
                except OSError:
                    continue  # whoever asked is gone
    os.unlink(path)  # noqa: PTH108 (pathlib is more than all the rest)


def peer(connection: socket.socket) -> int:
    """Process that asks."""
    return int(_PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def serve(connection: socket.socket, kept: dict[str, int]) -> bool:
    """Answer one question. False: end."""
    text, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    command, _, name = text.decode().partition(" ")
    answer = "OK"
    given: list[int] = []
    if command == "KEEP" and fds:
        drop(kept, name)
        kept[name] = fds.pop()
    elif command == "TAKE":
        answer, given = ("OK", [kept[name]]) if name in kept else ("NO", [])
    elif command == "DROP":
        drop(kept, name)
    elif command == "LIST":
        answer = " ".join(sorted(kept))
    for extra in fds:
        os.close(extra)
    socket.send_fds(connection, [answer.encode()], given)
    return command != "END"


def drop(kept: dict[str, int], name: str) -> None:
    if name in kept:
        os.close(kept.pop(name))


if __name__ == "__main__":
    if os.fork() == 0:  # whoever started it waits for the parent only
        main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
