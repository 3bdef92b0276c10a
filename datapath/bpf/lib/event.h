/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Records to user space through the ring buffer. A full ring loses the record and nothing else: what must be exact is a
 * counter, never an event. What a guest or a peer can have told as often as it likes has a limit, so that it neither
 * keeps the agent busy nor takes the place of what others have to tell.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>

#include "limit.h"
#include "maps.h"

/* type, direction and reason in one argument: what may be told about one frame */
#define EVENT_WHAT(type, direction, reason) ((__u32)(type) | (__u32)(direction) << 8 | (__u32)(reason) << 16)

struct event_limit { /* when the next one is due */
	__u64 log;
	__u64 trace; /* and probes */
};

#define LOG_INTERVAL_NS   100000000ULL /* ten a second of a port, 64 at once */
#define LOG_BURST_NS      6300000000ULL
#define LOGS_INTERVAL_NS  5000000ULL /* 200 a second of all ports, 512 at once */
#define LOGS_BURST_NS     2555000000ULL
#define TRACE_INTERVAL_NS 500000ULL /* 2,000 a second of a port, 2,048 at once: more than anybody reads */
#define TRACE_BURST_NS    1023500000ULL
#define EVENT_BUCKETS     1024

struct { /* 0: all ports together; ports that share a bucket share its limit */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EVENT_BUCKETS + 1);
	__type(key, __u32);
	__type(value, struct event_limit);
} event_limits SEC(".maps");

static __always_inline int event_within_limit(__u32 slot, __u8 type)
{
	__u32 bucket = 1 + slot % EVENT_BUCKETS, zero = 0;
	struct event_limit *own = bpf_map_lookup_elem(&event_limits, &bucket);
	struct event_limit *all = bpf_map_lookup_elem(&event_limits, &zero);

	if (!own || !all)
		return 0;
	if (type == EVENT_LOG)
		return limit_take(&own->log, LOG_INTERVAL_NS, LOG_BURST_NS) &&
		       limit_take(&all->log, LOGS_INTERVAL_NS, LOGS_BURST_NS);
	if (type == EVENT_TRACE || type == EVENT_PROBE)
		return limit_take(&own->trace, TRACE_INTERVAL_NS, TRACE_BURST_NS);
	return 1;
}

/* Sends an event with the first bytes of the frame. `slot` 0 when it concerns no port; `rule` is acl_rule.id or 0. */
__noinline int event_send(struct __sk_buff *skb, __u32 slot, __u32 what, __u32 rule)
{
	struct port *port = bpf_map_lookup_elem(&ports, &slot);
	__u32 captured = skb->len;
	struct event *event;

	if (!event_within_limit(slot, what))
		return 0;
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
