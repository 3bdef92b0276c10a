/* SPDX-License-Identifier: GPL-2.0-only */
/* How often something may be done: GCRA in one word, the time at which the next one is due (ITU-T I.371, annex A). */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"

/* True when one more may be done now: one each `interval`, and as many at once as fit into `burst`. Who loses the race
 * for the last one is refused. */
static __always_inline int limit_take(__u64 *due, __u64 interval, __u64 burst)
{
	__u64 now = bpf_ktime_get_ns(), old = READ_ONCE(*due), from = old > now ? old : now;

	if (from - now > burst)
		return 0;
	return cas(due, old, from + interval);
}
