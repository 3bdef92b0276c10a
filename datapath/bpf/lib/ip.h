/* SPDX-License-Identifier: GPL-2.0-only */
/* Network headers -> struct packet. */
#pragma once

#include <linux/ip.h>
#include <linux/ipv6.h>

#include "address.h"
#include "packet.h"

#define IPV6_EXTENSIONS_MAX 8
#define IPV4_OFFSET_MASK    0x1fff
#define IPV4_MORE_FRAGMENTS 0x2000

/* Returns the length of the IP packet by its header, or 0 when it is malformed. RFC 791 */
static __always_inline __u32 parse_ipv4(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	struct iphdr ip = {}; /* or the verifier of 6.18 meets a bug of its own in objects that count branches */
	__u16 fragment;

	if (packet_load(skb, pkt->l3_offset, &ip, sizeof(ip)))
		return 0;
	if (ip.version != 4 || ip.ihl < 5)
		return 0;
	addr_map_v4(direction == FROM_GUEST ? pkt->laddr : pkt->raddr, ip.saddr);
	addr_map_v4(direction == FROM_GUEST ? pkt->raddr : pkt->laddr, ip.daddr);
	pkt->proto = ip.protocol;
	pkt->hops = ip.ttl;
	pkt->l4_offset = pkt->l3_offset + ip.ihl * 4;
	fragment = bpf_ntohs(ip.frag_off);
	if (fragment & IPV4_OFFSET_MASK) {
		pkt->fragment = FRAGMENT_LATER;
		/* RFC 1858: this one would overwrite the TCP flags that were judged */
		if (ip.protocol == IPPROTO_TCP && (fragment & IPV4_OFFSET_MASK) == 1)
			return 0;
	} else if (fragment & IPV4_MORE_FRAGMENTS) {
		pkt->fragment = FRAGMENT_FIRST;
	}
	pkt->fragment_id = bpf_ntohs(ip.id);
	return bpf_ntohs(ip.tot_len) < ip.ihl * 4 ? 0 : bpf_ntohs(ip.tot_len);
}

struct ipv6_fragment { /* RFC 8200, 4.5 */
	__u8 nexthdr;
	__u8 reserved;
	__be16 offset; /* in units of 8 bytes, shifted by 3; bit 0: more follow */
	__be32 id;
};

static __always_inline int ipv6_is_extension(__u8 proto)
{
	return proto == IPPROTO_HOPOPTS || proto == IPPROTO_ROUTING || proto == IPPROTO_DSTOPTS ||
	       proto == IPPROTO_FRAGMENT;
}

/* Walks the extension headers from pkt->l4_offset on. Behind the fragment header of a fragmented packet no further
 * extension header is followed: later fragments could not be told apart. */
static __always_inline int parse_ipv6_extensions(struct __sk_buff *skb, struct packet *pkt)
{
	struct ipv6_fragment header;

	for (int i = 0; i < IPV6_EXTENSIONS_MAX; i++) {
		switch (pkt->proto) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
			if (pkt->fragment != FRAGMENT_NONE)
				return DROP_MALFORMED;
			if (packet_load(skb, pkt->l4_offset, &header, sizeof(header)))
				return DROP_MALFORMED;
			pkt->proto = header.nexthdr;
			pkt->l4_offset += (header.reserved + 1) * 8; /* here the header's own length */
			continue;
		case IPPROTO_FRAGMENT:
			if (pkt->fragment != FRAGMENT_NONE)
				return DROP_MALFORMED;
			if (packet_load(skb, pkt->l4_offset, &header, sizeof(header)))
				return DROP_MALFORMED;
			pkt->proto = header.nexthdr;
			pkt->l4_offset += sizeof(header);
			pkt->fragment_id = bpf_ntohl(header.id);
			if (header.offset & bpf_htons(0xfff8)) {
				pkt->fragment = FRAGMENT_LATER;
				return DROP_NONE;
			}
			if (header.offset & bpf_htons(1)) /* else atomic, RFC 6946: a packet as any other */
				pkt->fragment = FRAGMENT_FIRST;
			continue;
		default:
			return DROP_NONE;
		}
	}
	return ipv6_is_extension(pkt->proto) ? DROP_MALFORMED : DROP_NONE;
}

static __always_inline __u32 parse_ipv6(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	struct ipv6hdr ip = {};

	if (packet_load(skb, pkt->l3_offset, &ip, sizeof(ip)) || ip.version != 6)
		return 0;
	addr_copy(direction == FROM_GUEST ? pkt->laddr : pkt->raddr, (__be32 *)&ip.saddr);
	addr_copy(direction == FROM_GUEST ? pkt->raddr : pkt->laddr, (__be32 *)&ip.daddr);
	/* RFC 4291, 2.5.5.2: not on a wire; here it would pass for a packet of the IPv4 address */
	if (addr_is_v4(pkt->laddr) || addr_is_v4(pkt->raddr))
		return 0;
	pkt->proto = ip.nexthdr;
	pkt->hops = ip.hop_limit;
	pkt->l4_offset = pkt->l3_offset + sizeof(ip);
	if (parse_ipv6_extensions(skb, pkt))
		return 0;
	return bpf_ntohs(ip.payload_len) + sizeof(ip);
}
