/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's coarse clock, read once a tick: between two ticks it stands, and asking costs as much as a look-up. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct clock {
	__u64 tick;
	__u64 ktime;
};

struct { /* one element */
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct clock);
} clocks SEC(".maps");

/* ktime, at most a tick older than bpf_ktime_get_coarse_ns(). */
static __always_inline __u64 clock_coarse(void)
{
	__u64 tick = bpf_jiffies64();
	__u32 zero = 0;
	struct clock *clock = bpf_map_lookup_elem(&clocks, &zero);

	if (!clock)
		return bpf_ktime_get_coarse_ns();
	if (clock->tick != tick) {
		clock->tick = tick;
		clock->ktime = bpf_ktime_get_coarse_ns();
	}
	return clock->ktime;
}
