# SPDX-License-Identifier: GPL-2.0-only
"""Agents of other versions, as this one's with another tongue: what they say and hear is changed on its way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google.protobuf.message import Message

from migrator.agent import peer
from migrator.agent.daemon import Agent
from migrator.agent.stream import PeerStream

CONTRACT = json.loads((Path(__file__).parents[1] / "fixtures" / "rpc-1" / "contract.json").read_text())["messages"]
FUTURE = b"\xc0\x3e\x2a" + b"\xca\x3e\x06future"  # field 1000: 42; field 1001: a text

M = TypeVar("M", bound=Message)
Change = Callable[[Any], Any]


def previous(message: M) -> M:
    """Only what the first release knew."""
    made = type(message)()
    made.CopyFrom(message)
    _strip(made)
    return made


def _strip(message: Message) -> None:
    known = CONTRACT[message.DESCRIPTOR.full_name.removeprefix("migrator.v1.")]
    for field, value in message.ListFields():
        if str(field.number) not in known:
            message.ClearField(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in value if field.is_repeated else (value,):
                _strip(one)


def following(message: M) -> M:
    """With fields that nobody knows yet, in the message and in what it carries."""
    made = type(message)()
    made.CopyFrom(message)
    for field, value in made.ListFields():
        if field.message_type is not None and not field.is_repeated:
            value.MergeFromString(FUTURE)
    made.MergeFromString(FUTURE)
    if made.DESCRIPTOR.name == "Hello":
        made.protocol.minor = 99  # type: ignore[attr-defined]
    return made


def speak(patch: pytest.MonkeyPatch, host: str, change: Change) -> list[str]:
    """From its start on, the agent of `host` says and hears all as `change` makes it. Returns what was changed."""
    changed: list[str] = []

    def through(message: Any) -> Any:
        made = change(message)
        if made.SerializeToString(deterministic=True) != message.SerializeToString(deterministic=True):
            changed.append(type(message).__name__)
        return made

    start, stream_send, source_send = Agent.start, PeerStream.send, peer._Source.send

    async def start_so(agent: Agent) -> None:
        if agent.host == host:
            link, hello = agent.link, agent.link._hello
            say, take = link.send, link._take

            async def hello_so() -> Any:
                return through(await hello())

            async def take_so(message: Any) -> None:
                await take(through(message))

            patch.setattr(link, "_hello", hello_so)
            patch.setattr(link, "_take", take_so)
            patch.setattr(link, "send", lambda message: say(through(message)))
        await start(agent)

    async def stream_so(stream: PeerStream, message: Any) -> None:
        await stream_send(stream, through(message))

    patch.setattr(Agent, "start", start_so)
    patch.setattr(PeerStream, "send", stream_so)
    patch.setattr(peer._Source, "send", lambda source, message: source_send(source, through(message)))
    return changed
