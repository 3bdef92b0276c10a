/* SPDX-License-Identifier: GPL-2.0-only */
/* Which rule of a port's remapping is for one end of a packet. */
#pragma once

#include <linux/tcp.h>
#include <linux/udp.h>

#include "address.h"

struct { /* every port's rules, by address and, where a rule has them, protocol and port */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, REMAPS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct remap_key);
	__type(value, struct remap_entry);
	PINNED;
} remaps SEC(".maps");

struct remap_end { /* what the guest's end of a packet becomes */
	__be32 addr[4];
	__be16 port;
	__u8 ruled; /* 0: it stays as it is */
	__u8 pad;
};

static __always_inline int remap_has_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP;
}

static __always_inline void remap_key_set(struct remap_key *key, __u32 slot, __u32 side, const __be32 addr[4])
{
	key->slot = slot;
	addr_copy(key->addr, addr);
	key->port = 0;
	key->proto = 0;
	key->side = side;
}

/* The element for an address as a whole, of whatever ports. */
static __always_inline struct remap_entry *remap_address(__u32 slot, __u32 side, const __be32 addr[4])
{
	struct remap_key key;

	remap_key_set(&key, slot, side, addr);
	return bpf_map_lookup_elem(&remaps, &key);
}

/* A rule for the address as a whole. */
static __always_inline struct remap_entry *remap_address_rule(__u32 slot, __u32 side, const __be32 addr[4])
{
	struct remap_entry *entry = remap_address(slot, side, addr);

	return entry && entry->flags & REMAP_F_RULE ? entry : NULL;
}

/* The network finds the port's guest under it. */
static __always_inline int remap_is_outside(const struct port *port, const __be32 addr[4])
{
	return port->features & FEATURE_REMAP && remap_address(port->slot, REMAP_IN, addr);
}

static __always_inline struct remap_entry *remap_port_rule(__u32 slot, __u32 side, const __be32 addr[4],
							   const struct packet *pkt)
{
	struct remap_key key;

	remap_key_set(&key, slot, side, addr);
	key.port = pkt->lport;
	key.proto = pkt->proto;
	return bpf_map_lookup_elem(&remaps, &key);
}

/*
 * An inside end that the network does not see: what came to it directly would be answered from outside. `entry`: of the
 * inside address.
 */
static __always_inline int remap_is_hidden(__u32 slot, const struct remap_entry *entry, const struct packet *pkt)
{
	if (entry->flags & REMAP_F_RULE)
		return 1;
	return remap_has_ports(pkt->proto) && remap_port_rule(slot, REMAP_OUT, pkt->laddr, pkt);
}

/* Where the checksum that covers the pseudo-header is, from the transport header on; 0: none is. RFC 3828, 4340, 4443
 */
static __always_inline __u32 remap_checksum_at(const struct packet *pkt)
{
	switch (pkt->proto) {
	case IPPROTO_TCP:
		return offsetof(struct tcphdr, check);
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_DCCP:
		return offsetof(struct udphdr, check);
	case IPPROTO_ICMPV6:
		return 2;
	}
	return 0;
}

/* It ends before its checksum. Never so for the packet in an ICMP error, which may: it is measured by the error. */
static __always_inline int remap_is_cut(const struct packet *pkt)
{
	__u32 check = pkt->fragment == FRAGMENT_LATER ? 0 : remap_checksum_at(pkt);

	return check && pkt->l4_offset + check + sizeof(__u16) > packet_end(pkt);
}

static __always_inline void remap_count(struct remap_entry *entry, const struct packet *pkt)
{
	__sync_fetch_and_add(&entry->packets, pkt->wire_packets);
	__sync_fetch_and_add(&entry->bytes, pkt->wire_bytes);
}

/* No rule is for this end. Returns enum drop_reason. */
static __noinline int remap_no_rule(__u32 slot, const struct packet *pkt, __u32 side)
{
	struct remap_entry *inside;

	if (side == REMAP_OUT)
		return DROP_NONE;
	inside = remap_address(slot, REMAP_OUT, pkt->laddr);
	return inside && remap_is_hidden(slot, inside, pkt) ? DROP_REMAP : DROP_NONE;
}

/* The address as a whole, past rules for some of its ports. Returns enum drop_reason. */
static __always_inline int remap_whole(__u32 slot, struct remap_entry *entry, const struct packet *pkt, __u32 side)
{
	if (!(entry->flags & REMAP_F_RULE)) {
		if (side == REMAP_OUT)
			return DROP_NONE;
		return pkt->fragment == FRAGMENT_LATER ? DROP_NONE : DROP_REMAP; /* has no ports, and its first had */
	}
	/* that port of the other address is another rule's: an answer would not come back to here */
	if (entry->flags & REMAP_F_BESIDE && remap_has_ports(pkt->proto) && pkt->lport &&
	    remap_port_rule(slot, !side, entry->addr, pkt))
		return DROP_REMAP;
	return DROP_NONE;
}

/*
 * What the guest's end of `pkt` becomes: `to`, counted at its rule. Returns enum drop_reason: DROP_REMAP when the way
 * back would be another.
 */
static __noinline int remap_rule(__u32 slot, const struct packet *pkt, __u32 side, struct remap_end *to)
{
	struct remap_entry *entry = remap_address(slot, side, pkt->laddr), *exact = NULL;
	int reason;

	to->ruled = 0;
	if (!entry)
		return remap_no_rule(slot, pkt, side);
	if (entry->flags & REMAP_F_PORTS && remap_has_ports(pkt->proto))
		exact = remap_port_rule(slot, side, pkt->laddr, pkt);
	if (!exact) {
		reason = remap_whole(slot, entry, pkt, side);
		if (reason || (side == REMAP_OUT && !(entry->flags & REMAP_F_RULE)))
			return reason;
		to->port = pkt->lport;
	} else {
		to->port = exact->port;
		entry = exact;
	}
	if (remap_is_cut(pkt))
		return DROP_REMAP;
	addr_copy(to->addr, entry->addr);
	to->ruled = 1;
	remap_count(entry, pkt);
	return DROP_NONE;
}
