/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Remapping (RFC 3022's basic NAT, per port and without state): the network knows the guest by an outside address, the
 * guest itself has an inside one. It is the outermost thing at a port: connections, policy and anti-spoofing, samples
 * and mirrors see the inside address in both directions. The outside addresses' ARP and neighbour discovery are
 * answered here in the guest's stead.
 *
 * A rule is two elements of `remaps`, one for each direction. An address of which only some ports have rules has an
 * element as well, without REMAP_F_RULE.
 */
#pragma once

#include "remap_answer.h"
#include "remap_error.h"

static __noinline int remap_packet(struct __sk_buff *skb, struct port *port, struct packet *pkt, __u32 side)
{
	struct remap_end to = {};
	int reason;

	if (remap_is_dhcp(pkt))
		return DROP_NONE;
	reason = remap_rule(port->slot, pkt, side, &to);
	if (!reason && to.ruled)
		reason = remap_rewrite(skb, pkt, side, &to);
	return reason;
}

/*
 * A frame for the guest, as parse() described it: outside -> inside, in the frame and in `pkt`. Packet pointers are
 * void afterwards. Returns enum drop_reason: DROP_ANSWERED when the frame was a question that the switch has answered,
 * DROP_REMAP for what cannot reach the guest under that address. Global, so that it is verified once.
 */
__noinline int remap_to_guest(struct __sk_buff *skb, struct port *port, struct packet *pkt)
{
	int reason;

	if (!port || !pkt)
		return DROP_MALFORMED;
	if (pkt->l3 == L3_ARP)
		return remap_arp_to_guest(skb, port, pkt);
	if (pkt->l3 != L3_IPV4 && pkt->l3 != L3_IPV6)
		return DROP_NONE;
	if (packet_is_icmp_error(pkt))
		return remap_error(skb, port, pkt, REMAP_IN);
	reason = remap_is_solicitation(pkt) ? remap_solicitation(skb, port, pkt) : DROP_NONE;
	return reason ?: remap_packet(skb, port, pkt, REMAP_IN);
}

/* A frame from the guest: inside -> outside, in the frame only. Returns enum drop_reason. */
__noinline int remap_from_guest(struct __sk_buff *skb, struct port *port, struct packet *pkt)
{
	int reason;

	if (!port || !pkt)
		return DROP_MALFORMED;
	if (pkt->l3 == L3_ARP)
		return remap_arp_from_guest(skb, port, pkt);
	if (pkt->l3 != L3_IPV4 && pkt->l3 != L3_IPV6)
		return DROP_NONE;
	if (packet_is_icmp_error(pkt))
		return remap_error(skb, port, pkt, REMAP_OUT);
	reason = remap_is_discovery(pkt) ? remap_discovery(skb, port, pkt) : DROP_NONE;
	return reason ?: remap_packet(skb, port, pkt, REMAP_OUT);
}

/* What the switch itself says for the guest: a reject, or the answer for an outside address, which is no inside one. */
__noinline int remap_answer(struct __sk_buff *skb, struct port *port)
{
	struct packet pkt = {};
	int reason = parse(skb, &pkt, FROM_GUEST);

	return reason ?: remap_from_guest(skb, port, &pkt);
}
