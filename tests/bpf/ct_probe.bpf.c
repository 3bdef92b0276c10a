// SPDX-License-Identifier: GPL-2.0-only
/* parse() and judge() alone: the slot comes in skb->mark, the verdict is enum drop_reason. */
#include <linux/bpf.h>

#include "control.bpf.c"
#include "flows.bpf.c"
#include "lib/judge.h"
#include "race.h"
#include "window.bpf.c"

static __always_inline int probe(struct __sk_buff *skb, int direction)
{
	struct packet pkt = {};
	__u32 slot = skb->mark;
	struct port *port = bpf_map_lookup_elem(&ports, &slot);
	int reason;

	if (!port || PORT_STATE(port->word) != PORT_ACTIVE)
		return DROP_NOT_ACTIVE;
	reason = parse(skb, &pkt, direction);
	return reason ?: judge(skb, port, &pkt, direction);
}

SEC("tc")
int probe_from(struct __sk_buff *skb)
{
	return probe(skb, FROM_GUEST);
}

SEC("tc")
int probe_to(struct __sk_buff *skb)
{
	return probe(skb, TO_GUEST);
}

char _license[] SEC("license") = "GPL";
