/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Whether a frame may pass a port: the one entry point of connections, policy and fragments.
 *
 * Without a connection:
 *  - What is not IP passes; anti-spoofing is the caller's.
 *  - Frames to a group MAC have many receivers and no reply to their sender's port: each is judged by the policy alone.
 *  - Neighbour discovery and multicast listener messages of this link pass, as ARP does; but a guest is no router.
 *  - DHCP answers to the guest pass: they come from a server to an address that asked by broadcast.
 */
#pragma once

#include "clock.h"
#include "frag.h"
#include "parse.h"
#include "reject.h"
#include "related.h"

/* What no router passes on, so that nobody beyond this link speaks past the policy: by the hop limit (RFC 4861, 7.1);
 * listener messages, which anybody can let arrive with 1, by the sender's address (RFC 2710, 3, RFC 3590, RFC 3810, 5).
 */
static __always_inline int judge_is_discovery(const struct packet *pkt, int direction)
{
	const __be32 *sender = direction == FROM_GUEST ? pkt->laddr : pkt->raddr;
	__u8 type = pkt->icmp_type;

	if (pkt->proto != IPPROTO_ICMPV6)
		return 0;
	if ((type >= 130 && type <= 132) || type == 143)
		return pkt->hops == 1 && (addr_is_link_local(sender) || addr_is_zero(sender));
	if (type == 134 || type == 137) /* router advertisement, redirect */
		return direction == TO_GUEST && pkt->hops == 255;
	return type >= 133 && type <= 136 && pkt->hops == 255;
}

/* RFC 2131, RFC 8415 */
static __always_inline int judge_is_dhcp_answer(const struct packet *pkt, int direction)
{
	if (pkt->proto != IPPROTO_UDP || direction != TO_GUEST)
		return 0;
	if (pkt->l3 == L3_IPV4)
		return pkt->rport == bpf_htons(67) && pkt->lport == bpf_htons(68);
	return pkt->rport == bpf_htons(547) && pkt->lport == bpf_htons(546);
}

static __always_inline int judge_is_stateless(const struct packet *pkt)
{
	if (pkt->group)
		return 1;
	return (pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6) &&
	       !icmp_query_kind(pkt->proto, pkt->icmp_type);
}

static __always_inline int judge_packet(struct tracking *t)
{
	struct packet *pkt = t->pkt;
	int reason;

	if (pkt->fragment == FRAGMENT_LATER)
		return fragment_follow(t);
	if (packet_is_icmp_error(pkt))
		return related(t);
	if (judge_is_discovery(pkt, t->direction) || judge_is_dhcp_answer(pkt, t->direction))
		return DROP_NONE;
	if (!judge_is_stateless(pkt))
		return track(t);
	reason = track_judge(t, t->direction);
	return reason == ACL_LABELLED ? DROP_NONE : reason; /* there is nothing that could be given something */
}

/*
 * Judges the frame that parse() described and keeps the connection table. The caller has seen that the port is ACTIVE
 * (nothing may be written otherwise) and not STATELESS. `direction` is FROM_GUEST or TO_GUEST.
 * Returns enum drop_reason: DROP_NONE to pass, DROP_REJECT after an answer was sent to the sender. Packet pointers are
 * void afterwards. Global, so that it is verified once.
 */
__noinline int judge(struct __sk_buff *skb, struct port *port, struct packet *pkt, int direction)
{
	struct tracking t = {.skb = skb, .port = port, .pkt = pkt};
	__u64 *policy;
	__u32 index;
	int reason;

	if (!port || !pkt)
		return DROP_MALFORMED;
	if (pkt->l3 != L3_IPV4 && pkt->l3 != L3_IPV6)
		return DROP_NONE;
	t.slot = port->slot;
	t.direction = direction & 1;
	t.flags = PORT_FLAGS(READ_ONCE(port->word));
	t.now = ct_time(port, clock_coarse());
	t.table = bpf_map_lookup_elem(&conntracks, &t.slot);
	if (!t.table)
		return DROP_NOT_ACTIVE;
	index = port->policy;
	policy = index ? bpf_map_lookup_elem(&policies, &index) : NULL;
	t.policy = policy ? READ_ONCE(*policy) : 0;
	ct_key_of(&t.key, pkt);
	reason = judge_packet(&t);
	if (reason == DROP_NONE && pkt->fragment == FRAGMENT_FIRST)
		fragment_record(&t);
	if (reason == DROP_REJECT)
		reject(skb, port, pkt, direction);
	return reason;
}
