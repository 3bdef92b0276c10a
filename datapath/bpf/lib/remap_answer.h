/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ARP and neighbour discovery of remapped addresses. Who asks for an outside address is answered in the guest's stead,
 * with the port's MAC: the guest does not know it. What the guest says of its inside address it says of the outside
 * one.
 */
#pragma once

#include "checksum.h"
#include "mark.h"
#include "remap_rewrite.h"
#include "spoof.h"

#define ND_SOLICITED (1u << 30)
#define ND_OVERRIDE  (1u << 29)

struct nd_advert { /* IPv6 header, neighbour advertisement and its target link-layer address */
	struct ipv6hdr ip;
	struct nd_message nd;
	struct nd_option option;
};

/* The frame, which is the answer by now, comes in at the guest's device as the guest's own (reject.h). */
static __always_inline int remap_send(struct __sk_buff *skb, struct port *port, const __u8 to[6])
{
	__u8 macs[2 * ETH_ALEN];

	__builtin_memcpy(macs, to, ETH_ALEN);
	__builtin_memcpy(macs + ETH_ALEN, port->mac, ETH_ALEN);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return DROP_REMAP;
	mark_set(skb, SKB_MARK_JUDGED);
	bpf_clone_redirect(skb, port->ifindex, BPF_F_INGRESS);
	mark_set(skb, 0);
	return DROP_ANSWERED;
}

static __always_inline int remap_arp_load(struct __sk_buff *skb, const struct packet *pkt, struct arp_ipv4 *arp)
{
	return bpf_skb_load_bytes(skb, pkt->l3_offset, arp, sizeof(*arp)) ||
	       (arp->hardware != bpf_htons(ARP_ETHERNET) && arp->hardware != bpf_htons(ARP_IEEE802)) ||
	       arp->protocol != bpf_htons(ETH_P_IP) || arp->hardware_size != ETH_ALEN ||
	       arp->protocol_size != sizeof(__be32);
}

static __always_inline void remap_arp_address(__be32 addr[4], const __u8 bytes[4])
{
	__be32 v4;

	__builtin_memcpy(&v4, bytes, sizeof(v4));
	addr_map_v4(addr, v4);
}

static __noinline int remap_arp_answer(struct __sk_buff *skb, struct port *port, struct packet *pkt,
				       struct arp_ipv4 *arp)
{
	__u8 asked[4];

	__builtin_memcpy(asked, arp->target_ip, sizeof(asked));
	arp->operation = bpf_htons(2);
	__builtin_memcpy(arp->target, arp->sender, ETH_ALEN);
	__builtin_memcpy(arp->target_ip, arp->sender_ip, sizeof(asked));
	__builtin_memcpy(arp->sender, port->mac, ETH_ALEN);
	__builtin_memcpy(arp->sender_ip, asked, sizeof(asked));
	if (bpf_skb_store_bytes(skb, pkt->l3_offset, arp, sizeof(*arp), BPF_F_RECOMPUTE_CSUM))
		return DROP_REMAP;
	return remap_send(skb, port, arp->target);
}

/* One of the two protocol addresses of an ARP message becomes what the rule for it says. Returns 0 or -1. */
static __always_inline int remap_arp_field(struct __sk_buff *skb, struct port *port, const struct packet *pkt,
					   __u32 side, __u32 field)
{
	__u32 offset = pkt->l3_offset + field;
	struct remap_entry *entry;
	__be32 addr[4], v4;

	if (bpf_skb_load_bytes(skb, offset, &v4, sizeof(v4)))
		return -1;
	addr_map_v4(addr, v4);
	entry = remap_address_rule(port->slot, side, addr);
	if (!entry)
		return 0;
	v4 = entry->addr[3];
	return bpf_skb_store_bytes(skb, offset, &v4, sizeof(v4), BPF_F_RECOMPUTE_CSUM) ? -1 : 0;
}

static __noinline int remap_arp_to_guest(struct __sk_buff *skb, struct port *port, struct packet *pkt)
{
	struct arp_ipv4 arp;
	__be32 addr[4];

	if (remap_arp_load(skb, pkt, &arp))
		return DROP_NONE;
	remap_arp_address(addr, arp.target_ip);
	if (arp.operation != bpf_htons(1))
		return remap_arp_field(skb, port, pkt, REMAP_IN, offsetof(struct arp_ipv4, target_ip)) ? DROP_REMAP
												       : DROP_NONE;
	if (remap_address(port->slot, REMAP_IN, addr))
		return remap_arp_answer(skb, port, pkt, &arp);
	return remap_address_rule(port->slot, REMAP_OUT, addr) ? DROP_REMAP : DROP_NONE;
}

static __noinline int remap_arp_from_guest(struct __sk_buff *skb, struct port *port, struct packet *pkt)
{
	struct arp_ipv4 arp;

	if (remap_arp_load(skb, pkt, &arp))
		return DROP_NONE;
	if (remap_arp_field(skb, port, pkt, REMAP_OUT, offsetof(struct arp_ipv4, sender_ip)) ||
	    remap_arp_field(skb, port, pkt, REMAP_OUT, offsetof(struct arp_ipv4, target_ip)))
		return DROP_REMAP;
	return DROP_NONE;
}

static __always_inline int remap_is_solicitation(const struct packet *pkt)
{
	return pkt->proto == IPPROTO_ICMPV6 && pkt->icmp_type == ICMP6_NEIGHBOUR_SOLICIT;
}

static __always_inline int remap_is_discovery(const struct packet *pkt)
{
	return remap_is_solicitation(pkt) || (pkt->proto == IPPROTO_ICMPV6 && pkt->icmp_type == ICMP6_NEIGHBOUR_ADVERT);
}

/* Fails for a target that is written as an IPv4 address, too: that is no address of a wire (RFC 4291, 2.5.5.2). */
static __always_inline long remap_nd_load(struct __sk_buff *skb, const struct packet *pkt, struct nd_message *nd)
{
	return pkt->l4_offset + sizeof(*nd) > packet_end(pkt) ||
	       bpf_skb_load_bytes(skb, pkt->l4_offset, nd, sizeof(*nd)) || addr_is_v4(nd->target);
}

/* RFC 4861, 7.2.4: to all nodes when who asks has no address yet. */
static __noinline int remap_advertise(struct __sk_buff *skb, struct port *port, struct packet *pkt, __be32 target[4])
{
	struct nd_advert advert = {.ip = {.version = 6, .nexthdr = IPPROTO_ICMPV6, .hop_limit = ND_HOP_LIMIT}};
	__be32 pseudo[2] = {bpf_htonl(sizeof(advert.nd) + sizeof(advert.option)), bpf_htonl(IPPROTO_ICMPV6)};
	__u8 to[ETH_ALEN] = {0x33, 0x33, 0, 0, 0, 1};
	__be32 *dst = (__be32 *)&advert.ip.daddr;
	__s64 sum;

	advert.nd.flags = bpf_htonl(ND_OVERRIDE);
	dst[0] = bpf_htonl(0xff020000);
	dst[3] = bpf_htonl(1);
	if (!addr_is_zero(pkt->raddr)) {
		addr_copy(dst, pkt->raddr);
		advert.nd.flags |= bpf_htonl(ND_SOLICITED);
		if (bpf_skb_load_bytes(skb, ETH_ALEN, to, sizeof(to)))
			return DROP_REMAP;
	}
	advert.ip.payload_len = bpf_htons(sizeof(advert.nd) + sizeof(advert.option));
	addr_copy((__be32 *)&advert.ip.saddr, target);
	advert.nd.type = ICMP6_NEIGHBOUR_ADVERT;
	addr_copy(advert.nd.target, target);
	advert.option.type = 2;
	advert.option.length = 1;
	__builtin_memcpy(advert.option.mac, port->mac, ETH_ALEN);
	sum = checksum_add(&advert.ip.saddr, 2 * sizeof(advert.ip.saddr), checksum_add(pseudo, sizeof(pseudo), 0));
	sum = checksum_add(&advert.nd, sizeof(advert.nd) + sizeof(advert.option), sum);
	advert.nd.checksum = ~checksum_fold(sum);
	if (bpf_skb_change_tail(skb, pkt->l3_offset + sizeof(advert), 0) ||
	    bpf_skb_store_bytes(skb, pkt->l3_offset, &advert, sizeof(advert), BPF_F_RECOMPUTE_CSUM))
		return DROP_REMAP;
	return remap_send(skb, port, to);
}

/* A neighbour solicitation for the guest. Returns enum drop_reason. */
static __noinline int remap_solicitation(struct __sk_buff *skb, struct port *port, struct packet *pkt)
{
	struct nd_message nd;

	if (pkt->fragment != FRAGMENT_NONE || pkt->hops != ND_HOP_LIMIT || pkt->icmp_code ||
	    remap_nd_load(skb, pkt, &nd))
		return DROP_NONE; /* no guest takes it for one: RFC 4861, 7.1.1, RFC 6980 */
	if (remap_address(port->slot, REMAP_IN, nd.target))
		return remap_advertise(skb, port, pkt, nd.target);
	return remap_address_rule(port->slot, REMAP_OUT, nd.target) ? DROP_REMAP : DROP_NONE;
}

/* The target of what the guest asks or says, and the checksum over it. Returns enum drop_reason. */
static __noinline int remap_discovery(struct __sk_buff *skb, struct port *port, struct packet *pkt)
{
	struct remap_entry *entry;
	struct nd_message nd;
	__be32 outside[4];
	__s64 difference;

	if (remap_nd_load(skb, pkt, &nd))
		return DROP_NONE;
	entry = remap_address_rule(port->slot, REMAP_OUT, nd.target);
	if (!entry)
		return DROP_NONE;
	addr_copy(outside, entry->addr);
	difference = bpf_csum_diff(nd.target, sizeof(nd.target), outside, sizeof(outside), 0);
	if (bpf_l4_csum_replace(skb, pkt->l4_offset + offsetof(struct nd_message, checksum), 0, difference, 0) ||
	    bpf_skb_store_bytes(skb, pkt->l4_offset + offsetof(struct nd_message, target), outside, sizeof(outside), 0))
		return DROP_REMAP;
	return DROP_NONE;
}
