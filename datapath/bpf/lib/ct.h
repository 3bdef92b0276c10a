/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Entries of a port's connection table.
 *
 * State, flags and generation are one word changed by cmpxchg only; `seen` and counters are not part of it. Memory of a
 * deleted entry is reused at once for another key: whoever holds one looks at the word again after the last write.
 * An entry that is DYING or DEAD is absent. DYING may be revived by cmpxchg; DEAD belongs to the one who set it, who
 * deletes it.
 */
#pragma once

#include "dirty.h"
#include "flow.h"
#include "packet.h"
#include "tcp.h"

#define CT_ABSENT          (CT_F_DYING | CT_F_DEAD)
#define CT_WORD_FLAG(flag) CT_WORD(0, flag, 0)

static __always_inline int ct_is_live(__u64 word)
{
	return !(CT_FLAGS(word) & CT_ABSENT);
}

/* Port time at `ktime`. The coarse clock may lie a tick before a base that was taken from the exact one. */
static __always_inline __u64 ct_time(const struct port *port, __u64 ktime)
{
	__s64 time = ktime - port->time_base;

	return time > 0 ? time : 0;
}

static __always_inline __u64 ct_new_id(void)
{
	return (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
}

static __always_inline void ct_key_of(struct ct_key *key, const struct packet *pkt)
{
	addr_copy(key->laddr, pkt->laddr);
	addr_copy(key->raddr, pkt->raddr);
	key->lport = pkt->lport;
	key->rport = pkt->rport;
	key->proto = pkt->proto;
	key->type = CT_TYPE_CONNECTION;
	key->from = 0;
	key->pad = 0;
}

/* Index in port.timeouts */
static __always_inline __u32 ct_timeout_index(const struct ct_key *key, __u64 word)
{
	if (key->type == CT_TYPE_FRAGMENT)
		return TIMEOUT_FRAGMENT;
	if (key->proto == IPPROTO_TCP)
		return CT_STATE(word) < TCP_STATES ? CT_STATE(word) : CT_CLOSE;
	if (key->proto == IPPROTO_UDP)
		return CT_STATE(word) == CT_REPLIED ? TIMEOUT_UDP_STREAM : TIMEOUT_UDP;
	if (key->proto == IPPROTO_ICMP || key->proto == IPPROTO_ICMPV6)
		return TIMEOUT_ICMP;
	return TIMEOUT_OTHER;
}

/* May be given up for a new connection: unanswered, or on its way out. Fragment records are unanswered. */
static __always_inline int ct_is_dispensable(const struct ct_key *key, __u64 word)
{
	__u8 state = CT_STATE(word);

	if (!(CT_FLAGS(word) & CT_F_REPLIED))
		return 1;
	return key->proto == IPPROTO_TCP && state >= CT_FIN_WAIT && state <= CT_CLOSE;
}

/* Takes an entry out of the table for good. `key` must not lie in the entry. False: another CPU changed it first. */
static __always_inline int ct_kill(void *table, __u32 slot, const struct ct_key *key, struct ct_entry *entry,
				   __u64 word, enum flow_reason reason)
{
	if (CT_FLAGS(word) & CT_F_DEAD || !cas(&entry->word, word, word | CT_WORD_FLAG(CT_F_DEAD)))
		return 0;
	flow_end_now(slot, key, entry, reason);
	bpf_map_delete_elem(table, key);
	mark_dirty(slot, key);
	return 1;
}

#define CT_KEEP_TRIES 4 /* expiry changes its mind once; the rest is for a change of state by another packet */

/* After `seen` was set: takes back what expiry did meanwhile. Returns DROP_NONE, or DROP_CT_RACE when the entry has
 * gone or is another's. */
static __always_inline int ct_keep(__u32 slot, const struct ct_key *key, struct ct_entry *entry, __u64 word)
{
	__u64 current;

	for (int i = 0; i < CT_KEEP_TRIES; i++) {
		current = READ_ONCE(entry->word);
		if (current >> 32 != word >> 32 || CT_FLAGS(current) & CT_F_DEAD)
			return DROP_CT_RACE;
		if (!(CT_FLAGS(current) & CT_F_DYING))
			return DROP_NONE;
		if (cas(&entry->word, current, current & ~CT_WORD_FLAG(CT_F_DYING))) {
			mark_dirty(slot, key);
			return DROP_NONE;
		}
	}
	return DROP_CT_RACE;
}

/*
 * Counts a packet on a live entry and refreshes it. Expiry sets DYING and then looks at `seen` again; this sets `seen`
 * and then looks for DYING (the fetching add in between is a full barrier), so one of the two sees the other.
 * Returns DROP_NONE, or DROP_CT_RACE when the entry is none of this connection any more.
 */
static __always_inline int ct_touch(__u32 slot, const struct ct_key *key, struct ct_entry *entry, __u64 word, __u64 now,
				    const struct packet *pkt, int direction)
{
	__u64 *packets = direction ? &entry->packets[1] : &entry->packets[0];
	__u64 *bytes = direction ? &entry->bytes[1] : &entry->bytes[0];

	if (READ_ONCE(entry->seen) < now)
		WRITE_ONCE(entry->seen, now);
	__sync_fetch_and_add(bytes, pkt->wire_bytes);
	if (__sync_fetch_and_add(packets, pkt->wire_packets) == ~0ull)
		return DROP_CT_RACE; /* never; keeps the add a fetching one */
	return ct_keep(slot, key, entry, word);
}

/* State and flags, as CT_WORD without id, of the connection that this packet begins; 0 when it cannot begin one. */
static __always_inline __u64 ct_opening(const struct packet *pkt)
{
	if (pkt->proto == IPPROTO_TCP)
		return tcp_kind_of(pkt->tcp_flags) == TCP_KIND_SYN ? CT_SYN_SENT : 0;
	if (pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6)
		return icmp_query_kind(pkt->proto, pkt->icmp_type) == ICMP_QUERY_REQUEST ? CT_NEW : 0;
	return CT_NEW;
}

#define CT_NEXT_INVALID 0
#define CT_NEXT_REOPENS (~0ull) /* a SYN on a connection that is over */

/* The word of a live connection after this packet, or CT_NEXT_*. */
static __always_inline __u64 ct_next(__u64 word, const struct packet *pkt, int direction)
{
	__u8 state = CT_STATE(word), flags = CT_FLAGS(word), next = state;
	__u32 reply = !!(flags & CT_F_INBOUND) != !!direction;

	if (pkt->proto == IPPROTO_TCP) {
		next = tcp_step(state, pkt->tcp_flags, reply);
		if (next == TCP_INVALID)
			return CT_NEXT_INVALID;
		if (next == CT_SYN_SENT && state >= CT_TIME_WAIT)
			return CT_NEXT_REOPENS;
		if (next == TCP_IGNORE)
			next = state;
		flags |= reply ? CT_F_REPLIED : 0;
		if (next == CT_ESTABLISHED && (state == CT_SYN_RECV || state == CT_ESTABLISHED) && flags & CT_F_REPLIED)
			flags |= CT_F_ASSURED;
	} else if (reply) {
		next = CT_REPLIED;
		flags |= CT_F_REPLIED;
	} else if (pkt->proto == IPPROTO_UDP && flags & CT_F_REPLIED) {
		flags |= CT_F_ASSURED; /* asked, answered, and asked again: a stream */
	}
	return CT_WORD(next, flags, word >> 32);
}
