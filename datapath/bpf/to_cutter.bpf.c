// SPDX-License-Identifier: GPL-2.0-only
/*
 * Egress of the cutter: a device that nothing ever leaves by. A copy that is shorter than its frame comes here, is cut,
 * and goes on to its mirror's output. Its mark says which mirror.
 */
#include "lib/mirror.h"

#define CUT_TRIES 4

/*
 * No frame can be cut before a checksum field that a device is yet to fill in (net/core/filter.c): where tunnels of the
 * guest's put it that far back, twice as much is left, and so on; in the end the whole frame.
 */
static __always_inline void cut(struct __sk_buff *skb, __u32 size)
{
	if (skb->vlan_present)
		size -= 4; /* the tag is not in the data */
	for (int i = 0; i < CUT_TRIES && size < skb->len; i++, size *= 2)
		if (!bpf_skb_change_tail(skb, size, 0))
			return;
}

SEC("tc")
int to_cutter(struct __sk_buff *skb)
{
	__u32 key = skb->mark - SKB_MARK_COPY;
	struct mirror *mirror = bpf_map_lookup_elem(&mirrors, &key);

	if (!mirror)
		return TC_ACT_SHOT; /* it was taken away a moment ago, or the frame is the host's own */
	cut(skb, mirror->snap);
	return mirror_send(skb, key, 0) == TC_ACT_REDIRECT ? TC_ACT_REDIRECT : TC_ACT_SHOT;
}
