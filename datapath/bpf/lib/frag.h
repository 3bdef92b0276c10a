/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Fragments (RFC 791, RFC 8200): the first one is judged as a packet and leaves a record of its ports; later ones
 * follow the connection that the record names. A later fragment that overtakes its first is dropped: holding it would
 * need memory that a stranger could fill.
 */
#pragma once

#include "track.h"

static __always_inline void fragment_key(struct ct_key *key, const struct packet *pkt, __u32 direction)
{
	addr_copy(key->laddr, pkt->laddr);
	addr_copy(key->raddr, pkt->raddr);
	key->lport = bpf_htons(pkt->fragment_id >> 16);
	key->rport = bpf_htons(pkt->fragment_id);
	key->proto = pkt->proto;
	key->type = CT_TYPE_FRAGMENT;
	key->from = direction == FROM_GUEST;
	key->pad = 0;
}

/* Ports as they are on the wire, in one word */
static __always_inline __u32 fragment_ports(const struct packet *pkt)
{
	return (__u32)bpf_ntohs(pkt->lport) << 16 | bpf_ntohs(pkt->rport);
}

/* After a first fragment passed: leaves its record, or refreshes the one of an earlier packet with the same id. A table
 * that is full costs the later fragments, not this one. */
static __noinline void fragment_record(struct tracking *t)
{
	__u32 ports = fragment_ports(t->pkt), zero = 0;
	struct ct_entry *entry;
	__u64 word;

	fragment_key(&t->key, t->pkt, t->direction);
	entry = bpf_map_lookup_elem(t->table, &t->key);
	if (entry) {
		word = READ_ONCE(entry->word);
		WRITE_ONCE(entry->seen, t->now);
		WRITE_ONCE(entry->mark, ports);
		if (!ct_is_live(word) &&
		    (CT_FLAGS(word) & CT_F_DEAD || !cas(&entry->word, word, CT_WORD(CT_NEW, 0, word >> 32))))
			return;
		mark_dirty(t->slot, &t->key);
		return;
	}
	entry = bpf_map_lookup_elem(&ct_scratch, &zero);
	if (!entry)
		return;
	__builtin_memset(entry, 0, sizeof(*entry));
	entry->id = ct_new_id();
	entry->word = CT_WORD(CT_NEW, 0, entry->id);
	entry->seen = t->now;
	entry->mark = ports;
	if (!bpf_map_update_elem(t->table, &t->key, entry, BPF_NOEXIST))
		mark_dirty(t->slot, &t->key);
}

/* A later fragment: passes with the connection of its first. Sets the packet's ports. Returns enum drop_reason. */
static __noinline int fragment_follow(struct tracking *t)
{
	struct ct_entry *entry;
	__u64 word;
	int reason;

	fragment_key(&t->key, t->pkt, t->direction);
	entry = bpf_map_lookup_elem(t->table, &t->key);
	if (!entry || !ct_is_live(READ_ONCE(entry->word)))
		return DROP_FRAGMENT;
	if (READ_ONCE(entry->seen) + t->port->timeouts[TIMEOUT_FRAGMENT] * 1000000ull < t->now)
		return DROP_FRAGMENT; /* ids come back: an old record must not name the ports of a new packet */
	t->pkt->lport = bpf_htons(READ_ONCE(entry->mark) >> 16);
	t->pkt->rport = bpf_htons(READ_ONCE(entry->mark));
	if (t->pkt->group)
		return DROP_NONE; /* its first was judged without a connection */
	ct_key_of(&t->key, t->pkt);
	entry = bpf_map_lookup_elem(t->table, &t->key);
	word = entry ? READ_ONCE(entry->word) : 0;
	if (!entry || !ct_is_live(word))
		return DROP_FRAGMENT;
	reason = track_allowed(t, entry, word);
	if (reason)
		return reason;
	return ct_touch(t->slot, &t->key, entry, word, t->now, t->pkt, t->direction);
}
