"""The agents that are attached: one session each, with a queue of its own, so that a slow agent holds up nobody."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import structlog

from migrator._pb import migrator_pb2 as pb
from migrator.errors import DeadlineExceeded, PeerLost, rebuild

OUTGOING_MAX = 10_000
"""Messages that may wait for one agent. One that takes none any more is cut off; it attaches again and gets a Sync."""

log = structlog.get_logger()


class Session:
    """One attached agent."""

    def __init__(self, hello: pb.Hello) -> None:
        self.host: str = hello.host
        self.hello = hello
        self.since = time.monotonic()
        self.place_revision = 0
        self._outgoing: asyncio.Queue[pb.ToAgent | Callable[[], pb.ToAgent] | None] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[pb.Reply]] = {}
        self._numbers = itertools.count(1)
        self.open = True

    def send(self, message: pb.ToAgent | Callable[[], pb.ToAgent]) -> None:
        """Queue a message; `message` may be shared between sessions and must not change afterwards.

        What makes one is called when it is sent: a large message, for each of a thousand agents, need not wait made.
        """
        if not self.open:
            return
        if self._outgoing.qsize() >= OUTGOING_MAX:
            log.warning("agent takes no messages, cut off", host=self.host)
            self.close()
            return
        self._outgoing.put_nowait(message)

    def ask(self, **body: Any) -> asyncio.Future[pb.Reply]:
        """Queue a message that is answered. The future ends with the reply, or PeerLost when the agent goes."""
        return self._ask(lambda number: pb.ToAgent(request=number, **body))

    def ask_sync(self, common: pb.Sync, ports: Iterable[pb.PortOrder]) -> asyncio.Future[pb.Reply]:
        """The same for a Sync of what all hosts are told and what this one is told besides, made when it is sent."""
        own = pb.Sync(ports=ports)

        def made(number: int) -> pb.ToAgent:
            message = pb.ToAgent(request=number, sync=own)
            message.sync.MergeFrom(common)
            return message

        return self._ask(lambda number: partial(made, number))

    def _ask(self, body: Callable[[int], pb.ToAgent | Callable[[], pb.ToAgent]]) -> asyncio.Future[pb.Reply]:
        number = next(self._numbers)
        answer: asyncio.Future[pb.Reply] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._answers.pop(number, None))
        if self.open:
            self._answers[number] = answer
            self.send(body(number))
        else:
            answer.set_exception(PeerLost(f"agent of {self.host} is not connected"))
        return answer

    async def request(self, timeout_s: float, **body: Any) -> pb.Reply:
        """Send a message and wait for its answer.

        Raises PeerLost, DeadlineExceeded, or what the agent reported.
        """
        try:
            reply = await asyncio.wait_for(self.ask(**body), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"agent of {self.host} did not answer in {timeout_s:g} s") from None
        if reply.HasField("problem"):
            raise rebuild(reply.problem.kind, f"{self.host}: {reply.problem.message}", reply.problem.hint)
        return reply

    def answer(self, reply: pb.Reply) -> None:
        waiting = self._answers.get(reply.request)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def close(self) -> None:
        """No more messages; whoever waits for an answer gets PeerLost."""
        if not self.open:
            return
        self.open = False
        self._outgoing.put_nowait(None)
        for answer in list(self._answers.values()):
            if not answer.done():
                answer.set_exception(PeerLost(f"agent of {self.host} is gone"))

    async def messages(self) -> Any:
        """What is to be sent, until the session is closed."""
        while (message := await self._outgoing.get()) is not None:
            if not self.open:
                return
            yield message() if callable(message) else message


class Roster:
    """Sessions by host; of two of one host the later one counts."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self.last_seen: dict[str, float] = {}
        self._expected: set[str] = set()

    def expect(self, hosts: Iterable[str]) -> None:
        """Hosts that were attached when an earlier run ended: likely to come back."""
        self._expected = set(hosts)

    def expected(self) -> set[str]:
        return set(self._expected)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def join(self, session: Session) -> None:
        earlier = self._sessions.get(session.host)
        if earlier is not None:
            log.info("agent attached again, its earlier stream is closed", host=session.host)
            earlier.close()
        self._sessions[session.host] = session
        self.last_seen[session.host] = time.time()

    def leave(self, session: Session) -> bool:
        """False when a later session of the host has taken its place."""
        session.close()
        self.last_seen[session.host] = time.time()
        if self._sessions.get(session.host) is not session:
            return False
        del self._sessions[session.host]
        return True

    def get(self, host: str) -> Session | None:
        return self._sessions.get(host)

    def send(self, host: str, **body: Any) -> None:
        """Send to one host; lost when it is not attached."""
        session = self._sessions.get(host)
        if session is not None:
            session.send(pb.ToAgent(**body))

    def broadcast(self, **body: Any) -> Iterable[str]:
        """Send to all; returns who they are."""
        message = pb.ToAgent(**body)
        for session in self:
            session.send(message)
        return list(self._sessions)
