/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the programs know of one frame, from the VM's side: filled by parse(), read by judge() and those who count.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "types.h"

#define FROM_GUEST 0
#define TO_GUEST   1

enum l3_kind {
	L3_OTHER = 0,
	L3_ARP = 1,
	L3_RARP = 2,
	L3_IPV4 = 4,
	L3_IPV6 = 6,
};

enum fragment_kind {
	FRAGMENT_NONE = 0,
	FRAGMENT_FIRST = 1, /* has the transport header */
	FRAGMENT_LATER = 2, /* has neither ports nor flags */
};

enum tcp_flag {
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_PSH = 0x08,
	TCP_ACK = 0x10,
	TCP_URG = 0x20,
};

/* Addresses are v4-mapped for IPv4 and all zero for frames that are not IP. Ports are those of TCP and UDP; for an ICMP
 * query lport is the identifier and rport says who asks what (QUERY_*); 0 for everything else.
 * Offsets count from skb->data. */
struct packet {
	__be32 laddr[4]; /* the guest's side: source of what comes from the guest, destination of what goes to it */
	__be32 raddr[4];
	__be16 lport;
	__be16 rport;
	__u8 proto;     /* the transport's, behind all extension headers */
	__u8 l3;        /* enum l3_kind */
	__u8 fragment;  /* enum fragment_kind */
	__u8 tcp_flags; /* enum tcp_flag */
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 hops;         /* TTL or hop limit */
	__u8 group;        /* 1: the destination MAC is broadcast or multicast */
	__u32 fragment_id; /* as on the wire; 16 bits for IPv4 */
	__u16 l3_offset;
	__u16 l4_offset;
	__u16 vlan;         /* set by who took a tag off: put on again for an answer to the guest */
	__u16 tagged;       /* likewise: VLAN_TAG_REST of the tag, 0 when there was none */
	__u32 wire_packets; /* frames that this one is on a wire: segments of a GSO frame */
	__u32 wire_bytes;   /* bytes of those IP packets; of the frame behind its Ethernet header when it is not IP */
	__u32 wire_frame_bytes; /* bytes of those frames with their Ethernet headers, without FCS and accelerated tag */
} __attribute__((aligned(8)));

/* Copies bytes of the frame: from its linear head, where headers nearly always are (the helper costs five times as
 * much, and is called for each header), two at a time: headers are of even lengths. Returns 0, or an error when the
 * frame is shorter. */
static __always_inline int packet_load(struct __sk_buff *skb, __u32 offset, void *to, __u32 size)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	offset &= 0x7fff; /* the verifier wants packet offsets bounded */
	asm volatile("" : "+r"(offset));
	if (data + offset + size > end)
		return bpf_skb_load_bytes(skb, offset, to, size);
	__builtin_memcpy(__builtin_assume_aligned(to, 2), __builtin_assume_aligned(data + offset, 2), size);
	return 0;
}

/* Behind the IP packet: what follows is padding. Of a large frame, which has none, it is beyond the frame. */
static __always_inline __u32 packet_end(const struct packet *pkt)
{
	return pkt->l3_offset + pkt->wire_bytes;
}

static __always_inline void addr_map_v4(__be32 addr[4], __be32 v4)
{
	addr[0] = 0;
	addr[1] = 0;
	addr[2] = bpf_htonl(0xffff);
	addr[3] = v4;
}

static __always_inline void addr_copy(__be32 to[4], const __be32 from[4])
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

static __always_inline int addr_equal(const __be32 a[4], const __be32 b[4])
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

/* RFC 792, RFC 4443: the types that carry the packet which caused them. Not for a later fragment, which has no type. */
static __always_inline int packet_is_icmp_error(const struct packet *pkt)
{
	if (pkt->proto == IPPROTO_ICMPV6)
		return pkt->icmp_type >= 1 && pkt->icmp_type <= 4;
	if (pkt->proto != IPPROTO_ICMP)
		return 0;
	return pkt->icmp_type == 3 || pkt->icmp_type == 4 || pkt->icmp_type == 5 || pkt->icmp_type == 11 ||
	       pkt->icmp_type == 12;
}

/* rport of an ICMP query: its request type (0 stands for echo), and QUERY_INBOUND when the remote side asks. So that
 * the guest and a remote host may ping each other with the same identifier and have two entries. */
#define QUERY_TYPE    0x00ff
#define QUERY_INBOUND 0x8000

enum icmp_query {
	ICMP_QUERY_NONE = 0,
	ICMP_QUERY_REQUEST = 1,
	ICMP_QUERY_REPLY = 2,
};

/* echo, timestamp, information and address mask (RFC 792, RFC 950); echo (RFC 4443) */
static __always_inline enum icmp_query icmp_query_kind(__u8 proto, __u8 type)
{
	if (proto == IPPROTO_ICMPV6)
		return type == 128 ? ICMP_QUERY_REQUEST : type == 129 ? ICMP_QUERY_REPLY : ICMP_QUERY_NONE;
	if (proto != IPPROTO_ICMP)
		return ICMP_QUERY_NONE;
	if (type == 8 || type == 13 || type == 15 || type == 17)
		return ICMP_QUERY_REQUEST;
	if (type == 0 || type == 14 || type == 16 || type == 18)
		return ICMP_QUERY_REPLY;
	return ICMP_QUERY_NONE;
}

static __always_inline void packet_set_query(struct packet *pkt, int direction, __be16 identifier)
{
	enum icmp_query kind = icmp_query_kind(pkt->proto, pkt->icmp_type);
	int inbound = (kind == ICMP_QUERY_REQUEST) == (direction == TO_GUEST);
	__u16 asked = 0;

	if (kind == ICMP_QUERY_NONE)
		return;
	if (pkt->proto == IPPROTO_ICMP && pkt->icmp_type != 0 && pkt->icmp_type != 8) /* a reply is its request + 1 */
		asked = kind == ICMP_QUERY_REQUEST ? pkt->icmp_type : pkt->icmp_type - 1;
	pkt->lport = identifier;
	pkt->rport = bpf_htons(asked | (inbound ? QUERY_INBOUND : 0));
}
