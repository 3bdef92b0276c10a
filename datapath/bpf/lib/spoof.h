/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Anti-spoofing: a guest speaks with its own MACs and addresses only. Its MACs are the port's and those whose L2 entry
 * was pinned to the port; its addresses are those in `addresses`. Link-local IPv6 addresses pass unless the port's are
 * named; so does what a guest must say before it has an address: DHCP, address probes, router solicitations and
 * multicast reports. Where the port is may be announced of its outside addresses (remap.h), too.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "l2.h"
#include "maps.h"
#include "packet.h"
#include "remap_rule.h"
#include "spoof_nd.h"

#define ARP_ETHERNET 1 /* hardware type */
#define ARP_IEEE802  6 /* of what is Ethernet as well: RFC 1042 */
#define DHCP_SERVER  67
#define DHCP_CLIENT  68
#define DHCP6_SERVER 547
#define DHCP6_CLIENT 546

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

/* Guests hear a DHCP server past their policies (judge.h), so a guest is none, as it is no router (RFC 7610). */
static __always_inline int spoof_dhcp_server(const struct packet *pkt, __u16 server, __u16 client)
{
	return pkt->proto == IPPROTO_UDP && pkt->fragment != FRAGMENT_LATER && pkt->lport == bpf_htons(server) &&
	       pkt->rport == bpf_htons(client);
}

static __always_inline int spoof_ipv4(struct port *port, const struct packet *pkt)
{
	if (spoof_dhcp_server(pkt, DHCP_SERVER, DHCP_CLIENT))
		return DROP_SPOOF_ADDRESS;
	if (addr_is_owned(port->slot, pkt->laddr))
		return DROP_NONE;
	if (!pkt->laddr[3] && pkt->proto == IPPROTO_UDP && pkt->fragment == FRAGMENT_NONE &&
	    pkt->lport == bpf_htons(DHCP_CLIENT) && pkt->rport == bpf_htons(DHCP_SERVER))
		return DROP_NONE;
	return DROP_SPOOF_ADDRESS;
}

static __always_inline int spoof_ipv6(struct __sk_buff *skb, struct port *port, const struct packet *pkt,
				      const __u8 mac[6])
{
	int reason = DROP_NONE;

	if (spoof_dhcp_server(pkt, DHCP6_SERVER, DHCP6_CLIENT))
		return DROP_SPOOF_ADDRESS;
	if (addr_is_zero(pkt->laddr))
		reason = spoof_ipv6_unspecified(pkt);
	else if (!addr_is_own_link_local(port->slot, pkt->laddr) && !addr_is_owned(port->slot, pkt->laddr) &&
		 !(pkt->icmp_type == ICMP6_NEIGHBOUR_ADVERT && remap_is_outside(port, pkt->laddr)))
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
	if (!sender || addr_is_owned(port->slot, addr) || remap_is_outside(port, addr))
		return DROP_NONE;
	return DROP_SPOOF_ARP;
}

/* A frame from the port's own MAC in which spoof_check() finds nothing, as nearly all; said with one look. */
static __always_inline int spoof_is_plain(const struct port *port, const struct packet *pkt)
{
	if (pkt->l3 == L3_IPV4) {
		if (spoof_dhcp_server(pkt, DHCP_SERVER, DHCP_CLIENT))
			return 0;
	} else if (pkt->l3 != L3_IPV6 || pkt->proto == IPPROTO_ICMPV6 || addr_is_zero(pkt->laddr) ||
		   spoof_dhcp_server(pkt, DHCP6_SERVER, DHCP6_CLIENT)) {
		return 0;
	}
	return (pkt->l3 == L3_IPV4 && pkt->laddr[3] && pkt->laddr[3] == READ_ONCE(port->address)) ||
	       addr_is_owned(port->slot, pkt->laddr);
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
