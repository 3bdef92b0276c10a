// SPDX-License-Identifier: GPL-2.0-only
/* A small object on the switch's maps: what the loader's and attachments' tests load. VERSION tells two builds apart.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "lib/types.h"
#include "lib/maps.h"

#ifndef VERSION
#define VERSION 1
#endif

/* Counts a frame for its version in `counters` of slot 0, and sends it to where `devices` says. */
static int pass(struct __sk_buff *skb)
{
	__u32 zero = 0, ifindex = skb->ifindex;
	struct counters *own = bpf_map_lookup_elem(&counters, &zero);
	struct device *device = bpf_map_lookup_elem(&devices, &ifindex);

	if (own)
		own->drops[VERSION]++;
	return device ? bpf_redirect(device->slot, 0) : TC_ACT_OK;
}

SEC("tc") int from_port(struct __sk_buff *skb)
{
	return pass(skb);
}

SEC("tc") int to_port(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct counters *own = bpf_map_lookup_elem(&counters, &zero);

	if (own)
		own->packets[1]++;
	return skb->mark == 7 ? TC_ACT_SHOT : TC_ACT_OK;
}

/* Reports the ring: `length` events of slot `slot`. */
SEC("syscall") int port_cas(struct port_swap *context)
{
	__u32 slot = context->slot;
	struct port *port = bpf_map_lookup_elem(&ports, &slot);

	context->found = port ? port->word : 0;
	return 0;
}

SEC("syscall") int report(struct event *context)
{
	for (int i = 0; i < 64; i++) {
		struct event *event;

		if (i >= context->length)
			break;
		event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
		if (!event)
			return -1;
		__builtin_memset(event, 0, sizeof(*event));
		event->time = bpf_ktime_get_ns();
		event->slot = context->slot;
		event->length = context->rule + i;
		event->type = EVENT_TRACE;
		event->captured = 2;
		event->data[0] = i;
		if (i % 8 == 7)
			bpf_ringbuf_discard(event, 0);
		else
			bpf_ringbuf_submit(event, 0);
	}
	return context->length;
}

#ifdef REFUSED
SEC("tc") int refused(struct __sk_buff *skb)
{
	return *(__u32 *)(long)skb->data;
}
#endif

char _license[] SEC("license") = "GPL";
