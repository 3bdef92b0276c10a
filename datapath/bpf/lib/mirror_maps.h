/* SPDX-License-Identifier: GPL-2.0-only */
/* Maps of mirrors (mirror.h). */
#pragma once

#include "maps.h"

struct { /* MIRROR_KEY -> mirror */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MIRRORS_MAX *SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct mirror);
	PINNED;
} mirrors SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MIRRORS_MAX *SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct mirror_count);
	PINNED;
} mirror_counts SEC(".maps");

struct { /* ports of this host that take copies, by what a copy from elsewhere says */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mirror_name);
	__type(value, struct mirror_slots);
	PINNED;
} mirror_ports SEC(".maps");

struct { /* one element: ifindex of the device whose egress program cuts copies, 0 none */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	PINNED;
} mirror_cutter SEC(".maps");
