// SPDX-License-Identifier: GPL-2.0-only
/* What the agent does with the windows of connections; called as the programs of control.bpf.c are. */
#include <linux/bpf.h>
#include <linux/errno.h>

#include "lib/sweep.h"

static long window_forget(void *table, struct ct_key *key, struct ct_entry *entry, struct ct_batch *batch)
{
	if (READ_ONCE(entry->window))
		batch->found++;
	WRITE_ONCE(entry->window, 0);
	return 0;
}

/* struct ct_batch. Of no connection of the port is a window known any more: they were not followed for a while.
 * `found`: of how many one was. Works in every state of the port, while no packet is checked. */
SEC("syscall")
int ct_forget_windows(struct ct_batch *context)
{
	struct ct_batch batch = {};
	__u32 slot = context->slot;
	void *table = bpf_map_lookup_elem(&conntracks, &slot);

	if (!table)
		return -ENOENT;
	bpf_for_each_map_elem(table, window_forget, &batch, 0);
	context->found = batch.found;
	return 0;
}
