/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The L2 table: {network, MAC} -> place. Learning adds and moves entries, but never those that were configured (STATIC)
 * or that say where a VM is (LOCATION): these move by word of the agent, or when the guest's first frame opens its
 * port.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"
#include "dirty.h"
#include "maps.h"

#define L2_PINNED     (L2_F_STATIC | L2_F_LOCATION)
#define L2_REFRESH_NS 1000000000ULL /* `seen` is written at most once a second */
#define L2_AWAY_SHIFT 20            /* `away` counts ktime in 2^20 ns, about a millisecond */
#define L2_AWAY_GRACE 128           /* of these, for frames that were under way when the network turned */

/* The two MACs at the head of a frame. Returns 0, or -1 when the frame has no Ethernet header. */
static __always_inline int l2_macs(struct __sk_buff *skb, struct ethhdr *eth)
{
	void *data, *end;

	asm volatile("" : "+r"(skb)); /* or the compiler keeps pointers from before a clone or a tag */
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (data + sizeof(*eth) > end)
		return -1;
	__builtin_memcpy(eth, data, sizeof(*eth));
	return 0;
}

static __always_inline int mac_equal(const __u8 a[6], const __u8 b[6])
{
	return !__builtin_memcmp(a, b, 6);
}

static __always_inline int mac_is_group(const __u8 mac[6])
{
	return mac[0] & 1;
}

/* IEEE 802.1Q, 8.6.3: spanning tree, LACP, LLDP and the like end at the next bridge, which is this one. */
static __always_inline int mac_is_link_local(const __u8 mac[6])
{
	return mac[0] == 0x01 && mac[1] == 0x80 && mac[2] == 0xc2 && !mac[3] && !mac[4] && mac[5] < 0x10;
}

static __always_inline void l2_key_set(struct l2_key *key, __u32 network, const __u8 mac[6])
{
	key->network = network;
	__builtin_memcpy(key->mac, mac, sizeof(key->mac));
	key->pad = 0;
}

static __always_inline int l2_is_port(const struct l2_entry *entry, __u32 slot)
{
	return entry->kind == L2_PORT && entry->target == slot;
}

/* The entry is a port's own and changed: a migration of that port wants to know. */
static __always_inline void l2_mark_dirty(__u32 slot, const struct l2_key *key)
{
	struct ct_key changed = {.type = CT_TYPE_L2};

	__builtin_memcpy(changed.laddr, key->mac, sizeof(key->mac));
	changed.raddr[0] = key->network;
	mark_dirty(slot, &changed);
}

/* Writes the whole entry, so that a reader sees the old place or the new one. */
static __noinline int l2_move(const struct l2_key *key, const struct l2_entry *old, const struct l2_entry *place)
{
	struct l2_entry entry = *place;
	__u32 left = old && old->kind == L2_PORT ? old->target : 0;

	entry.seen = bpf_ktime_get_ns();
	entry.moves = old ? old->moves + 1 : 0;
	if (bpf_map_update_elem(&l2, key, &entry, BPF_ANY))
		return -1;
	if (left)
		l2_mark_dirty(left, key);
	if (entry.kind == L2_PORT && entry.target != left)
		l2_mark_dirty(entry.target, key);
	return 0;
}

/* True when learning has nothing to write: the entry is pinned, or it is there already and only its age is refreshed.
 */
static __always_inline int l2_known(struct l2_entry *entry, const struct l2_entry *place)
{
	__u64 now;

	if (entry->kind == place->kind && entry->target == place->target && entry->vlan == place->vlan) {
		now = bpf_ktime_get_coarse_ns();
		if (now - entry->seen > L2_REFRESH_NS)
			entry->seen = now;
		return 1;
	}
	return entry->flags & L2_PINNED;
}

/*
 * May one more MAC be learned behind an uplink or a host? Who floods a network with sources that he invents takes the
 * place of neither VMs nor other networks. Counts it; ageing corrects.
 */
static __always_inline int l2_room(__u32 network)
{
	__u32 zero = 0;
	struct learning *own = bpf_map_lookup_elem(&learning, &network);
	struct learning *all = bpf_map_lookup_elem(&learning, &zero);

	if (!own || !all)
		return 0;
	if ((own->max && READ_ONCE(own->count) >= own->max) || (all->max && READ_ONCE(all->count) >= all->max))
		return 0;
	__sync_fetch_and_add(&own->count, 1);
	__sync_fetch_and_add(&all->count, 1);
	return 1;
}

/* A VM that has left sends from elsewhere in its network, which therefore knows its new place, as far as this host. */
static __always_inline void l2_note_away(struct l2_entry *entry)
{
	struct port *port = bpf_map_lookup_elem(&ports, &entry->target);

	if (!entry->away && port && GATE_TARGET(READ_ONCE(port->gate)) == GATE_REDIRECT)
		entry->away = (bpf_ktime_get_coarse_ns() >> L2_AWAY_SHIFT) | 1;
}

/*
 * Is a frame for this MAC that comes in by an uplink one that its network floods? It would have taken any other to the
 * MAC's new place, where this one arrives by itself as well: whoever sends it on doubles it.
 */
static __always_inline int l2_is_stray(const struct l2_entry *entry)
{
	return entry->away && (__u32)(bpf_ktime_get_coarse_ns() >> L2_AWAY_SHIFT) - entry->away > L2_AWAY_GRACE;
}

/* Learns that a MAC is behind an uplink or a host. Without room it stays unknown: frames for it are flooded. */
static __noinline void l2_learn(__u32 network, const __u8 mac[6], __u8 kind, __u32 target)
{
	struct l2_entry place = {.kind = kind, .target = target}, *entry;
	struct l2_key key;

	if (mac_is_group(mac))
		return;
	l2_key_set(&key, network, mac);
	entry = bpf_map_lookup_elem(&l2, &key);
	if (entry && entry->kind == L2_PORT && kind == L2_UPLINK)
		l2_note_away(entry);
	if (entry ? l2_known(entry, &place) : !l2_room(network))
		return;
	l2_move(&key, entry, &place);
}

/* Learns that a MAC is behind a port (on `vlan` of a trunk). Returns enum drop_reason: DROP_LEARN_LIMIT when the port
 * may learn no more. Not for the port's own MAC: that is pinned when the port opens. */
static __noinline int l2_learn_port(struct port *port, __u32 network, const __u8 mac[6], __u16 vlan)
{
	struct l2_entry place = {.kind = L2_PORT, .target = port->slot, .vlan = vlan}, *entry;
	struct l2_key key;

	l2_key_set(&key, network, mac);
	entry = bpf_map_lookup_elem(&l2, &key);
	if (entry && l2_known(entry, &place))
		return DROP_NONE;
	if (!entry || !l2_is_port(entry, port->slot)) {
		if (READ_ONCE(port->learned) >= port->learned_max)
			return DROP_LEARN_LIMIT;
		__sync_fetch_and_add(&port->learned, 1);
	}
	l2_move(&key, entry, &place);
	return DROP_NONE;
}

/* The VM is here: its own MAC leads to this port from now on, whatever said otherwise. */
static __noinline void l2_take(struct port *port, __u32 network, __u16 vlan)
{
	struct l2_entry place = {.kind = L2_PORT, .flags = L2_F_LOCATION, .target = port->slot, .vlan = vlan};
	struct l2_entry *entry;
	struct l2_key key;

	l2_key_set(&key, network, port->mac);
	entry = bpf_map_lookup_elem(&l2, &key);
	if (entry && entry->kind == L2_PORT && entry->target == port->slot && entry->flags & L2_F_LOCATION)
		return;
	if (entry && entry->flags & L2_F_STATIC)
		place.flags |= L2_F_STATIC;
	l2_move(&key, entry, &place);
}
