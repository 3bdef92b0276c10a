/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Copies that find the guest of their port between two hosts: they wait with the frames that are for it, in the same
 * tap and the same order, in a tag that no such frame has. Given back, they go as what the source has judged.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "count.h"
#include "gate.h"
#include "tunnel.h"
#include "vlan.h"

#define MIRROR_FAILED -1 /* what sends returns this, an errno or a code of the device; or 0 or TC_ACT_REDIRECT */
#define MIRROR_WAITS  -2 /* without PATH_CLONE: a copy of it waits, so the caller's ends */

static __always_inline int mirror_done(int result, __u32 path)
{
	return sent(result, path) || result == MIRROR_WAITS;
}

/* True when what has waited is a copy; the tag is gone then. */
static __always_inline int copy_take(struct __sk_buff *skb)
{
	return vlan_is_copy(skb) && !bpf_skb_vlan_pop(skb);
}

/*
 * Has a copy for the port to wait, as a frame for it would (deliver())? `passed`: sent on by the host that the guest
 * left: that comes before what waits here for it.
 */
static __always_inline int copy_waits(struct port *port, __u64 gate, __u32 passed)
{
	if (GATE_TARGET(gate) == GATE_NONE || (!GATE_SHUT(gate) && !READ_ONCE(port->held_to)))
		return 0;
	if (GATE_SHUT(gate) && lease_passed(port))
		return 0;
	return !passed || !(port_flags(port) & PORT_F_AWAITS_SOURCE);
}

/* Puts a copy of the copy into the hold tap; the frame is as it was. Returns enum drop_reason. */
static __always_inline int copy_hold(struct __sk_buff *skb, struct port *port)
{
	int reason;

	if (bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021AD), VLAN_COPY))
		return DROP_MIRROR;
	reason = hold(skb, &port->held_to, port->hold_to);
	bpf_skb_vlan_pop(skb);
	if (!reason)
		count_held(port->slot, TO_GUEST);
	return reason;
}
