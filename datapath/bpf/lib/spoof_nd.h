/* SPDX-License-Identifier: GPL-2.0-only */
/* Anti-spoofing of IPv6 neighbour discovery: what a guest may say of itself, and with which link-layer address. */
#pragma once

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "l2.h"
#include "packet.h"
#include "remap_rule.h"

#define ND_HOP_LIMIT   255 /* RFC 4861, 7.1: what came through a router has less */
#define ND_OPTIONS_MAX 4

/* RFC 2710, RFC 3810, RFC 4861 */
enum icmp6_type {
	ICMP6_MLD_REPORT = 131,
	ICMP6_MLD_DONE = 132,
	ICMP6_ROUTER_SOLICIT = 133,
	ICMP6_ROUTER_ADVERT = 134,
	ICMP6_NEIGHBOUR_SOLICIT = 135,
	ICMP6_NEIGHBOUR_ADVERT = 136,
	ICMP6_REDIRECT = 137,
	ICMP6_MLD2_REPORT = 143,
};

struct nd_message { /* RFC 4861, 4.3 and 4.4 */
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 flags;
	__be32 target[4];
};

struct nd_option { /* source (1) or target (2) link-layer address; length in units of 8 bytes */
	__u8 type;
	__u8 length;
	__u8 mac[6];
};

/* Link-layer options must name the frame's own source: they rewrite neighbours' caches. */
static __always_inline int spoof_nd_options(struct __sk_buff *skb, __u32 offset, const __u8 mac[6])
{
	struct nd_option option;

	for (int i = 0; i < ND_OPTIONS_MAX; i++) {
		if (bpf_skb_load_bytes(skb, offset, &option, sizeof(option)))
			return DROP_NONE; /* no more */
		if (!option.length)
			return DROP_SPOOF_ND;
		if ((option.type == 1 || option.type == 2) && (option.length != 1 || !mac_equal(option.mac, mac)))
			return DROP_SPOOF_ND;
		offset += option.length * 8;
	}
	return DROP_SPOOF_ND;
}

static __always_inline int spoof_nd(struct __sk_buff *skb, struct port *port, const struct packet *pkt,
				    const __u8 mac[6])
{
	int probe = addr_is_zero(pkt->laddr);
	struct nd_message nd;

	if (pkt->icmp_type < ICMP6_ROUTER_SOLICIT || pkt->icmp_type > ICMP6_REDIRECT)
		return DROP_NONE;
	if (pkt->fragment != FRAGMENT_NONE) /* RFC 6980 */
		return DROP_SPOOF_ND;
	if (pkt->icmp_type == ICMP6_ROUTER_SOLICIT)
		return spoof_nd_options(skb, pkt->l4_offset + 8, mac);
	/* a guest is no router (RFC 6105) */
	if (pkt->icmp_type == ICMP6_ROUTER_ADVERT || pkt->icmp_type == ICMP6_REDIRECT)
		return DROP_SPOOF_ND;
	if (pkt->hops != ND_HOP_LIMIT || bpf_skb_load_bytes(skb, pkt->l4_offset, &nd, sizeof(nd)))
		return DROP_SPOOF_ND;
	/* the target of an advertisement, and of an address probe, is what the guest claims */
	if ((pkt->icmp_type == ICMP6_NEIGHBOUR_ADVERT || probe) && !addr_is_own_link_local(port->slot, nd.target) &&
	    !addr_is_owned(port->slot, nd.target) && !remap_is_outside(port, nd.target))
		return DROP_SPOOF_ND;
	return spoof_nd_options(skb, pkt->l4_offset + sizeof(nd), mac);
}

static __always_inline int spoof_ipv6_unspecified(const struct packet *pkt)
{
	if (pkt->proto != IPPROTO_ICMPV6)
		return DROP_SPOOF_ADDRESS;
	switch (pkt->icmp_type) {
	case ICMP6_NEIGHBOUR_SOLICIT:
	case ICMP6_ROUTER_SOLICIT:
	case ICMP6_MLD_REPORT:
	case ICMP6_MLD_DONE:
	case ICMP6_MLD2_REPORT:
		return DROP_NONE;
	}
	return DROP_SPOOF_ADDRESS;
}
