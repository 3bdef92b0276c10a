/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ACL_REJECT: the frame becomes the answer to its sender (answer.h) and a clone of it goes back: into the guest past
 * to_port, or, for a sender elsewhere, in at the guest's device, from where the switch forwards it as the guest's own.
 * Both are marked as judged.
 */
#pragma once

#include "answer.h"
#include "limit.h"
#include "maps.h"
#include "mark.h"
#include "vlan.h"

#define REJECT_INTERVAL_NS 1000000  /* an answer a millisecond, */
#define REJECT_BURST_NS    64000000 /* 64 at once: RFC 1812, 4.3.2.8 and RFC 4443, 2.4 ask for a limit */
#define REJECT_BUCKETS     1024

struct { /* when the next answer of a port is due; slots that share a bucket share the limit */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, REJECT_BUCKETS);
	__type(key, __u32);
	__type(value, __u64);
} reject_limits SEC(".maps");

static __always_inline int reject_within_limit(__u32 slot)
{
	__u32 bucket = slot % REJECT_BUCKETS;
	__u64 *due = bpf_map_lookup_elem(&reject_limits, &bucket);

	if (!due)
		return 0;
	return limit_take(due, REJECT_INTERVAL_NS, REJECT_BURST_NS);
}

/* An address that is one station's: RFC 1122, 3.2.2; RFC 4443, 2.4. */
static __always_inline int reject_is_station(const struct packet *pkt, const __be32 addr[4])
{
	__u8 first = *(const __u8 *)(pkt->l3 == L3_IPV6 ? &addr[0] : &addr[3]);

	if (pkt->l3 == L3_IPV6)
		return first != 0xff && !addr_is_zero(addr);
	return first && first != 127 && first < 224;
}

/* Only what has one sender that understands, and one receiver whose answer it could be: no group, no error about an
 * error, no reset of a reset, no options or extension headers in between. */
static __always_inline int reject_is_answerable(const struct packet *pkt)
{
	__u32 header = pkt->l3 == L3_IPV6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);

	if (pkt->group || pkt->fragment == FRAGMENT_LATER || packet_is_icmp_error(pkt))
		return 0;
	if (pkt->proto == IPPROTO_TCP && pkt->tcp_flags & TCP_RST)
		return 0;
	return pkt->l4_offset - pkt->l3_offset == header && reject_is_station(pkt, pkt->laddr) &&
	       reject_is_station(pkt, pkt->raddr);
}

static __always_inline int reject_swap_macs(struct __sk_buff *skb)
{
	__u8 macs[2 * ETH_ALEN];

	return bpf_skb_load_bytes(skb, 0, macs, sizeof(macs)) ||
	       bpf_skb_store_bytes(skb, 0, macs + ETH_ALEN, ETH_ALEN, 0) ||
	       bpf_skb_store_bytes(skb, ETH_ALEN, macs, ETH_ALEN, 0);
}

/*
 * Answers the sender of a frame that the policy rejects; best effort, within a limit per port. The frame is the answer
 * afterwards, or neither: the caller drops it. Returns 0. Global, so that it is verified once.
 */
__noinline int reject(struct __sk_buff *skb, struct port *port, struct packet *pkt, int direction)
{
	int failed;

	if (!port || !pkt || !port->ifindex)
		return 0;
	if (!reject_is_answerable(pkt) || !reject_within_limit(port->slot))
		return 0;
	failed = pkt->proto == IPPROTO_TCP ? answer_reset(skb, pkt, direction) : answer_error(skb, pkt, direction);
	if (failed || reject_swap_macs(skb))
		return 0;
	if (direction == FROM_GUEST && vlan_add(skb, pkt->vlan))
		return 0;
	mark_set(skb, SKB_MARK_JUDGED);
	bpf_clone_redirect(skb, port->ifindex, direction == FROM_GUEST ? 0 : BPF_F_INGRESS);
	mark_set(skb, 0);
	return 0;
}
