/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Counters of ports and verdicts. A frame is counted once: as passed at the port it came from or went to, or under its
 * drop reason. Frames that belong to no port count at slot 0.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"
#include "event.h"
#include "maps.h"
#include "packet.h"
#include "parse.h"

static __always_inline __u32 port_flags(const struct port *port)
{
	return PORT_FLAGS(READ_ONCE(port->word));
}

static __always_inline void count_drop(__u32 slot, int reason)
{
	struct counters *count = bpf_map_lookup_elem(&counters, &slot);

	asm volatile("" : "+r"(reason)); /* or the compiler, which knows what is returned, leaves the bound out */
	if (count)
		count->drops[reason & (DROP_REASONS - 1)]++;
}

static __always_inline void count_held(__u32 slot, int direction)
{
	struct counters *count = bpf_map_lookup_elem(&counters, &slot);

	if (count)
		count->held[direction & 1]++;
}

/* Segments: the path between hosts may cut a GSO frame up, or join frames. One from a tap has gso_segs 0 (parse.h). */
static __noinline __u32 count_segments(struct __sk_buff *skb)
{
	struct packet pkt = {};

	if (skb->gso_segs || !skb->gso_size)
		return skb->gso_segs ?: 1;
	return parse(skb, &pkt, TO_GUEST) ? 1 : pkt.wire_packets;
}

static __always_inline void count_redirected(struct __sk_buff *skb, __u32 slot)
{
	struct counters *count = bpf_map_lookup_elem(&counters, &slot);

	if (count)
		count->redirected += count_segments(skb);
}

static __always_inline void count_came(struct __sk_buff *skb, __u32 slot)
{
	struct counters *count = bpf_map_lookup_elem(&counters, &slot);

	if (count)
		count->came += count_segments(skb);
}

/* The frame passed the port. */
static __always_inline void count_passed(struct __sk_buff *skb, struct port *port, const struct packet *pkt,
					 int direction)
{
	__u32 slot = port->slot;
	struct counters *count = bpf_map_lookup_elem(&counters, &slot);

	if (count) {
		count->packets[direction & 1] += pkt->wire_packets;
		count->bytes[direction & 1] += pkt->wire_frame_bytes;
	}
	if (port_flags(port) & PORT_F_TRACE)
		event_send(skb, slot, EVENT_WHAT(EVENT_TRACE, direction, DROP_NONE), 0);
}

/* The frame ends here, counted at the port. Returns the verdict. */
static __always_inline int drop_at(struct __sk_buff *skb, struct port *port, int direction, int reason)
{
	count_drop(port->slot, reason);
	if (port_flags(port) & PORT_F_TRACE)
		event_send(skb, port->slot, EVENT_WHAT(EVENT_TRACE, direction, reason), 0);
	return TC_ACT_SHOT;
}

/* As drop_at, where only the slot is at hand. Slot 0: the frame belongs to no port. */
__noinline int drop_slot(struct __sk_buff *skb, __u32 slot, int direction, int reason)
{
	struct port *port = bpf_map_lookup_elem(&ports, &slot);

	if (port && slot)
		return drop_at(skb, port, direction, reason);
	count_drop(0, reason);
	return TC_ACT_SHOT;
}
