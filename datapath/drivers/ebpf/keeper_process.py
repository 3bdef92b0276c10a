"""The keeper's process: see keeper.py. Run by path, so that it loads nothing but a few modules of the library.

keeper_process.py DESCRIPTOR PATH     the listening socket, and where it is
"""

import os
import signal
import socket
import sys

_IDLE_S = 30.0


def main(descriptor: int, path: str) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kept: dict[str, int] = {}
    with socket.socket(fileno=descriptor) as listener:
        listener.settimeout(_IDLE_S)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if not kept:
                    break
                continue
            with connection:
                connection.settimeout(1.0)
                try:
                    if not serve(connection, kept):
                        break
                except OSError:
                    continue  # whoever asked is gone
    os.unlink(path)  # noqa: PTH108 (pathlib is more than all the rest)


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
        main(int(sys.argv[1]), sys.argv[2])
