/* SPDX-License-Identifier: GPL-2.0-only */
/* What the agent asks of many connections of a port at once: struct ct_batch and the elements of `exchange`. */
#pragma once

#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "sweep.h"

struct batch { /* of callbacks; must lie on the stack */
	void *table;
	__u32 slot;
	__u32 found;
};

static __always_inline struct exchange *exchange_at(__u32 index)
{
	return bpf_map_lookup_elem(&exchange, &index);
}

/* Calls `one` for each of the first `count` elements. `active`: only in a port whose table changes. Returns what the
 * program returns. */
static __always_inline int batch_run(struct ct_batch *context, long (*one)(__u32, struct batch *), int active)
{
	struct batch batch = {.slot = context->slot};
	__u32 slot = context->slot;

	batch.table = bpf_map_lookup_elem(&conntracks, &slot);
	if (context->count > EXCHANGE_LENGTH)
		return -EINVAL;
	if (!batch.table)
		return -ENOENT;
	if (active && !sweep_port(slot))
		return -EBUSY;
	bpf_loop(context->count, one, &batch, 0);
	context->found = batch.found;
	return 0;
}
