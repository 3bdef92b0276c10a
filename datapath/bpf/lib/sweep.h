/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Walks over a port's whole connection table, from control programs only.
 *
 * An element is deleted when the walk stands on the next one: its memory may be reused at once for a key of another
 * bucket, and the walk would go on there.
 */
#pragma once

#include "ct.h"

enum sweep_kind { /* and how the flows end that it ends */
		  SWEEP_EXPIRE = FLOW_IDLE,
		  SWEEP_FLUSH = FLOW_FORCED,
		  SWEEP_EARLY_DROP = FLOW_NO_ROOM,
};

struct sweep { /* on the stack of sweep_run() */
	struct port *port;
	__u64 now;
	__u64 floor;
	__u32 slot;
	__u32 kind;
	__u32 limit;
	__u32 behind; /* `doomed` is still to be deleted */
	struct ct_key doomed;
	struct ct_key match;
	__u64 visited, live, marked, revived, deleted, fragments;
	__u64 states[CT_STATES];
};

static __always_inline int sweep_may(const struct port *port)
{
	return PORT_STATE(READ_ONCE(port->word)) == PORT_ACTIVE;
}

/* The port if it is ACTIVE */
static __always_inline struct port *sweep_port(__u32 slot)
{
	struct port *port = bpf_map_lookup_elem(&ports, &slot);

	return port && sweep_may(port) ? port : NULL;
}

static __always_inline void sweep_delete(void *table, struct sweep *sweep)
{
	if (!sweep->behind)
		return;
	bpf_map_delete_elem(table, &sweep->doomed);
	mark_dirty(sweep->slot, &sweep->doomed);
	sweep->behind = 0;
	sweep->deleted++;
}

/* The entry is absent from now on and goes when the walk has left it. Not while its last counts have no place. */
static __always_inline void sweep_doom(struct sweep *sweep, const struct ct_key *key, struct ct_entry *entry,
				       __u64 word)
{
	__u64 dead = word | CT_WORD_FLAG(CT_F_DEAD);

	if (CT_FLAGS(word) & CT_F_DEAD || !cas(&entry->word, word, dead))
		return;
	sweep->doomed = *key;
	if (flow_end(sweep->slot, &sweep->doomed, entry, sweep->kind))
		sweep->behind = 1;
	else
		cas(&entry->word, dead, word); /* it goes when there is room for its counts */
}

static __always_inline int sweep_is_old(struct sweep *sweep, const struct ct_key *key, struct ct_entry *entry,
					__u64 word)
{
	__u32 index = ct_timeout_index(key, word);
	__u64 since = READ_ONCE(entry->seen);

	if (index >= TIMEOUT_MAX)
		return 0;
	if (since < sweep->floor)
		since = sweep->floor;
	return since + sweep->port->timeouts[index] * 1000000ull < sweep->now;
}

static __always_inline void sweep_change(struct sweep *sweep, const struct ct_key *key)
{
	struct ct_key own = *key;

	mark_dirty(sweep->slot, &own);
}

/* First pass. The cmpxchg is a full barrier: a packet that refreshed the entry before it is seen here, one that comes
 * after it finds DYING (ct_touch). */
static __always_inline void sweep_mark(struct sweep *sweep, const struct ct_key *key, struct ct_entry *entry,
				       __u64 word)
{
	__u64 dying = word | CT_WORD_FLAG(CT_F_DYING);

	if (!cas(&entry->word, word, dying))
		return;
	if (sweep_is_old(sweep, key, entry, word))
		sweep->marked++;
	else
		cas(&entry->word, dying, word); /* or the packet itself has revived it */
	sweep_change(sweep, key);
}

static __always_inline void sweep_expire(struct sweep *sweep, const struct ct_key *key, struct ct_entry *entry,
					 __u64 word)
{
	if (ct_is_live(word)) {
		if (sweep_is_old(sweep, key, entry, word))
			sweep_mark(sweep, key, entry, word);
		return;
	}
	if (!sweep_is_old(sweep, key, entry, word)) {
		if (cas(&entry->word, word, word & ~CT_WORD_FLAG(CT_F_DYING))) {
			sweep->revived++;
			sweep_change(sweep, key);
		}
		return;
	}
	if (!(PORT_FLAGS(READ_ONCE(sweep->port->word)) & PORT_F_UNSETTLED))
		sweep_doom(sweep, key, entry, word);
}

#define SWEEP_MATCHES(field) (!sweep->match.field || sweep->match.field == key->field)

static __always_inline int sweep_matches(struct sweep *sweep, const struct ct_key *key)
{
	for (int i = 0; i < 4; i++) {
		if (!SWEEP_MATCHES(laddr[i]) || !SWEEP_MATCHES(raddr[i]))
			return 0;
	}
	return SWEEP_MATCHES(lport) && SWEEP_MATCHES(rport) && SWEEP_MATCHES(proto) && sweep->match.type == key->type;
}

static __always_inline void sweep_count(struct sweep *sweep, const struct ct_key *key, __u64 word)
{
	__u64 state = CT_STATE(word);

	if (!ct_is_live(word))
		return;
	if (key->type == CT_TYPE_FRAGMENT) {
		sweep->fragments++;
		return;
	}
	sweep->live++;
	asm volatile("" : "+r"(state)); /* the verifier must see that what is checked is what is used */
	if (state < CT_STATES)
		sweep->states[state]++;
}

static long sweep_visit(void *table, struct ct_key *key, struct ct_entry *entry, struct sweep *sweep)
{
	__u64 word = READ_ONCE(entry->word);

	sweep_delete(table, sweep);
	if (!sweep_may(sweep->port)) /* a walk is long, a switchover short */
		return 1;
	sweep->visited++;
	if (CT_FLAGS(word) & CT_F_DEAD)
		return 0;
	if (sweep->kind == SWEEP_EXPIRE)
		sweep_expire(sweep, key, entry, word);
	else if (sweep->kind == SWEEP_FLUSH ? sweep_matches(sweep, key)
					    : ct_is_dispensable(key, word) || !ct_is_live(word))
		sweep_doom(sweep, key, entry, word);
	sweep_count(sweep, key, READ_ONCE(entry->word));
	return sweep->kind == SWEEP_EARLY_DROP && sweep->deleted + sweep->behind >= sweep->limit;
}

/* Returns 0 or a negative errno, see control.bpf.c. */
static __always_inline int sweep_run(struct ct_sweep *context, enum sweep_kind kind)
{
	struct sweep sweep = {.slot = context->slot, .kind = kind, .limit = context->limit, .match = context->match};
	void *table;

	sweep.port = sweep_port(sweep.slot);
	if (!sweep.port)
		return -EBUSY;
	table = bpf_map_lookup_elem(&conntracks, &sweep.slot);
	if (!table)
		return -ENOENT;
	sweep.now = context->now ?: ct_time(sweep.port, bpf_ktime_get_ns());
	sweep.floor = READ_ONCE(sweep.port->time_floor);
	if (kind != SWEEP_EARLY_DROP || sweep.limit)
		bpf_for_each_map_elem(table, sweep_visit, &sweep, 0);
	sweep_delete(table, &sweep);
	context->visited = sweep.visited;
	context->live = sweep.live;
	context->marked = sweep.marked;
	context->revived = sweep.revived;
	context->deleted = sweep.deleted;
	context->fragments = sweep.fragments;
	for (int i = 0; i < CT_STATES; i++)
		context->states[i] = sweep.states[i];
	return sweep_may(sweep.port) ? 0 : -EBUSY;
}
