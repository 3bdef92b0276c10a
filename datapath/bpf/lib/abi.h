/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Keeps in BTF what user space reads from it: clang leaves out a type that only constants or map templates use, and
 * macros altogether. A structure or enumeration that the agent needs is named in `abi`, a macro in `abi_constant`.
 */
#pragma once

#include "types.h"

/* user space drops the prefix */
enum abi_constant {
	ABI_REVISION = REVISION,
	ABI_SLOTS_DEFAULT = SLOTS_DEFAULT,
	ABI_NETWORKS_DEFAULT = NETWORKS_DEFAULT,
	ABI_HOSTS_DEFAULT = HOSTS_DEFAULT,
	ABI_FLOOD_MEMBERS = FLOOD_MEMBERS,
	ABI_MARK_REDIRECT = MARK_REDIRECT,
	ABI_MARK_JUDGED = MARK_JUDGED,
	ABI_MARK_PROBE = MARK_PROBE,
	ABI_MARK_LOCAL = MARK_LOCAL,
	ABI_MARK_HOPS = MARK_HOPS,
	ABI_MARK_COPY = MARK_COPY,
	ABI_MARK_COPY_PORT = MARK_COPY_PORT,
	ABI_MIRRORS_MAX = MIRRORS_MAX,
	ABI_HOPS_MAX = HOPS_MAX,
	ABI_SKB_MARK_JUDGED = SKB_MARK_JUDGED,
	ABI_EVENT_BYTES = EVENT_BYTES,
	ABI_SAMPLE_BYTES = SAMPLE_BYTES,
	ABI_EXCHANGE_LENGTH = EXCHANGE_LENGTH,
	ABI_HOLD_FRAMES = HOLD_FRAMES,
	ABI_QOS_SHIFT = QOS_SHIFT,
	ABI_QOS_CLASS = QOS_CLASS(0),
	ABI_WINDOW_NO_SCALE = WINDOW_NO_SCALE,
	ABI_WINDOW_NEXT_MASK = WINDOW_NEXT_MASK,
};

union abi {
	enum abi_constant constants;
	enum port_state port_state;
	enum port_flag port_flag;
	enum mirror_output mirror_output;
	enum port_feature port_feature;
	enum gate_target gate_target;
	enum remap_side remap_side;
	enum remap_flag remap_flag;
	struct remap_key remap_key;
	struct remap_entry remap_entry;
	enum timeout_index timeout_index;
	enum device_role device_role;
	enum network_kind network_kind;
	enum l2_kind l2_kind;
	enum l2_flag l2_flag;
	enum ct_state ct_state;
	enum ct_flag ct_flag;
	enum ct_type ct_type;
	enum fill fill;
	enum acl_direction acl_direction;
	enum acl_action acl_action;
	enum qos_flag qos_flag;
	enum drop_reason drop_reason;
	enum event_type event_type;
	struct port port;
	struct device device;
	struct network network;
	struct uplink_key uplink_key;
	struct trunk_key trunk_key;
	struct l2_key l2_key;
	struct l2_entry l2_entry;
	struct learning learning;
	struct host host;
	struct channel channel;
	struct member member;
	struct ct_key ct_key;
	struct ct_entry ct_entry;
	enum flow_reason flow_reason;
	struct flow_end flow_end;
	struct flow_report flow_report;
	struct flow_exporter flow_exporter;
	struct flow_lost flow_lost;
	struct acl_prefix acl_prefix;
	struct acl_interval acl_interval;
	struct acl_group acl_group;
	struct acl_shape acl_shape;
	struct acl_rule acl_rule;
	struct acl_label acl_label;
	struct hits_key hits_key;
	struct hits hits;
	enum window_flag window_flag;
	struct window_port window_port;
	struct mirror mirror;
	struct mirror_count mirror_count;
	struct mirror_name mirror_name;
	struct mirror_slots mirror_slots;
	struct qos qos;
	struct counters counters;
	struct event event;
	struct sampling sampling;
	struct sample sample;
	struct settings settings;
	struct exchange exchange;
	struct ct_batch ct_batch;
	struct ct_sweep ct_sweep;
	struct port_swap port_swap;
	struct port_held port_held;
} _abi __attribute__((unused));
