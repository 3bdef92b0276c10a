/* SPDX-License-Identifier: GPL-2.0-only */
/* Frame -> struct packet. */
#pragma once

#include <linux/if_ether.h>
#include <linux/tcp.h>

#include "ip.h"
#include "packet.h"

/* What is in the frame behind an 802.2 SNAP header is as good as behind an Ethernet type to many receivers (IEEE
 * 802.1H, RFC 1042), and past anti-spoofing and policy (CVE-2021-27853): it is not switched. `length` is where a type
 * would be. */
static __always_inline int parse_is_snap(struct __sk_buff *skb, __u32 offset, __be16 length)
{
	__u8 head[6] __attribute__((aligned(2))); /* two service access points, control, organisation */

	if (bpf_ntohs(length) >= ETH_P_802_3_MIN || packet_load(skb, offset, head, sizeof(head)))
		return 0;
	return head[0] == 0xaa && head[1] == 0xaa && !head[3] && !head[4] && (!head[5] || head[5] == 0xf8);
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
	if (parse_is_snap(skb, pkt->l3_offset, proto))
		return DROP_MALFORMED;
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

/* Ports, flags and types. Returns the length of the transport header, -1 when it is cut off or impossible. */
static __always_inline int parse_transport(struct __sk_buff *skb, struct packet *pkt, int direction)
{
	__u8 head[sizeof(struct tcphdr)] __attribute__((aligned(4)));
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
 * Changes nothing of the frame. Returns enum drop_reason: DROP_NONE, or DROP_MALFORMED for a frame that is cut off,
 * lies about its length, wears a SNAP header, has a v4-mapped IPv6 address, the other family's ICMP or more than
 * IPV6_EXTENSIONS_MAX extension headers, or is a first fragment without its whole transport header (RFC 1858, RFC
 * 7112). Global, so that it is verified once.
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
	/* in the other family it is of no protocol stack, and here it would pass for what it is in its own */
	if (pkt->proto == (pkt->l3 == L3_IPV4 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return DROP_MALFORMED;
	if (pkt->fragment != FRAGMENT_LATER) {
		transport = parse_transport(skb, pkt, direction);
		if (transport < 0 || pkt->l4_offset - pkt->l3_offset + transport > bytes)
			return DROP_MALFORMED;
	}
	parse_wire(skb, pkt, bytes, pkt->l4_offset - pkt->l3_offset + transport);
	return DROP_NONE;
}
