/* SPDX-License-Identifier: GPL-2.0-only */
/* Plain frames -> struct packet, in place and without a copy of any header; parse.h has all others. */
#pragma once

#include "parse.h"

/* parse_plain() of an IPv4 header without options. Returns the length of the packet, 0 when it is not plain. */
static __always_inline __u32 parse_plain_ipv4(const struct iphdr *ip, struct packet *pkt, int direction)
{
	if (*(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(IPV4_MORE_FRAGMENTS | IPV4_OFFSET_MASK))
		return 0;
	addr_map_v4(direction == FROM_GUEST ? pkt->laddr : pkt->raddr, ip->saddr);
	addr_map_v4(direction == FROM_GUEST ? pkt->raddr : pkt->laddr, ip->daddr);
	pkt->l3 = L3_IPV4;
	pkt->proto = ip->protocol;
	pkt->hops = ip->ttl;
	pkt->fragment_id = bpf_ntohs(ip->id);
	return bpf_ntohs(ip->tot_len);
}

/* The same of an IPv6 header: what an extension header is, is no transport of parse_plain(). */
static __always_inline __u32 parse_plain_ipv6(const struct ipv6hdr *ip, struct packet *pkt, int direction)
{
	if (ip->version != 6)
		return 0;
	addr_copy(direction == FROM_GUEST ? pkt->laddr : pkt->raddr, (__be32 *)&ip->saddr);
	addr_copy(direction == FROM_GUEST ? pkt->raddr : pkt->laddr, (__be32 *)&ip->daddr);
	if (addr_is_v4(pkt->laddr) || addr_is_v4(pkt->raddr))
		return 0;
	pkt->l3 = L3_IPV6;
	pkt->proto = ip->nexthdr;
	pkt->hops = ip->hop_limit;
	return bpf_ntohs(ip->payload_len) + sizeof(*ip);
}

/* Of TCP or UDP, of which the first 8 bytes are there. Returns the length of the header, 0 when it is not plain. */
static __always_inline __u32 parse_plain_transport(const struct tcphdr *tcp, const void *end, struct packet *pkt,
						   int direction)
{
	pkt->lport = direction == FROM_GUEST ? tcp->source : tcp->dest;
	pkt->rport = direction == FROM_GUEST ? tcp->dest : tcp->source;
	if (pkt->proto == IPPROTO_UDP)
		return 8;
	if (pkt->proto != IPPROTO_TCP || (void *)(tcp + 1) > end)
		return 0;
	pkt->tcp_flags = ((__u8 *)tcp)[13];
	return tcp->doff < 5 ? 0 : tcp->doff * 4;
}

/* What nearly all frames are: TCP or UDP over IP without options, not a fragment, headers in the linear head. True when
 * `pkt` is as parse() would have it, several times as fast; else it is void. */
static __always_inline int parse_plain(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	void *data, *end, *l4;
	struct ethhdr *eth;
	__u32 bytes, header;

	asm volatile("" : "+r"(skb)); /* or the compiler keeps pointers from before a clone or a tag */
	data = eth = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (data + sizeof(*eth) + sizeof(struct iphdr) + 8 > end)
		return 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		bytes = parse_plain_ipv4(data + sizeof(*eth), pkt, direction);
		l4 = data + sizeof(*eth) + sizeof(struct iphdr);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6) && data + sizeof(*eth) + sizeof(struct ipv6hdr) + 8 <= end) {
		bytes = parse_plain_ipv6(data + sizeof(*eth), pkt, direction);
		l4 = data + sizeof(*eth) + sizeof(struct ipv6hdr);
	} else {
		return 0;
	}
	if (!bytes)
		return 0;
	header = parse_plain_transport(l4, end, pkt, direction);
	if (!header)
		return 0;
	pkt->group = eth->h_dest[0] & 1;
	pkt->l3_offset = sizeof(*eth);
	pkt->l4_offset = l4 - data;
	header += pkt->l4_offset - sizeof(*eth);
	if (bytes < header || bytes > skb->len - sizeof(*eth))
		return 0;
	parse_wire(skb, pkt, bytes, header);
	return 1;
}

/* As parse(), inline and at once for a frame that is plain: for programs through which every frame goes. */
static __always_inline int parse_frame(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	if (parse_plain(skb, pkt, direction))
		return DROP_NONE;
	__builtin_memset(pkt, 0, sizeof(*pkt));
	return parse(skb, pkt, direction);
}
