/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Mark and label of connections. A rule may ask for them, and may give them to a connection that it lets in; what a
 * connection has it keeps until an operator changes it, and shows to the rules whenever it is judged again. One that
 * begins has neither.
 *
 * Nothing here is called for a policy whose rules do not speak of either, nor for a packet whose connection is not
 * judged: acl_judge() says when.
 */
#pragma once

#include "acl.h"

struct acl_label _acl_label __attribute__((unused));

struct labelling {       /* a judgement under way */
	__be64 label[2]; /* what the connection has, then what it is to have */
	__u32 mark;
	__u32 rank; /* of the rule that is looked at, then of the one that decides; ACL_NO_RULE or ACL_GONE */
	struct acl_place place;
};

struct { /* between the steps of it, on one CPU: packet programs do not nest there */
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct labelling);
} labelling SEC(".maps");

#define LABEL_STEPS (ACL_GROUPS_MAX * ACL_GROUP_RULES / 64 + LABEL_RULES_MAX + 1)

/* The connection that is judged again, NULL for one that begins: these are its mark and label. */
static __noinline void label_show(const struct ct_entry *entry)
{
	__u32 zero = 0;
	struct labelling *now = bpf_map_lookup_elem(&labelling, &zero);

	if (!now)
		return;
	now->mark = entry ? READ_ONCE(entry->mark) : 0;
	now->label[0] = entry ? READ_ONCE(entry->label[0]) : 0;
	now->label[1] = entry ? READ_ONCE(entry->label[1]) : 0;
}

/* What the rule that let the connection in gives it, `given`; else nothing. */
static __noinline void label_give(struct ct_entry *entry, int given)
{
	__u32 zero = 0;
	struct labelling *now = given ? bpf_map_lookup_elem(&labelling, &zero) : NULL;

	WRITE_ONCE(entry->mark, now ? now->mark : 0);
	WRITE_ONCE(entry->label[0], now ? now->label[0] : 0);
	WRITE_ONCE(entry->label[1], now ? now->label[1] : 0);
}

static __always_inline int label_matches(const struct labelling *now, const struct acl_label *wanted)
{
	return !(((now->mark & wanted->mark_mask) ^ wanted->mark) |
		 ((now->label[0] & wanted->label_mask[0]) ^ wanted->label[0]) |
		 ((now->label[1] & wanted->label_mask[1]) ^ wanted->label[1]));
}

static __always_inline void label_set(struct labelling *now, const struct acl_label *given)
{
	now->mark = (now->mark & ~given->set_mark_mask) | given->set_mark;
	for (int i = 0; i < 2; i++)
		now->label[i] = (now->label[i] & ~given->set_label_mask[i]) | given->set_label[i];
}

/* The first rule that matches but for mark and label goes into `labelling`. Global, so that it is verified once; so are
 * the next two. Returns 0. */
__noinline int label_find(struct packet *pkt, __u32 generation, int direction)
{
	__u32 zero = 0;
	struct labelling *now = bpf_map_lookup_elem(&labelling, &zero);

	if (now && pkt)
		now->rank = acl_search(&now->place, generation, pkt, direction & 1);
	return 0;
}

/* Whether the rule in `now->rank` decides. Then `now` has what it gives. */
static __always_inline int label_decides(__u32 *generation, struct labelling *now)
{
	void *rules = bpf_map_lookup_elem(&acl_rules, generation);
	struct acl_rule *rule = rules ? bpf_map_lookup_elem(rules, &now->rank) : NULL;
	struct acl_label *label;
	void *labels;
	__u32 index;

	if (!rule || !rule->label) /* it does not ask; or the generation is gone, which label_settle() finds, too */
		return 1;
	index = rule->label;
	labels = bpf_map_lookup_elem(&acl_labels, generation);
	label = labels ? bpf_map_lookup_elem(labels, &index) : NULL;
	if (!label) {
		now->rank = ACL_GONE;
		return 1;
	}
	if (!label_matches(now, label))
		return 0;
	label_set(now, label);
	return 1;
}

struct label_search { /* on the stack of label_choose(); its fields are keys of maps, too */
	void *rows;
	__u32 generation;
	__u32 zero;
};

/* One word of 64 rules, or one rule of it. */
static long label_step(__u32 number, struct label_search *search)
{
	struct labelling *now = bpf_map_lookup_elem(&labelling, &search->zero);
	struct acl_shape *shape = bpf_map_lookup_elem(search->rows, &search->zero);
	struct acl_group *a, *b;
	__u64 common;
	__u32 at;

	if (!now || !shape || now->rank >= ACL_GONE)
		return 1;
	at = now->place.first + 1 + now->rank / ACL_GROUP_RULES;
	a = bpf_map_lookup_elem(search->rows, &at);
	at = now->place.second + 1 + now->rank / ACL_GROUP_RULES;
	b = bpf_map_lookup_elem(search->rows, &at);
	if (!a || !b || now->rank / ACL_GROUP_RULES >= shape->groups) {
		now->rank = ACL_NO_RULE;
		return 1;
	}
	at = now->rank / 64;
	common = a->bits[at % 4] & b->bits[at % 4] & ~0ull << now->rank % 64;
	now->rank = at * 64 + (common ? lowest_bit(common) : 64);
	if (!common)
		return 0;
	if (label_decides(&search->generation, now))
		return 1;
	now->rank++;
	return 0;
}

/*
 * The rule that decides about what label_show() showed, from the one on that label_find() found, with what it gives.
 * Returns 0.
 */
__noinline int label_choose(__u32 generation)
{
	struct label_search search = {.generation = generation};

	search.rows = bpf_map_lookup_elem(&acl_rows, &search.generation);
	if (search.rows) /* else label_settle() finds no rules either */
		bpf_loop(LABEL_STEPS, label_step, &search, 0);
	return 0;
}

/* As acl_judge(), by the rule that was chosen. */
__noinline int label_settle(struct __sk_buff *skb, struct port *port, struct packet *pkt, __u64 policy, int direction)
{
	struct acl_rule none = {.action = ACL_DROP}, *rule = &none;
	__u32 generation = POLICY_GENERATION(policy), zero = 0;
	struct labelling *now = bpf_map_lookup_elem(&labelling, &zero);
	void *rules;

	if (!port || !pkt || !now || now->rank == ACL_GONE)
		return DROP_CT_RACE;
	if (now->rank != ACL_NO_RULE) {
		rules = bpf_map_lookup_elem(&acl_rules, &generation);
		rule = rules ? bpf_map_lookup_elem(rules, &now->rank) : NULL;
		if (!rule)
			return DROP_CT_RACE;
	}
	return acl_settle(skb, port->slot, pkt, rule, direction);
}
