/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ICMP errors carry the head of a packet of the guest, or for it, as the other side of the remapping knows it: that is
 * remapped by its own rule, and the error's own address with it.
 */
#pragma once

#include "checksum.h"
#include "related.h"
#include "remap_rewrite.h"
#include "spoof.h"

/* DHCP is spoken past any remapping: its messages name the inside address (RFC 2131). */
static __always_inline int remap_is_dhcp(const struct packet *pkt)
{
	return pkt->l3 == L3_IPV4 && pkt->proto == IPPROTO_UDP && pkt->lport == bpf_htons(DHCP_CLIENT) &&
	       pkt->rport == bpf_htons(DHCP_SERVER);
}

/* A checksum after what it covers has changed by `difference`. */
static __always_inline __u16 remap_adjusted(__u16 sum, __s64 difference)
{
	return ~checksum_fold((__u16)~sum + difference);
}

/* What 16 bits add to a sum when they change. */
static __always_inline __s64 remap_change(__u16 old, __u16 new)
{
	return (__s64)(__u16)~old + new;
}

/* Adjusts the checksum at `offset`, where there is one, and adds to `total` what that changes. */
static __always_inline void remap_carried_sum(struct __sk_buff *skb, __u32 offset, __s64 difference, int none_is_zero,
					      __s64 *total)
{
	__u16 old, new;

	if (bpf_skb_load_bytes(skb, offset, &old, sizeof(old)) || (none_is_zero && !old))
		return; /* only 8 bytes of the transport header must be there (RFC 792) */
	new = remap_adjusted(old, difference);
	if (none_is_zero && !new)
		new = 0xffff;
	if (!bpf_skb_store_bytes(skb, offset, &new, sizeof(new), 0))
		*total += remap_change(old, new);
}

/* The packet inside went the other way: its guest's end is where an error's is not. */
static __always_inline long remap_carried_end(struct __sk_buff *skb, struct packet *inner, __u32 side,
					      struct remap_end *to, __s64 *difference)
{
	__u32 at = remap_address_at(inner, !side), ports = inner->l4_offset + (side == REMAP_OUT ? 2 : 0);
	long failed;

	*difference = bpf_csum_diff(inner->laddr, sizeof(inner->laddr), to->addr, sizeof(to->addr), 0);
	if (inner->l3 == L3_IPV4)
		failed = bpf_skb_store_bytes(skb, at, &to->addr[3], sizeof(__be32), 0);
	else
		failed = bpf_skb_store_bytes(skb, at, to->addr, sizeof(to->addr), 0);
	if (!failed && to->port != inner->lport)
		failed = bpf_skb_store_bytes(skb, ports, &to->port, sizeof(to->port), 0);
	return failed;
}

/* The packet inside the error, and the error's checksum over it. Returns enum drop_reason. */
static __noinline int remap_carried(struct __sk_buff *skb, const struct packet *pkt, struct packet *inner, __u32 side,
				    struct remap_end *to)
{
	__u32 check = remap_checksum_at(inner), outer = pkt->l4_offset + 2;
	__s64 difference, ports = remap_change(inner->lport, to->port), total;

	if (remap_carried_end(skb, inner, side, to, &difference))
		return DROP_REMAP;
	total = difference + ports;
	if (inner->l3 == L3_IPV4)
		remap_carried_sum(skb, inner->l3_offset + offsetof(struct iphdr, check), difference, 0, &total);
	if (check && inner->l4_offset + check + sizeof(__u16) <= packet_end(pkt))
		remap_carried_sum(skb, inner->l4_offset + check, difference + ports, remap_none_is_zero(inner), &total);
	return bpf_l4_csum_replace(skb, outer, 0, checksum_fold(total), 0) ? DROP_REMAP : DROP_NONE;
}

/* An ICMP error. `side`: which way it goes. Returns enum drop_reason. */
static __noinline int remap_error(struct __sk_buff *skb, struct port *port, struct packet *pkt, __u32 side)
{
	struct packet inner = {};
	struct remap_end to = {};
	int reason;

	if (related_parse(skb, pkt, &inner, side == REMAP_IN ? TO_GUEST : FROM_GUEST))
		return DROP_REMAP;
	inner.wire_packets = pkt->wire_packets;
	inner.wire_bytes = pkt->wire_bytes;
	reason = remap_is_dhcp(&inner) ? DROP_NONE : remap_rule(port->slot, &inner, side, &to);
	if (!reason && to.ruled)
		reason = remap_carried(skb, pkt, &inner, side, &to);
	/* a guest that forwards tells from another address of its own */
	if (!reason && !addr_equal(pkt->laddr, inner.laddr))
		reason = remap_rule(port->slot, pkt, side, &to);
	if (reason || !to.ruled)
		return reason;
	to.port = pkt->lport;
	return remap_rewrite(skb, pkt, side, &to);
}
