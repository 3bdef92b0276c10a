// SPDX-License-Identifier: GPL-2.0-only
/* What the agent does with connections whose flows are exported; called as the programs of control.bpf.c are. */
#include <linux/bpf.h>
#include <linux/errno.h>

#include "lib/batch.h"

#define END_TRIES 16

static long end_one(__u32 index, struct batch *batch)
{
	struct exchange *element = exchange_at(index);
	struct ct_entry *entry;
	struct ct_key key;

	if (!element)
		return 1;
	key = element->key;
	element->found = 0;
	for (int i = 0; i < END_TRIES; i++) { /* its state changes meanwhile */
		entry = bpf_map_lookup_elem(batch->table, &key);
		if (!entry)
			return 0;
		if (!ct_kill(batch->table, batch->slot, &key, entry, READ_ONCE(entry->word), FLOW_FORCED))
			continue;
		element->found = 1;
		batch->found++;
		return 0;
	}
	return 0;
}

/* struct ct_batch. Deletes the connections of the first `count` keys of `exchange` as a packet would: what was not
 * reported of them is kept. `found` of each says whether it was there, the context's how many were. The port is
 * ACTIVE. */
SEC("syscall")
int ct_end(struct ct_batch *context)
{
	return batch_run(context, end_one, 1);
}
