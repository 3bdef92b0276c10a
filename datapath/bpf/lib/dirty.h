/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Change tracking: whoever changed an entry of a port's tables sets its key here, after the write. A drain takes the
 * keys and reads the current values, so two CPUs that change one entry need no common order. Nothing is written while
 * no set is linked for the port.
 */
#pragma once

#include <linux/errno.h>

#include "atomic.h"
#include "maps.h"

/* The set could not take a key: whoever drains must dump the whole table again. */
static __always_inline void dirty_overflow(__u32 slot)
{
	struct port *port = bpf_map_lookup_elem(&ports, &slot);

	if (port && !(PORT_FLAGS(READ_ONCE(port->word)) & PORT_F_OVERFLOW))
		__sync_fetch_and_or(&port->word, PORT_WORD(0, PORT_F_OVERFLOW, 0));
}

/* `key` is one of the connection table, or of another table by its `type` (enum ct_type). */
static __noinline void mark_dirty(__u32 slot, const struct ct_key *key)
{
	void *set = bpf_map_lookup_elem(&dirty, &slot);
	__u32 one = 1;
	long error;

	if (!set)
		return;
	error = bpf_map_update_elem(set, key, &one, BPF_NOEXIST);
	if (error && error != -EEXIST)
		dirty_overflow(slot);
}
