/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A frame becomes the answer to itself: a TCP reset (RFC 9293, 3.5.2) or an ICMP error (RFC 792, RFC 4443).
 *
 * Whether a checksum is left to the device (CHECKSUM_PARTIAL, as nearly all that guests send) cannot be seen from here,
 * nor changed. So the bytes from the transport header on are balanced: sum + sum of what the device would put into the
 * checksum field comes out the same whether or not it does. One field that has no meaning pays for it.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/tcp.h>

#include "checksum.h"
#include "ip.h"

#define ANSWER_HOPS     64
#define ANSWER_EMBEDDED 8 /* bytes of the transport header in an ICMP error */

/* An IP header from the receiver of `pkt` to its sender, at `offset`. Returns the unfolded sum of its pseudo-header. */
static __always_inline __s64 answer_ip(struct __sk_buff *skb, const struct packet *pkt, int direction, __u32 offset,
				       __u8 proto, __u16 length)
{
	const __be32 *from = direction == FROM_GUEST ? pkt->raddr : pkt->laddr;
	const __be32 *to = direction == FROM_GUEST ? pkt->laddr : pkt->raddr;
	__s64 pseudo = bpf_htons(length) + bpf_htons(proto);

	if (pkt->l3 == L3_IPV4) {
		struct iphdr ip = {.version = 4, .ihl = 5, .ttl = ANSWER_HOPS, .protocol = proto};

		ip.tot_len = bpf_htons(sizeof(ip) + length);
		ip.frag_off = bpf_htons(0x4000);
		ip.saddr = from[3];
		ip.daddr = to[3];
		ip.check = ~checksum_fold(checksum_add(&ip, sizeof(ip), 0));
		if (bpf_skb_store_bytes(skb, offset, &ip, sizeof(ip), 0))
			return -1;
		return checksum_add(&ip.saddr, 8, pseudo);
	}
	struct ipv6hdr ip = {.version = 6, .nexthdr = proto, .hop_limit = ANSWER_HOPS};

	ip.payload_len = bpf_htons(length);
	addr_copy((__be32 *)&ip.saddr, from);
	addr_copy((__be32 *)&ip.daddr, to);
	if (bpf_skb_store_bytes(skb, offset, &ip, sizeof(ip), 0))
		return -1;
	return checksum_add(&ip.saddr, 32, pseudo);
}

/* Turns a TCP segment into the reset that answers it. Returns 0 or -1. */
static __always_inline int answer_reset(struct __sk_buff *skb, const struct packet *pkt, int direction)
{
	struct tcphdr tcp, reset = {.doff = sizeof(reset) / 4, .rst = 1};
	__u32 bytes = 0;
	__s64 pseudo;
	__be16 total;

	/* the length by the header: of a GSO frame it is that of all segments, as it should be */
	if (bpf_skb_load_bytes(skb, pkt->l3_offset + (pkt->l3 == L3_IPV4 ? 2 : 4), &total, sizeof(total)) ||
	    bpf_skb_load_bytes(skb, pkt->l4_offset, &tcp, sizeof(tcp)))
		return -1;
	bytes = bpf_ntohs(total) - (pkt->l3 == L3_IPV4 ? sizeof(struct iphdr) : 0) - tcp.doff * 4;
	reset.source = tcp.dest;
	reset.dest = tcp.source;
	if (tcp.ack) {
		reset.seq = tcp.ack_seq;
	} else {
		reset.ack = 1;
		reset.ack_seq = bpf_htonl(bpf_ntohl(tcp.seq) + bytes + tcp.syn + tcp.fin);
	}
	if (bpf_skb_change_tail(skb, pkt->l4_offset + sizeof(reset), 0))
		return -1;
	pseudo = answer_ip(skb, pkt, direction, pkt->l3_offset, IPPROTO_TCP, sizeof(reset));
	if (pseudo < 0)
		return -1;
	/* rest + pseudo + check = 0 and check = ~(rest + check) at once: check is the pseudo-header's sum, and the
	 * urgent pointer (no URG flag: of no meaning) makes the rest minus twice that */
	reset.check = checksum_fold(pseudo);
	reset.urg_ptr = ~checksum_fold(checksum_add(&reset, sizeof(reset), reset.check));
	return bpf_skb_store_bytes(skb, pkt->l4_offset, &reset, sizeof(reset), 0) ? -1 : 0;
}

struct answer_icmp { /* head of the error's data */
	__u8 type;
	__u8 code;
	__be16 check;
	__be32 unused;
};

/* "Port unreachable" for a datagram, "administratively prohibited" for the rest */
static __always_inline struct answer_icmp answer_why(const struct packet *pkt)
{
	int udp = pkt->proto == IPPROTO_UDP;

	if (pkt->l3 == L3_IPV4)
		return (struct answer_icmp){.type = 3, .code = udp ? 3 : 13};
	return (struct answer_icmp){.type = 1, .code = udp ? 4 : 1};
}

/* The checksum field of the datagram that is carried: with the other three words x, x + 2 * check = 0, and halving is a
 * rotation in one's complement. Who gets an ICMP error does not verify it. */
static __always_inline __be16 answer_balance(const __be16 udp[4])
{
	__u16 minus = ~checksum_fold((__s64)udp[0] + udp[1] + udp[2]);

	return minus >> 1 | minus << 15;
}

/* Puts IP and ICMP headers before a packet and cuts it behind ANSWER_EMBEDDED bytes of its transport header. */
static __always_inline int answer_error(struct __sk_buff *skb, const struct packet *pkt, int direction)
{
	__u32 header = pkt->l3 == L3_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	__u32 tag = pkt->l3_offset > ETH_HLEN ? pkt->l3_offset - ETH_HLEN : 0;
	__u32 added = header + sizeof(struct answer_icmp), carried = header + ANSWER_EMBEDDED;
	struct answer_icmp icmp = answer_why(pkt);
	__u8 head[sizeof(struct ipv6hdr) + ANSWER_EMBEDDED] = {}, ethernet[ETH_HLEN + 4];
	__be16 udp[4];
	__s64 sum;

	if (skb->len < pkt->l4_offset + ANSWER_EMBEDDED || bpf_skb_load_bytes(skb, 0, ethernet, sizeof(ethernet)) ||
	    bpf_skb_change_tail(skb, pkt->l4_offset + ANSWER_EMBEDDED, 0) || bpf_skb_change_head(skb, added, 0) ||
	    bpf_skb_store_bytes(skb, 0, ethernet, ETH_HLEN, 0) ||
	    (tag && bpf_skb_store_bytes(skb, ETH_HLEN, ethernet + ETH_HLEN, 4, 0)))
		return -1;
	if (bpf_skb_load_bytes(skb, pkt->l4_offset + added, udp, sizeof(udp)))
		return -1;
	if (pkt->proto == IPPROTO_UDP) {
		udp[3] = answer_balance(udp);
		if (bpf_skb_store_bytes(skb, pkt->l4_offset + added, udp, sizeof(udp), 0))
			return -1;
	}
	sum = answer_ip(skb, pkt, direction, pkt->l3_offset, pkt->l3 == L3_IPV4 ? IPPROTO_ICMP : IPPROTO_ICMPV6,
			sizeof(icmp) + carried);
	if (sum < 0 ||
	    (pkt->l3 == L3_IPV4 ? bpf_skb_load_bytes(skb, pkt->l3_offset + added, head, sizeof(struct iphdr) + 8)
				: bpf_skb_load_bytes(skb, pkt->l3_offset + added, head, sizeof(head))))
		return -1;
	if (pkt->l3 == L3_IPV4) /* has no pseudo-header */
		sum = 0;
	icmp.check = ~checksum_fold(checksum_add(head, sizeof(head), checksum_add(&icmp, sizeof(icmp), sum)));
	return bpf_skb_store_bytes(skb, pkt->l3_offset + header, &icmp, sizeof(icmp), 0) ? -1 : 0;
}
