/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A full table gives up one connection that is unanswered or closing for a new one. The search is short, since it is
 * in the path of a packet: the agent keeps tables from filling with the program ct_early_drop.
 */
#pragma once

#include "ct.h"

#define EVICT_VISITS 128

/* Visits are counted from a number that the verifier does not know: from 0 it follows each of them, and whether it sees
 * that they end hangs on the compiler's choice of instructions. */
struct eviction {
	__u32 slot;
	__u32 first;
	__u32 visits;
	__u32 evicted;
};

static long evict_visit(void *table, struct ct_key *key, struct ct_entry *entry, struct eviction *eviction)
{
	__u64 word = READ_ONCE(entry->word);
	struct ct_key own;

	if (eviction->visits++ - eviction->first >= EVICT_VISITS)
		return 1;
	if (!ct_is_dispensable(key, word))
		return 0;
	own = *key; /* the element's memory is another's as soon as it is deleted */
	eviction->evicted = ct_kill(table, eviction->slot, &own, entry, word, FLOW_NO_ROOM);
	return eviction->evicted;
}

/* True when there is room for one more now. Counts in port->evicted. */
static __always_inline int evict_one(void *table, struct port *port)
{
	__u32 first = READ_ONCE(port->evicted);
	struct eviction eviction = {.slot = port->slot, .first = first, .visits = first};

	bpf_for_each_map_elem(table, evict_visit, &eviction, 0);
	if (eviction.evicted)
		__sync_fetch_and_add(&port->evicted, 1);
	return eviction.evicted;
}
