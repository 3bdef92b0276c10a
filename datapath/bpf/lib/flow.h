/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What an exporter of flows needs of connections: the TCP flags that were seen, and the last counts of each that ends.
 *
 * Whoever takes a connection out of its table makes it DEAD, then hands it over here, then deletes it: counts that a
 * passing packet adds come before DEAD (ct_touch), so they are complete. The agent reports and forgets what is in the
 * table of the ended. Where that is full a sweep lets the connection wait; what a packet ends is counted as lost.
 */
#pragma once

#include "atomic.h"
#include "maps.h"
#include "packet.h"

struct flow_end _flow_end __attribute__((unused));
struct flow_report _flow_report __attribute__((unused));

struct flow_end_table {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct flow_end);
	__type(value, struct ct_entry);
} flow_end_table SEC(".maps");

struct { /* slot -> connections that have ended and are not reported; empty while the port exports no flows */
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, SLOTS_DEFAULT);
	__type(key, __u32);
	PINNED;
	__array(values, struct flow_end_table);
} flow_ends SEC(".maps");

struct flow_report_table {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct flow_report);
} flow_report_table SEC(".maps");

struct { /* slot -> what was reported, by connection id; no program looks at it: it is here to outlive the agent */
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, SLOTS_DEFAULT);
	__type(key, __u32);
	PINNED;
	__array(values, struct flow_report_table);
} flow_reports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS_DEFAULT);
	__type(key, __u32);
	__type(value, struct flow_exporter);
	PINNED;
} flow_exporters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS_DEFAULT);
	__type(key, __u32);
	__type(value, struct flow_lost);
	PINNED;
} flow_lost SEC(".maps");

static __always_inline int flow_exported(const struct port *port)
{
	return READ_ONCE(port->features) & FEATURE_EXPORT;
}

/* Notes the flags of a TCP segment; before its connection is counted, so that they are there when it ends. */
static __always_inline void flow_note(struct ct_entry *entry, const struct packet *pkt, int direction)
{
	__u32 flags = (__u32)pkt->tcp_flags << (direction ? 8 : 0);

	if (flags & ~READ_ONCE(entry->tcp_flags))
		__sync_fetch_and_or(&entry->tcp_flags, flags);
}

/* `entry` is DEAD and the caller's. True when its counts are kept, or nobody wants them. */
static __noinline int flow_end(__u32 slot, const struct ct_key *key, struct ct_entry *entry, __u32 reason)
{
	struct port *port = bpf_map_lookup_elem(&ports, &slot);
	struct flow_end end = {.reason = reason};
	void *table;

	if (!port || !entry || !flow_exported(port) || key->type != CT_TYPE_CONNECTION)
		return 1;
	table = bpf_map_lookup_elem(&flow_ends, &slot);
	end.id = entry->id;
	end.key = *key;
	return table && !bpf_map_update_elem(table, &end, entry, BPF_ANY);
}

/* The same where the connection goes whether its counts are kept or not. */
static __always_inline void flow_end_now(__u32 slot, const struct ct_key *key, struct ct_entry *entry, __u32 reason)
{
	struct flow_lost *lost;

	if (flow_end(slot, key, entry, reason))
		return;
	lost = bpf_map_lookup_elem(&flow_lost, &slot);
	if (!lost)
		return;
	__sync_fetch_and_add(&lost->flows, 1);
	__sync_fetch_and_add(&lost->packets, entry->packets[0] + entry->packets[1]);
	__sync_fetch_and_add(&lost->bytes, entry->bytes[0] + entry->bytes[1]);
}
