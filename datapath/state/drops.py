"""Why a frame was dropped: number, name and one sentence for people.

Numbers are those of `enum drop_reason` in datapath/bpf/lib/types.h: for ever, never reused.
"""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """One drop reason."""

    number: int
    name: str
    sentence: str


REASONS: dict[int, Reason] = {
    number: Reason(number, name, sentence)
    for number, name, sentence in (
        (0, "none", "The frame passed."),
        (1, "malformed", "The frame is truncated, or its headers contradict each other."),
        (2, "no-port", "The device belongs to no port of this switch."),
        (3, "not-active", "The port is staged, quiesced or a stub: its guest does not run here."),
        (4, "spoof-mac", "The source MAC is not one of the port's."),
        (5, "spoof-address", "The source address is not one of the port's."),
        (6, "spoof-arp", "An ARP frame claims a MAC or an address that is not the port's."),
        (7, "spoof-nd", "An IPv6 neighbour advertisement or solicitation claims what is not the port's."),
        (8, "policy", "No rule of the port's policy allows it."),
        (9, "reject", "A rule of the port's policy rejects it; the sender was told."),
        (10, "ct-invalid", "It belongs to no connection, and cannot begin one."),
        (11, "ct-full", "The port's connection table is full and nothing could be evicted."),
        (12, "ct-race", "Its connection was being deleted at that instant; the sender repeats."),
        (13, "fragment", "A later fragment of a datagram whose first fragment was not seen."),
        (14, "no-network", "The tag or tunnel id belongs to no network of this host."),
        (15, "no-place", "Frames for the port have no place to go: it was never opened."),
        (16, "lease", "The agent's lease on a staged, held or redirecting port ran out."),
        (17, "hold-full", "The hold tap was full."),
        (18, "no-hold", "The frame had to be held and the port has no hold tap."),
        (19, "channel", "A redirected frame on an unknown channel, from another host, or for another epoch."),
        (20, "hops", "The frame was redirected too many times."),
        (21, "tunnel-peer", "A tunnelled frame from an address that is no host of this cluster."),
        (22, "tunnel", "The frame could not be sent into the tunnel."),
        (23, "vlan", "The tag is not one that the port may use."),
        (24, "learn-limit", "The source MAC would exceed what may be learned behind the port."),
        (25, "loop", "The frame would leave where it came in."),
        (26, "mtu", "The frame is larger than the network or the path carries."),
        (27, "broadcast-path", "A broadcast that reaches the guest by the other path while the VM moves."),
        (28, "unknown-unicast", "No place is known for the destination and the network does not flood."),
        (
            29,
            "not-ours",
            "The host or its bridge put the frame into the port's device; the switch brings its own copy.",
        ),
        (30, "policed", "It exceeds the rate that the port may send or receive."),
        (31, "remap", "The network knows the guest by another address, or what it answers would come from another."),
        (32, "window", "A TCP segment outside of its connection's window."),
        (33, "shape", "The queue of the port's shaper is full."),
        (34, "mirror", "A copy of a mirror that came from another host found no port to take it."),
        (36, "answered", "It asked for a remapped address of the port, and the switch has answered."),
        (35, "label", "Its connection's label could not be kept."),
    )
}

NAMES: dict[str, Reason] = {reason.name: reason for reason in REASONS.values()}


def name(number: int) -> str:
    """Name of a reason; `reason-N` for one of a newer switch."""
    reason = REASONS.get(number)
    return reason.name if reason else f"reason-{number}"
