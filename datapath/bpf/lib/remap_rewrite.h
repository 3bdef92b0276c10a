/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * One end of a packet becomes another: address, port and every checksum over them, whether it is in the frame
 * (CHECKSUM_NONE), left to the device (CHECKSUM_PARTIAL, GSO) or taken over the whole frame (CHECKSUM_COMPLETE).
 *
 * The last is a sum of all bytes, kept by BPF_F_RECOMPUTE_CSUM. It is asked for where what is written is not balanced
 * by a checksum of its own: an IPv6 address, since the helper for its pseudo-header takes the checksum's change into
 * account, and a port of UDP without checksum.
 */
#pragma once

#include <linux/ip.h>
#include <linux/ipv6.h>

#include "remap_rule.h"

/* A checksum of zero says that there is none: one that comes to it is written as all ones. RFC 768, RFC 3828 */
static __always_inline int remap_none_is_zero(const struct packet *pkt)
{
	return pkt->proto == IPPROTO_UDP || pkt->proto == IPPROTO_UDPLITE;
}

/* Where in the frame the guest's address is. `side`: which way the frame goes. */
static __always_inline __u32 remap_address_at(const struct packet *pkt, __u32 side)
{
	if (pkt->l3 == L3_IPV4)
		return pkt->l3_offset +
		       (side == REMAP_OUT ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
	return pkt->l3_offset + (side == REMAP_OUT ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
}

static __always_inline long remap_ipv4(struct __sk_buff *skb, const struct packet *pkt, __u32 side, __u32 check,
				       const struct remap_end *to)
{
	__u64 flags = sizeof(__be32) | BPF_F_PSEUDO_HDR | (remap_none_is_zero(pkt) ? BPF_F_MARK_MANGLED_0 : 0);
	__be32 old = pkt->laddr[3], new = to->addr[3];
	long failed = bpf_l3_csum_replace(skb, pkt->l3_offset + offsetof(struct iphdr, check), old, new, sizeof(new));

	if (!failed && check)
		failed = bpf_l4_csum_replace(skb, check, old, new, flags);
	return failed ?: bpf_skb_store_bytes(skb, remap_address_at(pkt, side), &new, sizeof(new), 0);
}

static __always_inline long remap_ipv6(struct __sk_buff *skb, struct packet *pkt, __u32 side, __u32 check,
				       struct remap_end *to)
{
	__u64 flags = BPF_F_PSEUDO_HDR | (remap_none_is_zero(pkt) ? BPF_F_MARK_MANGLED_0 : 0);
	__s64 difference = bpf_csum_diff(pkt->laddr, sizeof(pkt->laddr), to->addr, sizeof(to->addr), 0);
	long failed = check ? bpf_l4_csum_replace(skb, check, 0, difference, flags) : 0;

	return failed
		   ?: bpf_skb_store_bytes(skb, remap_address_at(pkt, side), to->addr, sizeof(to->addr),
					  BPF_F_RECOMPUTE_CSUM);
}

static __always_inline long remap_ports(struct __sk_buff *skb, const struct packet *pkt, __u32 side, __u32 check,
					const struct remap_end *to)
{
	__u64 flags = sizeof(__be16) | (remap_none_is_zero(pkt) ? BPF_F_MARK_MANGLED_0 : 0), store = 0;
	__u32 offset = pkt->l4_offset + (side == REMAP_OUT ? 0 : sizeof(__be16));
	__be16 sum = 0;
	long failed = bpf_skb_load_bytes(skb, check, &sum, sizeof(sum));

	if (!sum)
		store = BPF_F_RECOMPUTE_CSUM;
	failed = failed ?: bpf_l4_csum_replace(skb, check, pkt->lport, to->port, flags);
	return failed ?: bpf_skb_store_bytes(skb, offset, &to->port, sizeof(to->port), store);
}

/*
 * The guest's end of the packet becomes `to`, in the frame; on the way in also in `pkt`. Returns enum drop_reason:
 * DROP_REMAP when the frame is too short for what it claims to be.
 */
static __noinline int remap_rewrite(struct __sk_buff *skb, struct packet *pkt, __u32 side, struct remap_end *to)
{
	__u32 check = pkt->fragment == FRAGMENT_LATER ? 0 : remap_checksum_at(pkt);
	long failed;

	if (check)
		check += pkt->l4_offset;
	if (pkt->l3 == L3_IPV4)
		failed = remap_ipv4(skb, pkt, side, check, to);
	else
		failed = remap_ipv6(skb, pkt, side, check, to);
	if (!failed && check && to->port != pkt->lport)
		failed = remap_ports(skb, pkt, side, check, to);
	if (failed)
		return DROP_REMAP;
	if (side == REMAP_IN) {
		addr_copy(pkt->laddr, to->addr);
		pkt->lport = to->port;
	}
	return DROP_NONE;
}
