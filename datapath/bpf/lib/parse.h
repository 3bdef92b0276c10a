/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Frame -> struct packet. Bytes are read from the linear head or, where they are not in it, by bpf_skb_load_bytes.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

#include "packet.h"

#define IPV6_EXTENSIONS_MAX 8
#define IPV4_OFFSET_MASK 0x1fff
#define IPV4_MORE_FRAGMENTS 0x2000

/* Copies bytes of the frame: from its linear head, where headers nearly always are (the helper costs five times as much,
 * and is called for each header). Returns 0, or an error when the frame is shorter. */
static __always_inline int packet_load(struct __sk_buff *skb, __u32 offset, void *to, __u32 size)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	offset &= 0x7fff; /* the verifier wants packet offsets bounded */
	asm volatile("" : "+r"(offset));
	if (data + offset + size > end)
		return bpf_skb_load_bytes(skb, offset, to, size);
	__builtin_memcpy(to, data + offset, size);
	return 0;
}

/* Where L3 begins and what it is. At egress of a locally sent frame a VLAN tag is still in the data: one is skipped. */
static __always_inline int parse_ethernet(struct __sk_buff *skb, struct packet *pkt)
{
	struct ethhdr eth;
	__be16 vlan[2];
	__be16 proto;

	if (packet_load(skb, 0, &eth, sizeof(eth)))
		return DROP_MALFORMED;
	pkt->group = eth.h_dest[0] & 1;
	pkt->l3_offset = sizeof(eth);
	proto = eth.h_proto;
	if (proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD)) {
		if (packet_load(skb, sizeof(eth), vlan, sizeof(vlan)))
			return DROP_MALFORMED;
		pkt->l3_offset += sizeof(vlan);
		proto = vlan[1];
	}
	if (proto == bpf_htons(ETH_P_IP))
		pkt->l3 = L3_IPV4;
	else if (proto == bpf_htons(ETH_P_IPV6))
		pkt->l3 = L3_IPV6;
	else if (proto == bpf_htons(ETH_P_ARP))
		pkt->l3 = L3_ARP;
	else if (proto == bpf_htons(ETH_P_RARP))
		pkt->l3 = L3_RARP;
	return DROP_NONE;
}

/* Returns the length of the IP packet by its header, or 0 when it is malformed. RFC 791 */
static __always_inline __u32 parse_ipv4(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	struct iphdr ip;
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
	return DROP_MALFORMED;
}

static __always_inline __u32 parse_ipv6(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	struct ipv6hdr ip;

	if (packet_load(skb, pkt->l3_offset, &ip, sizeof(ip)) || ip.version != 6)
		return 0;
	addr_copy(direction == FROM_GUEST ? pkt->laddr : pkt->raddr, (__be32 *)&ip.saddr);
	addr_copy(direction == FROM_GUEST ? pkt->raddr : pkt->laddr, (__be32 *)&ip.daddr);
	pkt->proto = ip.nexthdr;
	pkt->hops = ip.hop_limit;
	pkt->l4_offset = pkt->l3_offset + sizeof(ip);
	if (parse_ipv6_extensions(skb, pkt))
		return 0;
	return bpf_ntohs(ip.payload_len) + sizeof(ip);
}

/* Ports, flags and types. Returns the length of the transport header, -1 when it is cut off or impossible. */
static __always_inline int parse_transport(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	__u8 head[sizeof(struct tcphdr)];
	__be16 *ports = (__be16 *)head;
	int tcp = pkt->proto == IPPROTO_TCP;

	if (!tcp && pkt->proto != IPPROTO_UDP && pkt->proto != IPPROTO_ICMP && pkt->proto != IPPROTO_ICMPV6)
		return 0;
	if (packet_load(skb, pkt->l4_offset, head, 8))
		return -1;
	if (!tcp && pkt->proto != IPPROTO_UDP) {
		pkt->icmp_type = head[0];
		pkt->icmp_code = head[1];
		packet_set_query(pkt, direction, ports[2]);
		return 8;
	}
	pkt->lport = direction == FROM_GUEST ? ports[0] : ports[1];
	pkt->rport = direction == FROM_GUEST ? ports[1] : ports[0];
	if (!tcp)
		return 8;
	if (packet_load(skb, pkt->l4_offset + 8, head + 8, sizeof(head) - 8) || head[12] >> 4 < 5)
		return -1;
	pkt->tcp_flags = head[13];
	return (head[12] >> 4) * 4;
}

/* What a GSO frame is on the wire: `headers` bytes are repeated before each gso_size bytes. A frame from a tap has
 * gso_segs 0, so the segments are computed. */
static __always_inline void parse_wire(struct __sk_buff *skb, struct packet *pkt, __u32 bytes, __u32 headers)
{
	__u32 size = skb->gso_size;

	pkt->wire_packets = 1;
	pkt->wire_bytes = bytes;
	pkt->wire_frame_bytes = skb->len;
	if (!size || !headers || bytes <= headers + size)
		return;
	pkt->wire_packets = (bytes - headers + size - 1) / size;
	pkt->wire_bytes += (pkt->wire_packets - 1) * headers;
	pkt->wire_frame_bytes += (pkt->wire_packets - 1) * (headers + pkt->l3_offset);
}

/*
 * Fills `pkt` (which the caller has zeroed) for the frame at skb->data; `direction` is FROM_GUEST or TO_GUEST.
 * Changes nothing of the frame. Returns enum drop_reason: DROP_NONE, or DROP_MALFORMED for a frame that is cut off, lies
 * about its length, has more than IPV6_EXTENSIONS_MAX extension headers, or is a first fragment without its whole
 * transport header (RFC 1858, RFC 7112). Global, so that it is verified once.
 */
__noinline int parse(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	__u32 present, bytes;
	int transport = 0;

	if (!pkt)
		return DROP_MALFORMED;
	if (parse_ethernet(skb, pkt))
		return DROP_MALFORMED;
	present = skb->len - pkt->l3_offset;
	if (pkt->l3 != L3_IPV4 && pkt->l3 != L3_IPV6) {
		parse_wire(skb, pkt, present, 0);
		return DROP_NONE;
	}
	bytes = pkt->l3 == L3_IPV4 ? parse_ipv4(skb, pkt, direction) : parse_ipv6(skb, pkt, direction);
	if (!bytes || bytes > present || pkt->l4_offset - pkt->l3_offset > bytes)
		return DROP_MALFORMED;
	if (pkt->fragment != FRAGMENT_LATER) {
		transport = parse_transport(skb, pkt, direction);
		if (transport < 0 || pkt->l4_offset - pkt->l3_offset + transport > bytes)
			return DROP_MALFORMED;
	}
	parse_wire(skb, pkt, bytes, pkt->l4_offset - pkt->l3_offset + transport);
	return DROP_NONE;
}
