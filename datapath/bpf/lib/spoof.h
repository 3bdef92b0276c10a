/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Anti-spoofing: a guest speaks with its own MACs and addresses only. Its MACs are the port's and those whose L2 entry
 * was pinned to the port; its addresses are those in `addresses`. Link-local IPv6 addresses pass; so does what a guest
 * must say before it has an address: DHCP, address probes, router solicitations and multicast reports.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "l2.h"
#include "maps.h"
#include "packet.h"
#include "tunnel.h"

#define ARP_ETHERNET   1 /* hardware type */
#define DHCP_SERVER    67
#define DHCP_CLIENT    68
#define ND_HOP_LIMIT   255 /* RFC 4861, 7.1: what came through a router has less */
#define ND_OPTIONS_MAX 4

enum icmp6_type { /* RFC 2710, RFC 3810, RFC 4861 */
		  ICMP6_MLD_REPORT = 131,
		  ICMP6_MLD_DONE = 132,
		  ICMP6_ROUTER_SOLICIT = 133,
		  ICMP6_ROUTER_ADVERT = 134,
		  ICMP6_NEIGHBOUR_SOLICIT = 135,
		  ICMP6_NEIGHBOUR_ADVERT = 136,
		  ICMP6_REDIRECT = 137,
		  ICMP6_MLD2_REPORT = 143,
};

struct arp_ipv4 { /* RFC 826 with Ethernet and IPv4 */
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_size;
	__u8 protocol_size;
	__be16 operation;
	__u8 sender[6];
	__u8 sender_ip[4];
	__u8 target[6];
	__u8 target_ip[4];
} __attribute__((packed));

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

static __always_inline int addr_is_zero(const __be32 addr[4])
{
	return !(addr[0] | addr[1] | addr[2] | addr[3]);
}

static __always_inline int addr_is_link_local(const __be32 addr[4])
{
	return (addr[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline int spoof_address_owned(__u32 slot, const __be32 addr[4])
{
	struct address_key key = {.slot = slot};

	addr_copy(key.addr, addr);
	return bpf_map_lookup_elem(&addresses, &key) != NULL;
}

static __always_inline int spoof_mac_owned(struct port *port, __u32 network, const __u8 mac[6])
{
	struct l2_entry *entry;
	struct l2_key key;

	if (mac_equal(mac, port->mac))
		return 1;
	l2_key_set(&key, network, mac);
	entry = bpf_map_lookup_elem(&l2, &key);
	return entry && l2_is_port(entry, port->slot) && entry->flags & L2_PINNED;
}

static __always_inline int spoof_ipv4(struct port *port, const struct packet *pkt)
{
	if (spoof_address_owned(port->slot, pkt->laddr))
		return DROP_NONE;
	if (!pkt->laddr[3] && pkt->proto == IPPROTO_UDP && pkt->fragment == FRAGMENT_NONE &&
	    pkt->lport == bpf_htons(DHCP_CLIENT) && pkt->rport == bpf_htons(DHCP_SERVER))
		return DROP_NONE;
	return DROP_SPOOF_ADDRESS;
}

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
	if ((pkt->icmp_type == ICMP6_NEIGHBOUR_ADVERT || probe) && !addr_is_link_local(nd.target) &&
	    !spoof_address_owned(port->slot, nd.target))
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

static __always_inline int spoof_ipv6(struct __sk_buff *skb, struct port *port, const struct packet *pkt,
				      const __u8 mac[6])
{
	int reason = DROP_NONE;

	if (addr_is_v4(pkt->laddr)) /* RFC 4291, 2.5.5.2: not on a wire; here it would pass for the IPv4 address */
		reason = DROP_SPOOF_ADDRESS;
	else if (addr_is_zero(pkt->laddr))
		reason = spoof_ipv6_unspecified(pkt);
	else if (!addr_is_link_local(pkt->laddr) && !spoof_address_owned(port->slot, pkt->laddr))
		reason = DROP_SPOOF_ADDRESS;
	if (!reason && pkt->proto == IPPROTO_ICMPV6 && pkt->fragment != FRAGMENT_LATER)
		reason = spoof_nd(skb, port, pkt, mac);
	return reason;
}

static __always_inline int spoof_arp(struct __sk_buff *skb, struct port *port, const struct packet *pkt,
				     const __u8 mac[6])
{
	__be32 addr[4];
	struct arp_ipv4 arp;
	__be32 sender;

	if (bpf_skb_load_bytes(skb, pkt->l3_offset, &arp, sizeof(arp)))
		return DROP_SPOOF_ARP;
	if (arp.hardware != bpf_htons(ARP_ETHERNET) || arp.protocol != bpf_htons(ETH_P_IP) || arp.hardware_size != 6 ||
	    arp.protocol_size != 4 || !mac_equal(arp.sender, mac))
		return DROP_SPOOF_ARP;
	__builtin_memcpy(&sender, arp.sender_ip, sizeof(sender));
	addr_map_v4(addr, sender);
	/* RARP has no address yet (RFC 903), nor has a probe (RFC 5227) */
	if (!sender || spoof_address_owned(port->slot, addr))
		return DROP_NONE;
	return DROP_SPOOF_ARP;
}

/* Returns enum drop_reason for a frame from the guest. `mac` is its source. */
static __noinline int spoof_check(struct __sk_buff *skb, struct port *port, const struct packet *pkt, __u32 network,
				  const __u8 mac[6])
{
	if (mac_is_group(mac) || !spoof_mac_owned(port, network, mac))
		return DROP_SPOOF_MAC;
	if (pkt->l3 == L3_IPV4)
		return spoof_ipv4(port, pkt);
	if (pkt->l3 == L3_IPV6)
		return spoof_ipv6(skb, port, pkt, mac);
	if (pkt->l3 == L3_ARP || pkt->l3 == L3_RARP)
		return spoof_arp(skb, port, pkt, mac);
	return DROP_NONE;
}
