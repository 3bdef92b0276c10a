/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every map of the switch. All are pinned by name, so that programs can be replaced and the agent restarted while
 * frames flow. Tables of one port hang off an array of maps by its slot: a purge is one delete, a dump costs what that
 * port has.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "types.h"

#define PINNED __uint(pinning, LIBBPF_PIN_BY_NAME)

/* The agent maps it into its memory: a state or a gate flips by one aligned 8-byte store. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct port);
	PINNED;
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4 * SLOTS_DEFAULT);
	__type(key, __u32);
	__type(value, struct device);
	PINNED;
} devices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SLOTS_DEFAULT);
	__type(key, __u32);
	__type(value, struct counters);
	PINNED;
} counters SEC(".maps");

/* Addresses that a port may use: {slot, address} -> 1. */
struct address_key {
	__u32 slot;
	__be32 addr[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64 * SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address_key);
	__type(value, __u32);
	PINNED;
} addresses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, NETWORKS_DEFAULT);
	__type(key, __u32);
	__type(value, struct network);
	PINNED;
} networks SEC(".maps");

struct { /* {uplink, VLAN id} -> network */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, NETWORKS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct uplink_key);
	__type(value, __u32);
	PINNED;
} uplinks SEC(".maps");

struct { /* VNI -> network */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, NETWORKS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u32);
	PINNED;
} vnis SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16 * SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct trunk_key);
	__type(value, __u32);
	PINNED;
} trunks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct l2_key);
	__type(value, struct l2_entry);
	PINNED;
} l2 SEC(".maps");

struct { /* by network; 0 all networks together */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, NETWORKS_DEFAULT);
	__type(key, __u32);
	__type(value, struct learning);
	PINNED;
} learning SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HOSTS_DEFAULT);
	__type(key, __u32);
	__type(value, struct host);
	PINNED;
} hosts SEC(".maps");

struct { /* underlay address -> index in hosts */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HOSTS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct host);
	__type(value, __u32);
	PINNED;
} host_index SEC(".maps");

struct { /* tunnel id -> redirect that ends here */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4 * SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct channel);
	PINNED;
} channels SEC(".maps");

struct flood_list {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOOD_MEMBERS);
	__type(key, __u32);
	__type(value, struct member);
} flood_list SEC(".maps");

struct { /* network -> members */
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, NETWORKS_DEFAULT);
	__type(key, __u32);
	PINNED;
	__array(values, struct flood_list);
} floods SEC(".maps");

/* clang emits only a forward type for structures that are used in a map template alone */
struct ct_key _ct_key __attribute__((unused));
struct ct_entry _ct_entry __attribute__((unused));

struct ct_table {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
} ct_table SEC(".maps");

struct { /* slot -> connection table */
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, SLOTS_DEFAULT);
	__type(key, __u32);
	PINNED;
	__array(values, struct ct_table);
} conntracks SEC(".maps");

struct dirty_set {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ct_key);
	__type(value, __u32);
} dirty_set SEC(".maps");

struct { /* slot -> keys that changed since the last drain; empty while no migration tracks the port */
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, SLOTS_DEFAULT);
	__type(key, __u32);
	PINNED;
	__array(values, struct dirty_set);
} dirty SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4 * SLOTS_DEFAULT);
	__type(key, __u32);
	__type(value, __u64); /* POLICY_WORD */
	PINNED;
} policies SEC(".maps");

struct acl_prefix _acl_prefix __attribute__((unused));

struct acl_trie {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct acl_prefix);
	__type(value, __u32);
} acl_trie SEC(".maps");

struct acl_line {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_INNER_MAP);
	__type(key, __u32);
	__type(value, struct acl_interval);
} acl_line SEC(".maps");

struct acl_matrix {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_INNER_MAP);
	__type(key, __u32);
	__type(value, struct acl_group);
} acl_matrix SEC(".maps");

struct acl_list {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_INNER_MAP);
	__type(key, __u32);
	__type(value, struct acl_rule);
} acl_list SEC(".maps");

struct acl_label_list {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_INNER_MAP);
	__type(key, __u32);
	__type(value, struct acl_label);
} acl_label_list SEC(".maps");

#define BY_GENERATION(name, table)                                                                                     \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);                                                               \
		__uint(max_entries, 8 * SLOTS_DEFAULT);                                                                \
		__type(key, __u32);                                                                                    \
		PINNED;                                                                                                \
		__array(values, struct table);                                                                         \
	} name SEC(".maps")

BY_GENERATION(acl_tries, acl_trie);
BY_GENERATION(acl_lines, acl_line);
BY_GENERATION(acl_rows, acl_matrix);
BY_GENERATION(acl_rules, acl_list);
BY_GENERATION(acl_labels, acl_label_list); /* of those policies whose rules speak of mark or label */

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct hits_key);
	__type(value, struct hits);
	PINNED;
} rule_hits SEC(".maps");

struct { /* slot * 2 + direction. The agent maps it into its memory: fields change one by one, `due` goes on */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2 * SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct qos);
	PINNED;
} qos SEC(".maps");

struct { /* by slot. The agent maps it into its memory */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct window_port);
	PINNED;
} windows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
	PINNED;
} events SEC(".maps");

/* Keys in, entries out for ct_read; records in for ct_settle and ct_fill. One user at a time: the agent locks. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EXCHANGE_LENGTH);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct exchange);
	PINNED;
} exchange SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
	PINNED;
} settings SEC(".maps");
