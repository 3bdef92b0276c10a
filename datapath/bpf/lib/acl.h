/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Policies: bit-vector classifiers. A rule is a bit; the remote address selects a row of bits by its longest prefix,
 * the point on the line proto<<16|port selects another by binary search, and the lowest bit that is in both is the
 * rule. A summary word of each row says which groups of 256 rules have any bit, so 16,384 rules take at most 64 steps
 * and usually one.
 */
#pragma once

#include "atomic.h"
#include "bits.h"
#include "event.h"
#include "maps.h"
#include "packet.h"

#define ACL_GROUPS_MAX     64
#define ACL_GROUP_RULES    256
#define ACL_INTERVAL_STEPS 18 /* 2^17 intervals and one */
#define ACL_NO_RULE        (~0u)
#define ACL_GONE           (~1u) /* the generation was replaced and taken away meanwhile */

/* The point of a connection on the line. `port` is the destination's of the packet that opens; a query is placed by its
 * request, so that a reply or a later fragment judges as what opened did. */
static __always_inline __u32 acl_point(const struct packet *pkt, enum acl_direction direction)
{
	__u32 point = (__u32)pkt->proto << 16;

	if (pkt->proto == IPPROTO_TCP || pkt->proto == IPPROTO_UDP)
		return point | bpf_ntohs(direction == ACL_TO ? pkt->lport : pkt->rport);
	if (pkt->proto != IPPROTO_ICMP && pkt->proto != IPPROTO_ICMPV6)
		return point;
	if (pkt->fragment != FRAGMENT_LATER && !icmp_query_kind(pkt->proto, pkt->icmp_type))
		return point | pkt->icmp_type << 8 | pkt->icmp_code;
	if (pkt->proto == IPPROTO_ICMPV6)
		return point | 128 << 8;
	return point | (bpf_ntohs(pkt->rport) & QUERY_TYPE ?: 8) << 8;
}

static __always_inline struct acl_interval *acl_find_interval(void *line, __u32 intervals, __u32 point)
{
	__u32 low = 0, high = intervals, middle;
	struct acl_interval *interval;

	for (int i = 0; i < ACL_INTERVAL_STEPS && high - low > 1; i++) {
		middle = (low + high) / 2;
		interval = bpf_map_lookup_elem(line, &middle);
		if (!interval)
			return NULL;
		if (interval->start <= point)
			low = middle;
		else
			high = middle;
	}
	interval = bpf_map_lookup_elem(line, &low);
	return interval && interval->start <= point ? interval : NULL;
}

/* Lowest rule that both rows have, ACL_NO_RULE if none. `first` and `second` are the elements of the rows' summaries.
 */
static __always_inline __u32 acl_first_common(void *rows, __u32 first, __u32 second)
{
	struct acl_group *a = bpf_map_lookup_elem(rows, &first);
	struct acl_group *b = bpf_map_lookup_elem(rows, &second);
	__u64 summary, common;
	__u32 group, at_a, at_b;

	if (!a || !b)
		return ACL_NO_RULE;
	summary = a->bits[0] & b->bits[0];
	for (int i = 0; i < ACL_GROUPS_MAX && summary; i++) {
		group = lowest_bit(summary);
		summary &= summary - 1;
		at_a = first + 1 + group;
		at_b = second + 1 + group;
		a = bpf_map_lookup_elem(rows, &at_a);
		b = bpf_map_lookup_elem(rows, &at_b);
		if (!a || !b)
			return ACL_NO_RULE;
		for (int word = 0; word < 4; word++) {
			common = a->bits[word] & b->bits[word];
			if (common)
				return group * ACL_GROUP_RULES + word * 64 + lowest_bit(common);
		}
	}
	return ACL_NO_RULE;
}

struct acl_place { /* where a packet is in the two dimensions: elements of the rows' summaries */
	__u32 first;
	__u32 second;
};

/* The first rule that matches but for mark and label, ACL_NO_RULE or ACL_GONE. */
static __always_inline __u32 acl_search(struct acl_place *place, __u32 generation, const struct packet *pkt,
					enum acl_direction direction)
{
	struct acl_prefix key = {.length = 32 + 128, .direction = direction};
	void *trie = bpf_map_lookup_elem(&acl_tries, &generation);
	void *line = bpf_map_lookup_elem(&acl_lines, &generation);
	void *rows = bpf_map_lookup_elem(&acl_rows, &generation);
	struct acl_interval *interval;
	struct acl_shape *shape;
	__u32 *row, zero = 0;

	if (!trie || !line || !rows)
		return ACL_GONE;
	shape = bpf_map_lookup_elem(rows, &zero);
	addr_copy(key.addr, pkt->raddr);
	row = bpf_map_lookup_elem(trie, &key);
	if (!shape || !row)
		return ACL_NO_RULE;
	interval = acl_find_interval(line, shape->intervals, acl_point(pkt, direction));
	if (!interval)
		return ACL_NO_RULE;
	place->first = 1 + *row * (shape->groups + 1);
	place->second = 1 + interval->row * (shape->groups + 1);
	return acl_first_common(rows, place->first, place->second);
}

static __noinline __u32 acl_match(__u32 generation, const struct packet *pkt, enum acl_direction direction)
{
	struct acl_place place;

	return acl_search(&place, generation, pkt, direction);
}

static __noinline void acl_count(__u32 slot, __u32 rule, const struct packet *pkt)
{
	struct hits_key key = {.slot = slot, .rule = rule};
	struct hits first = {.packets = pkt->wire_packets, .bytes = pkt->wire_bytes};
	struct hits *hits = bpf_map_lookup_elem(&rule_hits, &key);

	if (!hits && !bpf_map_update_elem(&rule_hits, &key, &first, BPF_NOEXIST))
		return;
	if (!hits) /* the other CPU was first, or the map is full: then the hit is not counted */
		hits = bpf_map_lookup_elem(&rule_hits, &key);
	if (!hits)
		return;
	hits->packets += pkt->wire_packets;
	hits->bytes += pkt->wire_bytes;
}

#define ACL_AGAIN    2     /* beside the direction: of a connection that was let in before */
#define ACL_LABELLED 0x100 /* no reason: mark or label of the connection has a part in it */

/* What comes of it that `rule` decides: counts its hit and emits EVENT_LOG if it says so, but not for a connection that
 * goes on (ACL_AGAIN), whose hit was counted when it began. Returns DROP_NONE, DROP_POLICY or DROP_REJECT. */
static __always_inline int acl_settle(struct __sk_buff *skb, __u32 slot, struct packet *pkt,
				      const struct acl_rule *rule, int direction)
{
	int reason = rule->action == ACL_ALLOW ? DROP_NONE : rule->action == ACL_REJECT ? DROP_REJECT : DROP_POLICY;

	if (reason == DROP_NONE && direction & ACL_AGAIN)
		return DROP_NONE;
	acl_count(slot, rule->id, pkt);
	if (rule->log)
		event_send(skb, slot, EVENT_WHAT(EVENT_LOG, direction & 1, reason), rule->id);
	return reason;
}

/*
 * Judges `pkt` by `policy` (POLICY_WORD, read by the caller before) as a packet that opens in `direction` (enum
 * acl_direction). Counts the rule's hit for the port's slot (acl_settle).
 * Returns DROP_NONE; DROP_POLICY; DROP_REJECT (the caller answers); DROP_CT_RACE when the policy was replaced
 * meanwhile: nothing is known, so nothing may be concluded; ACL_LABELLED when label_judge() has to say. Global, so that
 * it is verified once.
 */
__noinline int acl_judge(struct __sk_buff *skb, struct port *port, struct packet *pkt, __u64 policy, int direction)
{
	struct acl_rule none = {.action = ACL_DROP}, *rule = &none;
	__u32 generation = POLICY_GENERATION(policy), rank = ACL_NO_RULE;
	void *rules;

	if (!port || !pkt)
		return DROP_POLICY;
	if (generation)
		rank = acl_match(generation, pkt, direction & 1);
	if (rank == ACL_GONE)
		return DROP_CT_RACE;
	if (rank != ACL_NO_RULE) {
		rules = bpf_map_lookup_elem(&acl_rules, &generation);
		rule = rules ? bpf_map_lookup_elem(rules, &rank) : NULL;
		if (!rule)
			return DROP_CT_RACE;
	}
	if (rule->label)
		return ACL_LABELLED;
	return acl_settle(skb, port->slot, pkt, rule, direction);
}
