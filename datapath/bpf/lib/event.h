/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Records to user space through the ring buffer. A full ring loses the record and nothing else: what must be exact is a
 * counter, never an event.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"

/* type, direction and reason in one argument: what may be told about one frame */
#define EVENT_WHAT(type, direction, reason) ((__u32)(type) | (__u32)(direction) << 8 | (__u32)(reason) << 16)

/* Sends an event with the first bytes of the frame. `slot` 0 when it concerns no port; `rule` is acl_rule.id or 0. */
__noinline int event_send(struct __sk_buff *skb, __u32 slot, __u32 what, __u32 rule)
{
	struct port *port = bpf_map_lookup_elem(&ports, &slot);
	__u32 captured = skb->len;
	struct event *event;

	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return 0;
	event->time = bpf_ktime_get_ns();
	event->slot = slot;
	event->epoch = port ? PORT_EPOCH(port->word) : 0;
	event->ifindex = skb->ifindex;
	event->length = skb->len;
	event->rule = rule;
	event->type = what;
	event->direction = what >> 8;
	event->reason = what >> 16;
	__builtin_memset(event->data, 0, sizeof(event->data));
	if (captured > EVENT_BYTES)
		captured = EVENT_BYTES;
	if (captured < ETH_HLEN || bpf_skb_load_bytes(skb, 0, event->data, captured))
		captured = 0;
	event->captured = captured;
	bpf_ringbuf_submit(event, 0);
	return 0;
}
