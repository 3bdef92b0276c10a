// SPDX-License-Identifier: GPL-2.0-only
/* What the agent does with connections whose flows are exported; called as the programs of control.bpf.c are. */
#include <linux/bpf.h>
#include <linux/errno.h>

#include "lib/sweep.h"

#define END_TRIES 16

struct ending { /* of the callback; must lie on the stack */
	void *table;
	__u32 slot;
	__u32 found;
};

static long end_one(__u32 index, struct ending *ending)
{
	struct exchange *element = bpf_map_lookup_elem(&exchange, &index);
	struct ct_entry *entry;
	struct ct_key key;

	if (!element)
		return 1;
	key = element->key;
	element->found = 0;
	for (int i = 0; i < END_TRIES; i++) { /* its state changes meanwhile */
		entry = bpf_map_lookup_elem(ending->table, &key);
		if (!entry)
			return 0;
		if (!ct_kill(ending->table, ending->slot, &key, entry, READ_ONCE(entry->word), FLOW_FORCED))
			continue;
		element->found = 1;
		ending->found++;
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
	struct ending ending = {.slot = context->slot};
	__u32 slot = context->slot;

	ending.table = bpf_map_lookup_elem(&conntracks, &slot);
	if (context->count > EXCHANGE_LENGTH)
		return -EINVAL;
	if (!ending.table)
		return -ENOENT;
	if (!sweep_port(slot))
		return -EBUSY;
	bpf_loop(context->count, end_one, &ending, 0);
	context->found = ending.found;
	return 0;
}
