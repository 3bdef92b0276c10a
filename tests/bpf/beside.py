# SPDX-License-Identifier: GPL-2.0-only
"""The switch beside the reference: the same frames into both, and the first thing in which they differ."""

from __future__ import annotations

import ctypes
import itertools
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datapath.drivers.ebpf.acl import compile_rules
from datapath.drivers.ebpf.remap import elements
from datapath.state.drops import REASONS
from datapath.state.remap import RemapDocument

from . import answers, generated, generated_remap
from .frames import address, mac_bytes
from .generated import FROM, GUEST_MAC, OWN, PEER_MAC, TO, Generator, Sent
from .generated_remap import RemapGenerator
from .lab import Lab
from .model import MODEL
from .probe import TIMEOUTS_MS, load_policy
from .reference import Entry, Reference, Setting

SLOT, OTHER = 1, 2
VID = 20
OK, SHOT, REDIRECT = 0, 2, 7
_NAMES = {number: reason.name for number, reason in REASONS.items()}
_generations = itertools.count(1)


@dataclass(frozen=True)
class Scenario:
    """A port and the frames that it sees."""

    setting: Setting
    sent: Sequence[Sent]


def scenario(seed: int, length: int, *, remapped: bool = False) -> Scenario:
    """`remapped`: with remap rules."""
    chance = random.Random(seed)
    setting = Setting(
        mac=mac_bytes(GUEST_MAC),
        addresses=frozenset(address(text) for text in (*OWN, *chance.choice([(), (), ("fe80::1",)]))),
        policies=generated.policies(chance),
        antispoof=chance.random() < 0.7,
        learning=chance.random() < 0.2,
        trunk=frozenset([VID] if chance.random() < 0.3 else []),
        learned_max=chance.choice([0, 3, 16]),
        known_macs=frozenset([mac_bytes(PEER_MAC)]),
    )
    generator = Generator(chance)
    if remapped:
        setting = replace(setting, remaps=generated_remap.rule_sets(chance))
        generator = RemapGenerator(chance, setting.remaps)
    return Scenario(setting, [generator.one() for _ in range(length)])


class Beside:
    """A port of a real switch on devices of a namespace, made anew for each scenario."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.switch = lab, lab.switch
        self.ifindex, self.wire = lab.veth()
        self.other, _ = lab.veth()
        self.holds = [lab.veth()[0] for _ in (FROM, TO)]
        self._policies: Any = None
        self._table = self.switch.inner("conntracks", SLOT, "ct_table", 4096)
        for slot, ifindex in ((SLOT, self.ifindex), (OTHER, self.other)):
            self.switch.put("devices", ifindex, MODEL.device(slot=slot, role=MODEL.DEVICE_PORT))
        for role, ifindex in zip((MODEL.DEVICE_HOLD_FROM, MODEL.DEVICE_HOLD_TO), self.holds, strict=True):
            self.switch.put("devices", ifindex, MODEL.device(slot=SLOT, role=role))
        for number in (1, 2):
            lab.network(number)
        lab.set_port(OTHER, PEER_MAC, ifindex=self.other)

    # ---- one scenario ----

    def differs(self, given: Scenario) -> tuple[int, str] | None:
        """Where the switch and the reference differ first (a frame's number), and how; None: nowhere."""
        if self._play(given, closely=False) is None:
            return None
        return self._play(given, closely=True)

    def _play(self, given: Scenario, *, closely: bool) -> tuple[int, str] | None:
        """Drop reasons are counted: looking at them takes as long as all the rest. `closely`: after each frame."""
        self._set_up(given.setting)
        reference = Reference(given.setting)
        self._reasons: Counter[str] = Counter()
        for number, sent in enumerate(given.sent):
            if sent.policy >= 0:
                self._set_policy(sent.policy)
                reference.policy = sent.policy
                continue
            if sent.remap >= 0:
                difference = self._remaps(reference)
                if difference:
                    return number, difference
                self._set_remaps(given.setting, sent.remap)
                reference.remap(sent.remap)
                continue
            difference = self._one(reference, sent) if runs(sent.frame) else ""
            difference = difference or (self._drops() if closely else "")
            if difference:
                return number, difference
        difference = self._drops() or self._state(reference)
        return (len(given.sent), difference) if difference else None

    def _set_up(self, setting: Setting) -> None:
        switch = self.switch
        self._table.clear()
        for name in ("l2", "rule_hits", "trunks", "addresses"):
            switch.maps[name].clear()
        flags = (setting.antispoof * MODEL.PORT_F_ANTISPOOF) | (setting.learning * MODEL.PORT_F_LEARNING)
        flags |= bool(setting.trunk) * MODEL.PORT_F_TRUNK
        timeouts = (ctypes.c_uint32 * 16)()
        for name, value in TIMEOUTS_MS.items():
            timeouts[getattr(MODEL, name)] = value
        base = (time.monotonic_ns() - 3_600_000_000_000) % (1 << 64)
        port = {
            "ifindex": self.ifindex,
            "policy": SLOT,
            "timeouts": timeouts,
            "time_base": base,
            "hold_from": self.holds[FROM],
        }
        self.lab.set_port(SLOT, GUEST_MAC, flags=flags, learned_max=setting.learned_max, **port)
        for vid in setting.trunk:
            switch.put("trunks", MODEL.trunk_key(slot=SLOT, vid=vid), 2)
        for where, slot in ((GUEST_MAC, SLOT), (PEER_MAC, OTHER)):
            self.lab.place(where, MODEL.L2_PORT, slot, flags=MODEL.L2_F_LOCATION)
        named = {address("fe80::")} if address("fe80::1") in setting.addresses else set()  # as the driver says so
        for own in setting.addresses | named:
            switch.put("addresses", struct.pack("=I", SLOT) + own, 1)
        if setting.policies is not self._policies:
            self._policies = setting.policies
            self._compiled = [compile_rules(rules) for rules in setting.policies]
            self._generations: dict[int, int] = {}
        self._set_policy(0)
        self._set_remaps(setting, 0)
        self._before = self._counters()

    def _set_policy(self, number: int) -> None:
        if number not in self._generations:
            self._generations[number] = next(_generations)
            load_policy(self.switch, self._generations[number], self._compiled[number])
        self.switch.put("policies", SLOT, self._compiled[number].digest << 32 | self._generations[number])

    def _set_remaps(self, setting: Setting, number: int) -> None:
        records = RemapDocument.model_validate({"rules": setting.remaps[number]}).records()
        self._keys, values = elements(SLOT, records)
        table = self.switch.maps["remaps"]
        table.clear()
        for key, value in zip(self._keys, values, strict=True):
            table.update(key.tobytes(), value.tobytes())
        self.lab.change_port(SLOT, features=MODEL.FEATURE_REMAP if records else 0)

    def _counters(self) -> Any:
        """struct counters of the port as u64s, of all CPUs together."""
        raw = self.switch.maps["counters"].lookup(struct.pack("=I", SLOT)) or b""
        return np.frombuffer(raw, "<u8").reshape(-1, ctypes.sizeof(MODEL.counters) // 8).sum(axis=0)

    # ---- one frame ----

    def _one(self, reference: Reference, sent: Sent) -> str:
        """How they differ, "" if they do not."""
        way = reference.from_guest if sent.direction == FROM else reference.to_guest
        reason, expected = way(sent.frame, sent.gso_size)
        self._reasons[reason] += bool(reason)
        if reason == "reject":
            self.switch.put("reject_limits", SLOT, 0)
        if sent.held:
            difference = self._hold(sent)
            if difference:
                return difference
        program, ifindex = ("to_port", self.ifindex) if sent.direction == TO else ("from_port", self.ifindex)
        if sent.held and sent.direction == FROM:
            program, ifindex = "from_hold", self.holds[FROM]
        run = self.switch.run(program, sent.frame, ifindex, gso_size=sent.gso_size)
        passes = (OK,) if sent.direction != FROM else (SHOT, REDIRECT)  # flooded: copies go on, the frame ends
        if run.verdict not in ((SHOT,) if reason else passes):
            return f"verdict {run.verdict} for {reason or 'passed'}"
        if reason == "reject":
            difference = answers.wrong(reference.packet, expected, run.frame, sent.direction)
            told = sent.direction == TO and answers.answerable(reference.packet)
            return difference or (self._answered(reference, run.frame) if told else "")
        if (not reason or reason == "answered") and run.frame != expected:
            return f"goes on as {run.frame.hex()}, the reference says {expected.hex()}"
        return self._answered(reference, run.frame) if reason == "answered" else ""

    def _hold(self, sent: Sent) -> str:
        """What waits is as it came: from the guest while its port is quiesced, to the guest until it is passed on."""
        if sent.direction == TO:
            self.lab.change_port(SLOT, held_to=1)
            run = self.switch.run("from_hold", sent.frame, self.holds[TO])
        else:
            word = self.switch.get("ports", "port", SLOT).word
            self.lab.change_port(SLOT, word=word & ~0xFF | MODEL.PORT_QUIESCED)
            run = self.switch.run("from_port", sent.frame, self.ifindex)
            self.lab.change_port(SLOT, word=word)
        left = self.switch.get("ports", "port", SLOT)
        same = (run.verdict, run.frame, left.held_from, left.held_to) == (SHOT, sent.frame, 1 - sent.direction, 0)
        return "" if same else f"held as {run.verdict} {run.frame.hex()}, not {sent.frame.hex()}"

    def _answered(self, reference: Reference, answer: bytes) -> str:
        """What the switch says in the guest's stead comes in as the guest's."""
        reason, expected = reference.from_switch(answer)
        self._reasons[reason] += bool(reason)
        run = self.switch.run("from_port", answer, self.ifindex, mark=MODEL.SKB_MARK_JUDGED)
        if run.verdict not in ((SHOT,) if reason else (SHOT, REDIRECT)):
            return f"verdict {run.verdict} for {reason or 'passed'}, of an answer"
        if not reason and run.frame != expected:
            return f"answer goes on as {run.frame.hex()}, the reference says {expected.hex()}"
        return ""

    # ---- what is left of it ----

    def _drops(self) -> str:
        """The frames that were dropped so far, by reason."""
        self._counted = self._counters() - self._before
        here = {_NAMES[i]: int(n) for i, n in enumerate(self._counted[4 : 4 + MODEL.DROP_REASONS]) if n}
        there = {reason: count for reason, count in self._reasons.items() if count}
        return "" if here == there else f"drops differ: {_difference(here, there)}"

    def _state(self, reference: Reference) -> str:
        for what, here, there in (
            ("connections", self._connections(), _expected(reference)),
            ("hits", self._hits(), {n: (c, reference.hit_bytes[n]) for n, c in reference.hits.items()}),
            ("counters", [int(n) for n in self._counted[:4]], [*reference.passed, *reference.passed_bytes]),
            ("would_drop", int(self._counted[4 + MODEL.DROP_REASONS]), reference.would_drop),
            ("learned", int(self.switch.get("ports", "port", SLOT).learned), len(reference.learned)),
        ):
            if here != there:
                return f"{what} differ: {_difference(here, there)}"
        return self._remaps(reference)

    def _remaps(self, reference: Reference) -> str:
        """What the rules counted since they are there."""
        here, remapping = {}, reference.remapping
        for key in self._keys:
            entry = MODEL.remap_entry.from_buffer_copy(self.switch.maps["remaps"].lookup(key.tobytes()) or b"")
            if entry.flags & MODEL.REMAP_F_RULE and entry.packets:
                end = (key["addr"].tobytes(), int(key["proto"]), int(key["port"]))
                here[end] = (int(entry.packets), int(entry.bytes))
        there = {
            (end.address, rule.proto, end.port): (remapping.counted[of], remapping.counted_bytes[of])
            for number, rule in enumerate(remapping.rules)
            for of, end in (((number, FROM), rule.inside), ((number, TO), rule.outside))
            if remapping.counted[of]
        }
        return "" if here == there else f"remapped differ: {_difference(here, there)}"

    def _hits(self) -> dict[int, tuple[int, int]]:
        found = {}
        for key, value in self.switch.maps["rule_hits"].items():
            slot, rule = struct.unpack("=II", key)
            packets, size = np.frombuffer(value, "<u8").reshape(-1, 2).sum(axis=0)
            if slot == SLOT:
                found[rule] = (int(packets), int(size))
        return found

    def _connections(self) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for raw, value in self._table.items():
            key, entry = MODEL.ct_key.from_buffer_copy(raw), MODEL.ct_entry.from_buffer_copy(value)
            ends = (bytes(key.laddr), bytes(key.raddr))
            ports = socket.ntohs(key.lport), socket.ntohs(key.rport)
            state, flags = entry.word & 0xFF, entry.word >> 8 & 0xFF
            if key.type == MODEL.CT_TYPE_FRAGMENT:
                name = ("fragment", *ends, key.proto, ports[0] << 16 | ports[1], 1 - getattr(key, "from"))
                found[name] = (entry.mark >> 16, entry.mark & 0xFFFF)
            else:
                name = ("connection", *ends, *ports, key.proto)
                digests = {one.digest: number for number, one in enumerate(self._compiled)}
                words = (entry.mark, int.from_bytes(bytes(entry.label), "big"))
                found[name] = (state, flags, digests.get(entry.judged), list(entry.packets), list(entry.bytes), words)
        return found


def _expected(reference: Reference) -> dict[Any, Any]:
    return {key: entry.ports if key[0] == "fragment" else _entry(entry) for key, entry in reference.table.items()}


def _entry(entry: Entry) -> tuple[Any, ...]:
    return (entry.state, entry.flags, entry.judged, entry.packets, entry.bytes, entry.words)


def _difference(here: Any, there: Any) -> str:
    if not isinstance(here, dict):
        return f"{here}, the reference says {there}"
    key = next(key for key in {**here, **there} if here.get(key) != there.get(key))
    return f"{key}: {here.get(key)}, the reference says {there.get(key)}"


def runs(frame: bytes) -> bool:
    """BPF_PROG_RUN takes no IP packet without its header (but one behind a tag)."""
    return len(frame) >= 14 + {b"\x08\0": 20, b"\x86\xdd": 40}.get(frame[12:14], 1)


def shortest(beside: Beside, given: Scenario) -> tuple[Scenario, str]:
    """As few frames as still make them differ."""
    number, said = beside.differs(given) or (0, "")
    sent = list(given.sent[: number + 1])
    size = max(len(sent) // 2, 1)
    while size:
        start = 0
        while start < len(sent):
            shorter = sent[:start] + sent[start + size :]
            found = beside.differs(Scenario(given.setting, shorter))
            if found:
                sent, said = shorter, found[1]
            else:
                start += size
        size //= 2
    return Scenario(given.setting, sent), said
