/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ICMP errors carry the head of the packet that caused them, which went the other way: they pass when that packet
 * belongs to a live connection and was sent by whom the error is for.
 */
#pragma once

#include "ip.h"
#include "track.h"

#define ICMP_ERROR_HEADER 8

/* Transport of the packet inside an ICMP error, before `end`: of it only 8 bytes must be there (RFC 792). */
static __always_inline int related_transport(struct __sk_buff *skb, struct packet *inner, int direction, __u32 end)
{
	__u8 head[8];
	__be16 *ports = (__be16 *)head;

	if (inner->l4_offset > end)
		return -1;
	if (inner->proto != IPPROTO_TCP && inner->proto != IPPROTO_UDP && inner->proto != IPPROTO_ICMP &&
	    inner->proto != IPPROTO_ICMPV6)
		return 0;
	if (inner->l4_offset + sizeof(head) > end || bpf_skb_load_bytes(skb, inner->l4_offset, head, sizeof(head)))
		return -1;
	if (inner->proto == IPPROTO_TCP || inner->proto == IPPROTO_UDP) {
		inner->lport = direction == FROM_GUEST ? ports[0] : ports[1];
		inner->rport = direction == FROM_GUEST ? ports[1] : ports[0];
		return 0;
	}
	inner->icmp_type = head[0];
	packet_set_query(inner, direction, ports[2]);
	return 0;
}

/* Fills `inner`, the packet inside the ICMP error `pkt`. `direction`: of the error. Global, verified once. */
__noinline int related_parse(struct __sk_buff *skb, struct packet *pkt, struct packet *inner, int direction)
{
	int sent = direction == FROM_GUEST ? TO_GUEST : FROM_GUEST;

	if (!pkt || !inner)
		return DROP_MALFORMED;
	inner->l3 = pkt->l3;
	inner->l3_offset = pkt->l4_offset + ICMP_ERROR_HEADER;
	if (!(pkt->l3 == L3_IPV4 ? parse_ipv4(skb, inner, sent) : parse_ipv6(skb, inner, sent)))
		return DROP_CT_INVALID;
	if (inner->fragment == FRAGMENT_LATER || related_transport(skb, inner, sent, packet_end(pkt)))
		return DROP_CT_INVALID;
	if (direction == TO_GUEST ? !addr_equal(inner->laddr, pkt->laddr) : !addr_equal(inner->raddr, pkt->raddr))
		return DROP_CT_INVALID;
	return DROP_NONE;
}

/* Returns enum drop_reason. The connection's state, counters and time stay as they are. */
static __noinline int related(struct tracking *t)
{
	struct packet inner = {};
	struct ct_entry *entry;

	if (related_parse(t->skb, t->pkt, &inner, t->direction))
		return DROP_CT_INVALID;
	if ((inner.proto == IPPROTO_ICMP || inner.proto == IPPROTO_ICMPV6) &&
	    !icmp_query_kind(inner.proto, inner.icmp_type))
		return DROP_CT_INVALID;
	ct_key_of(&t->key, &inner);
	entry = bpf_map_lookup_elem(t->table, &t->key);
	return entry && ct_is_live(READ_ONCE(entry->word)) ? DROP_NONE : DROP_CT_INVALID;
}
